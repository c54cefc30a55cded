"""The kernels and attention that models call."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import (
    adaln_modulate,
    explain,
    gate_residual,
    gate_residual_adaln,
    masked_patch_loss,
    patchify3d,
    unpatchify3d,
)

__all__ = [
    "adaln_modulate",
    "attention",
    "attention_backend",
    "attention_backends",
    "explain",
    "gate_residual",
    "gate_residual_adaln",
    "masked_patch_loss",
    "patchify3d",
    "unpatchify3d",
]


def attention_backends() -> dict[str, str]:
    """Each backend of ``attention`` and "" where it can run here, else the reason why not."""
    missing = ""
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        missing = "not installed (pip install 'g3n[xformers]')"
    except Exception as error:  # built for another torch: it raises whatever its C++ part does
        missing = f"cannot be loaded ({' '.join(str(error).split())[:120]})"
    if not missing and not torch.cuda.is_available():
        missing = "installed, but needs a CUDA device"
    return {"sdpa": "", "math": "", "xformers": missing}


def attention_backend() -> str:
    """The backend of ``attention``: environment variable G3N_ATTENTION, ``auto`` (default) being sdpa.

    Raises RuntimeError for an unknown backend or one that cannot run here.
    """
    name = os.environ.get("G3N_ATTENTION", "auto")
    if name in ("auto", "sdpa"):
        return "sdpa"
    known = attention_backends()
    if name not in known:
        raise RuntimeError(f"G3N_ATTENTION={name} is unknown; give auto, {', '.join(known)}")
    if known[name]:
        raise RuntimeError(f"G3N_ATTENTION={name} cannot be done: {known[name]}; use auto")
    return name


def attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
    """Softmax attention, all tensors [B, T, H, K], by ``attention_backend()``."""
    backend = attention_backend()
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_BTHK, k_BTHK, v_BTHK)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if backend == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
