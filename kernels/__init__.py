"""Fused operations of g3n, each a plain-torch specification and, on a GPU, Triton kernels of the same arithmetic.

The signatures are those of ``reference``; ``dispatch.choose`` says which implementation a call gets. Triton is imported
only where it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import choose, explain
from kernels.reference import gate_residual

__all__ = ["adaln_modulate", "explain", "gate_residual", "gate_residual_adaln", "masked_patch_loss", "patchify3d",
           "unpatchify3d"]  # fmt: skip

masked_patch_loss = reference.masked_patch_loss


def patchify3d(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None = None,
    mean_B: Tensor | None = None,
    rstd_B: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Volumes -> patches, see ``reference.patchify3d``."""
    statistics_learn = any(s is not None and s.requires_grad for s in (mean_B, rstd_B))
    if choose(volume_BXYZ) == "triton" and not statistics_learn:
        from kernels import patchify as fused

        return fused.patchify3d(volume_BXYZ, patch, index_BK, mean_B, rstd_B, out_dtype)
    return reference.patchify3d(volume_BXYZ, patch, index_BK, mean_B, rstd_B, out_dtype)


def unpatchify3d(patches_BNP: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    """Patches -> volumes, see ``reference.unpatchify3d``."""
    if choose(patches_BNP) == "triton":
        from kernels import patchify as fused

        return fused.unpatchify3d(patches_BNP, patch, grid_tokens)
    return reference.unpatchify3d(patches_BNP, patch, grid_tokens)


def adaln_modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm, see ``reference.adaln_modulate``."""
    if choose(x_BTD) == "triton":
        from kernels import adaln as fused

        return fused.adaln_modulate(x_BTD, shift, scale, eps)
    return reference.adaln_modulate(x_BTD, shift, scale, eps)


def gate_residual_adaln(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x + gate * h, its adaptive layer norm), see ``reference.gate_residual_adaln``."""
    x1_BTD = gate_residual(x_BTD, h_BTD, gate)
    return x1_BTD, adaln_modulate(x1_BTD, shift, scale, eps)
