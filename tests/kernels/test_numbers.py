"""The Triton kernels give the reference's numbers, forward and backward, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import dispatch, reference
from tests.launch import ROOT


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    line = [sys.executable, "-m", "tests.kernels.numbers"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_adaln_is_as_exact_as_float32_allows(errors: dict[str, float]) -> None:
    assert errors["adaln"] < 5e-6


def test_adaln_keeps_float32_sums_of_bf16_rows(errors: dict[str, float]) -> None:
    assert errors["adaln_bf16"] < 1e-2  # one rounding to bf16


def test_patches_are_the_references_to_the_last_digit_but_one(errors: dict[str, float]) -> None:
    assert errors["patchify"] < 1e-4  # of values up to 200; the only freedom is a fused multiply-add


def test_the_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("G3N_KERNELS", raising=False)
    x = torch.randn(2, 3, 8)
    shift, scale = torch.randn(2, 8), torch.randn(2, 8)
    assert dispatch.choose(x) == "reference"
    assert torch.equal(kernels.adaln_modulate(x, shift, scale), reference.adaln_modulate(x, shift, scale))
    monkeypatch.setenv("G3N_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"G3N_KERNELS=triton cannot be done: .*(CUDA|triton)"):
        dispatch.choose(x)
    monkeypatch.setenv("G3N_KERNELS", "cuda")
    with pytest.raises(ValueError, match="G3N_KERNELS=cuda is unknown"):
        dispatch.choose(x)


def test_double_precision_stays_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(torch.zeros(1, dtype=torch.float64)) == "reference"


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"volume \(5, 4, 4\) is not divisible by patch 4"):
        kernels.patchify3d(torch.zeros(1, 5, 4, 4), 4)
    with pytest.raises(ValueError, match="do not fill a grid"):
        kernels.unpatchify3d(torch.zeros(1, 3, 64), 4, (1, 1, 2))
