"""Mutated NIfTI, Analyze, MGH, tar, zstd, JSON and table files: no crash, no hang, no memory beyond the limit, a named error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launch import ROOT, environment


def fuzz(count: int, seed: int) -> None:
    line = [sys.executable, "-m", "tests.fuzz", "--count", str(count), "--seed", str(seed)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    refused = int(done.stdout.split(" cases, ")[1].split()[0])
    assert refused > 0.3 * count  # mutations that everything survives would test nothing


def test_a_thousand_mutations() -> None:
    fuzz(1000, 0)


@pytest.mark.fuzz
def test_a_hundred_thousand_mutations() -> None:
    """Minutes: ``pytest -m fuzz``."""
    fuzz(100_000, 1)
