"""Which implementation runs: Triton (on a GPU, or in its interpreter) or the plain torch of ``reference``."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

LOWEST_CAPABILITY = (8, 0)
TRITON_DTYPES = frozenset(
    {
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    }
)


def choose(x: Tensor) -> str:
    """'triton' or 'reference' for an op whose main input is ``x``.

    A CUDA tensor, or any tensor under TRITON_INTERPRET=1, goes to Triton where Triton can take it; the rest goes to the
    reference. A meta tensor stands for a GPU's: only shapes are computed. G3N_KERNELS=triton|reference forces; RuntimeError where
    that cannot be, ValueError for another value.
    """
    return _choose(x.device.type, x.device.index, x.dtype)


@torch.compiler.assume_constant_result  # a compiled model asks once, while it is traced
def _choose(device_type: str, index: int | None, dtype: torch.dtype) -> str:
    forced = os.environ.get("G3N_KERNELS", "")
    if forced == "reference" or (not forced and device_type == "cpu" and not _interpreted()):
        return "reference"
    reason = _obstacle(device_type, index) or _wrong_dtype(dtype)
    return _decide(forced, reason)


def explain() -> tuple[str, str]:
    """(choice, reason) for this machine's default device; errors as ``choose``."""
    forced = os.environ.get("G3N_KERNELS", "")
    if forced == "reference":
        return "reference", "G3N_KERNELS=reference"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reason = _obstacle(device, None)
    choice = _decide(forced, reason)
    if choice == "reference":
        return choice, reason
    where = "TRITON_INTERPRET=1" if _interpreted() else torch.cuda.get_device_name()
    return choice, f"G3N_KERNELS=triton, {where}" if forced else where


def _decide(forced: str, reason: str) -> str:
    if forced not in ("", "triton", "reference"):
        raise ValueError(f"G3N_KERNELS={forced} is unknown; use triton, reference or leave it unset")
    if not reason:
        return "triton"
    if forced == "triton":
        raise RuntimeError(f"G3N_KERNELS=triton cannot be done: {reason}")
    return "reference"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _obstacle(device_type: str, index: int | None) -> str:
    """Why Triton cannot run on this device; empty where it can."""
    if not _has_triton():
        return "triton is not installed"
    if _interpreted() or device_type == "meta":
        return ""
    if device_type != "cuda":
        return f"Triton needs a CUDA GPU, not {device_type} (TRITON_INTERPRET=1 runs its slow interpreter)"
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        return f"the GPU's compute capability {capability} is below {LOWEST_CAPABILITY}"
    return ""


def _wrong_dtype(dtype: torch.dtype) -> str:
    return "" if dtype in TRITON_DTYPES else f"the kernels keep float32 statistics and do not take {dtype}"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
