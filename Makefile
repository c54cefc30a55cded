# Two commands set everything up: `make demo` and `make test`. Both need python3 (3.11-3.13) and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_SEED ?= 0

.PHONY: demo test lint install clean-demo

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,prep,dicom]'
	touch $@

# nothing -> phantom cohort -> four trainings -> generated brain volumes; running it again goes on where it stopped
demo: install
	$(BIN)/python examples/demo.py --seed $(DEMO_SEED)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy g3n kernels data_prep

clean-demo:
	rm -rf runs/demo
