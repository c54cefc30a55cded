"""run_all: results in order, and a worker's death costs one item at most."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from data_prep.progress import run_all
from g3n.config import G3nError


def work(folder: str, number: int) -> int:
    """Counts its calls; 3 kills its process each time, 5 the first time."""
    marks = Path(folder) / str(number)
    with open(marks, "a") as file:
        file.write("x")
    if number == 3 or (number == 5 and marks.read_text() == "x"):
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 99:
        raise ValueError("wrong")
    return number * 10


def crashed(number: int) -> int:
    return -number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_its_item_alone(workers: int, tmp_path: Path) -> None:
    found = list(run_all(partial(work, str(tmp_path)), range(12), workers, "test", crashed))
    assert found == [0, 10, 20, -3, 40, 50, 60, 70, 80, 90, 100, 110]
    assert len((tmp_path / "3").read_text()) >= 2


def test_without_a_fallback_it_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="died twice"):
        list(run_all(partial(work, str(tmp_path)), range(12), 2, "test"))


def test_an_exception_goes_to_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"):
        list(run_all(partial(work, str(tmp_path)), [1, 99, 2], 2, "test", crashed))
    with pytest.raises(G3nError, match="at least 1"):
        list(run_all(partial(work, str(tmp_path)), [1], 0, "test"))
