"""Fused operations of g3n, each a plain-torch specification and, on a GPU, Triton kernels of the same arithmetic.

What a call takes and gives stands in ``reference``; ``dispatch.choose`` says which implementation it gets. Inputs that do not fit are
refused here, in the same words for both. Triton is imported only where it runs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import choose, explain

__all__ = ["adaln_modulate", "explain", "gate_residual", "gate_residual_adaln", "masked_patch_loss", "patchify3d",
           "unpatchify3d"]  # fmt: skip


def patchify3d(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None = None,
    mean_B: Tensor | None = None,
    rstd_B: Tensor | None = None,
    mask_BXYZ: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Volumes -> patches, see ``reference.patchify3d``.

    Raises ValueError where a side is not divisible by ``patch``, only one of mean and rstd is given, or the mask has another shape.
    """
    sides = tuple(volume_BXYZ.shape[1:])
    if volume_BXYZ.ndim != 4 or any(side % patch for side in sides):
        raise ValueError(f"volume {sides} is not divisible by patch {patch} on every axis; give [B, X, Y, Z]")
    if (mean_B is None) != (rstd_B is None):
        raise ValueError("normalizing takes mean_B and rstd_B; give both or neither")
    if mask_BXYZ is not None and mask_BXYZ.shape != volume_BXYZ.shape:
        raise ValueError(f"mask {tuple(mask_BXYZ.shape)} is not of the volume's shape {tuple(volume_BXYZ.shape)}")
    arguments = (volume_BXYZ, patch, index_BK, mean_B, rstd_B, mask_BXYZ, out_dtype)
    statistics_learn = any(s is not None and s.requires_grad for s in (mean_B, rstd_B))
    if not statistics_learn and choose(volume_BXYZ) == "triton":
        from kernels import patchify

        return patchify.patchify3d(*arguments)
    return reference.patchify3d(*arguments)


def unpatchify3d(patches_BNP: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    """Patches -> volumes, see ``reference.unpatchify3d``. Raises ValueError where they do not fill the grid."""
    x, y, z = grid_tokens
    if tuple(patches_BNP.shape[1:]) != (x * y * z, patch**3):
        shape = tuple(patches_BNP.shape[1:])
        raise ValueError(f"patches {shape} do not fill a grid of {grid_tokens} tokens with patch {patch}")
    if choose(patches_BNP) == "triton":
        from kernels import patchify

        return patchify.unpatchify3d(patches_BNP, patch, x, y, z)
    return reference.unpatchify3d(patches_BNP, patch, grid_tokens)


def masked_patch_loss(
    pred_BKP: Tensor,
    volume_BXYZ: Tensor,
    index_BK: Tensor,
    patch: int,
    mean_B: Tensor,
    rstd_B: Tensor,
    norm_target: bool = False,
    kind: Literal["l1", "l2"] = "l1",
) -> Tensor:
    """Loss on the patches ``index_BK`` of a volume, see ``reference.masked_patch_loss``.

    Raises ValueError for another kind, or predictions that are not a patch for each index.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind {kind!r} is unknown; give 'l1' or 'l2'")
    if tuple(pred_BKP.shape) != (*index_BK.shape, patch**3):
        raise ValueError(
            f"predictions {tuple(pred_BKP.shape)} are not {(*index_BK.shape, patch**3)}, a patch for each index"
        )
    arguments = (pred_BKP, volume_BXYZ, index_BK, patch, mean_B, rstd_B, norm_target, kind)
    target_learns = any(t.requires_grad for t in (volume_BXYZ, mean_B, rstd_B))
    if not target_learns and choose(pred_BKP) == "triton" and choose(volume_BXYZ) == "triton":
        from kernels import masked_loss

        if patch <= masked_loss.MAX_PATCH:
            return masked_loss.masked_patch_loss(*arguments)
    return reference.masked_patch_loss(*arguments)


def adaln_modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Adaptive layer norm, see ``reference.adaln_modulate``. Raises ValueError for shapes that do not fit x."""
    _check(x_BTD, shift=shift, scale=scale)
    if choose(x_BTD) == "triton":
        from kernels import adaln

        return adaln.adaln_modulate(x_BTD, shift, scale, eps)
    return reference.adaln_modulate(x_BTD, shift, scale, eps)


def gate_residual(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    """x + gate * h, see ``reference.gate_residual``. Raises ValueError for shapes that do not fit x."""
    _check(x_BTD, h_BTD, gate=gate)
    if choose(x_BTD) == "triton":
        from kernels import gate as fused

        return fused.gate_residual(x_BTD, h_BTD, gate)
    return reference.gate_residual(x_BTD, h_BTD, gate)


def gate_residual_adaln(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x + gate * h, its adaptive layer norm), see ``reference.gate_residual_adaln``. Raises ValueError as the others."""
    _check(x_BTD, h_BTD, gate=gate, shift=shift, scale=scale)
    if choose(x_BTD) == "triton":
        from kernels import adaln

        return adaln.gate_residual_adaln(x_BTD, h_BTD, gate, shift, scale, eps)
    return reference.gate_residual_adaln(x_BTD, h_BTD, gate, shift, scale, eps)


def _check(x_BTD: Tensor, h_BTD: Tensor | None = None, **modulations: Tensor) -> None:
    if x_BTD.ndim != 3:
        raise ValueError(f"x is {tuple(x_BTD.shape)}, expected [B, T, D]")
    B, T, D = x_BTD.shape
    if h_BTD is not None and h_BTD.shape != x_BTD.shape:
        raise ValueError(f"h {tuple(h_BTD.shape)} is not of x's shape {(B, T, D)}")
    for name, m in modulations.items():
        if tuple(m.shape) not in ((B, D), (B, T, D)):
            raise ValueError(f"{name} is {tuple(m.shape)}, expected {(B, D)} or {(B, T, D)}")
