"""The specification of every kernel in plain torch: differentiable, any floating dtype, no device assumed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify3d(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None = None,
    mean_B: Tensor | None = None,
    rstd_B: Tensor | None = None,
    mask_BXYZ: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Volumes [B, X, Y, Z] of any integer or floating dtype -> patches [B, K, patch^3] in ``out_dtype``.

    Tokens run x-major over the grid (X/p, Y/p, Z/p), voxels inside a patch (p1 p2 p3). ``index_BK`` int64 chooses patches (all
    where None), twice the same where it says so. Background is where ``mask_BXYZ`` is zero, or the volume itself where None: it
    becomes or stays 0. With ``mean_B`` and ``rstd_B`` every other voxel v becomes (v - mean) * rstd.
    """
    B, X, Y, Z = volume_BXYZ.shape

    def patches(v: Tensor) -> Tensor:
        v = v.reshape(B, X // patch, patch, Y // patch, patch, Z // patch, patch)
        v = v.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, X * Y * Z // patch**3, patch**3)
        return v if index_BK is None else v.gather(1, index_BK[..., None].expand(-1, -1, patch**3))

    v_BKP = patches(volume_BXYZ)
    brain_BKP = v_BKP != 0 if mask_BXYZ is None else patches(mask_BXYZ) != 0
    if mean_B is not None and rstd_B is not None:
        exact = torch.float64 if v_BKP.dtype == torch.float64 else torch.float32
        v_BKP = (v_BKP.to(exact) - mean_B.view(-1, 1, 1)) * rstd_B.view(-1, 1, 1)
    elif mask_BXYZ is None:
        return v_BKP.to(out_dtype)
    return torch.where(brain_BKP, v_BKP, v_BKP.new_zeros(())).to(out_dtype)


def unpatchify3d(patches_BNP: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    """Patches [B, N, patch^3] of a whole grid -> volumes [B, X, Y, Z], the exact inverse of ``patchify3d``."""
    x, y, z = grid_tokens
    B = len(patches_BNP)
    v = patches_BNP.reshape(B, x, y, z, patch, patch, patch).permute(0, 1, 4, 2, 5, 3, 6)
    return v.reshape(B, x * patch, y * patch, z * patch)


def _a_token(m: Tensor) -> Tensor:
    """[B, D] -> [B, 1, D]; [B, T, D] as it is."""
    return m[:, None] if m.ndim == 2 else m


def adaln_modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm without weights over D, times (1 + scale), plus shift; shift and scale [B, D] or [B, T, D]."""
    exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    y_BTD = F.layer_norm(x_BTD.to(exact), (x_BTD.shape[-1],), eps=eps)
    return (y_BTD * (1 + _a_token(scale).to(exact)) + _a_token(shift).to(exact)).to(x_BTD.dtype)


def gate_residual(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    """x + gate * h in x's dtype, rounded once; gate [B, D] or [B, T, D]."""
    exact = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
    return (x_BTD.to(exact) + _a_token(gate).to(exact) * h_BTD.to(exact)).to(x_BTD.dtype)


def gate_residual_adaln(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x1, y) with x1 = x + gate * h and y = adaln_modulate(x1, shift, scale)."""
    x1_BTD = gate_residual(x_BTD, h_BTD, gate)
    return x1_BTD, adaln_modulate(x1_BTD, shift, scale, eps)


def masked_patch_loss(
    pred_BKP: Tensor,
    volume_BXYZ: Tensor,
    index_BK: Tensor,
    patch: int,
    mean_B: Tensor,
    rstd_B: Tensor,
    norm_target: bool,
    kind: Literal["l1", "l2"],
) -> Tensor:
    """Mean |pred - target| or (pred - target)^2 over the chosen patches; a scalar.

    The target is the normalized volume's patches, with ``norm_target`` each standardized (unbiased variance + 1e-6; He 2022).
    """
    dtype = pred_BKP.dtype if pred_BKP.dtype == torch.float64 else torch.float32
    target_BKP = patchify3d(volume_BXYZ, patch, index_BK, mean_B, rstd_B, None, dtype)
    if norm_target:
        var, mean = torch.var_mean(target_BKP, dim=-1, keepdim=True)
        target_BKP = (target_BKP - mean) * (var + 1e-6).rsqrt()
    error = pred_BKP.to(dtype) - target_BKP
    return error.abs().mean() if kind == "l1" else error.square().mean()
