# Two commands set everything up: `make demo` and `make test`. Both need python3 (3.11-3.13) and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_SEED ?= 0

.PHONY: demo test lint install clean-demo
.PHONY: bench bench-gpu tune-gpu

# a machine without network has its own torch: make bench-gpu BENCH_PYTHON=python3
BENCH := $(or $(BENCH_PYTHON),$(BIN)/python)
BENCH_SHARDS ?= runs/demo/shards

install: $(VENV)/installed

$(VENV)/installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,prep,dicom]'
	touch $@

# nothing -> phantom cohort -> four trainings -> generated brain volumes; running it again goes on where it stopped
demo: install
	$(BIN)/python examples/demo.py --seed $(DEMO_SEED)

# ranks of a distributed test have the machine for themselves, the rest runs a file a processor
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore=tests/distributed --numprocesses=auto --dist=loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy g3n kernels data_prep

# what this machine can: full sizes on a GPU, small ones on a CPU; rows in benchmarks/results, page docs/benchmarks.md
bench: $(if $(BENCH_PYTHON),,install)
	$(BENCH) -m benchmarks.kernels
	$(BENCH) -m benchmarks.attention
	@if [ -e $(BENCH_SHARDS)/index.json ]; then $(BENCH) -m benchmarks.stream --shards $(BENCH_SHARDS); \
	else echo "stream is not measured: $(BENCH_SHARDS) is missing (make demo writes it)"; fi
	$(BENCH) -m benchmarks.report

# kernels and attention within ten minutes; rows stay where the page cannot be made for lack of matplotlib
bench-gpu: $(if $(BENCH_PYTHON),,install)
	$(BENCH) -m benchmarks.kernels --minutes 6
	$(BENCH) -m benchmarks.attention --minutes 2.5
	$(BENCH) -m benchmarks.report || echo "no page was made; the rows are in benchmarks/results"

tune-gpu: $(if $(BENCH_PYTHON),,install)
	$(BENCH) -m benchmarks.tune

clean-demo:
	rm -rf runs/demo
