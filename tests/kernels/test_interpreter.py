"""Runs ``test_triton.py`` in Triton's interpreter, in a process of its own: TRITON_INTERPRET has to be set before Triton is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytest.importorskip("triton")


def test_the_kernels_give_the_references_numbers_in_the_interpreter() -> None:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed[1]) >= 60
