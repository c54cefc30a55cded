"""The kernels and attention that models call."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

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
    "explain",
    "gate_residual",
    "gate_residual_adaln",
    "masked_patch_loss",
    "patchify3d",
    "unpatchify3d",
]


def attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, backend: str = "auto") -> Tensor:
    """Softmax attention, all tensors [B, T, H, K]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
