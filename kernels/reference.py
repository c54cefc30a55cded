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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Volumes [B, X, Y, Z] of any integer or floating dtype -> patches [B, K, patch^3] in ``out_dtype``.

    Tokens run x-major over the grid (X/p, Y/p, Z/p), voxels inside a patch (p1 p2 p3). ``index_BK`` int64 chooses patches (all
    where None). With ``mean_B`` and ``rstd_B`` a voxel v != 0 becomes (v - mean) * rstd and background stays 0.
    Raises ValueError where a side is not divisible by ``patch``.
    """
    B, X, Y, Z = volume_BXYZ.shape
    if X % patch or Y % patch or Z % patch:
        raise ValueError(f"volume {(X, Y, Z)} is not divisible by patch {patch} on every axis")
    v = volume_BXYZ.reshape(B, X // patch, patch, Y // patch, patch, Z // patch, patch)
    v_BNP = v.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, patch**3)
    if index_BK is not None:
        v_BNP = v_BNP.gather(1, index_BK[..., None].expand(-1, -1, patch**3))
    if mean_B is not None and rstd_B is not None:
        exact = torch.float64 if v_BNP.dtype == torch.float64 else torch.float32
        v = v_BNP.to(exact)
        v_BNP = torch.where(v == 0, v.new_zeros(()), (v - mean_B.view(-1, 1, 1)) * rstd_B.view(-1, 1, 1))
    return v_BNP.to(out_dtype)


def unpatchify3d(patches_BNP: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    """Patches [B, N, patch^3] of a whole grid -> volumes [B, X, Y, Z], the exact inverse of ``patchify3d``."""
    x, y, z = grid_tokens
    B, N, P = patches_BNP.shape
    if (x * y * z, patch**3) != (N, P):
        raise ValueError(f"patches {(N, P)} do not fill a grid of {grid_tokens} tokens with patch {patch}")
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
    """x + gate * h; gate [B, D] or [B, T, D]."""
    return x_BTD + _a_token(gate) * h_BTD


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
    target_BKP = patchify3d(volume_BXYZ, patch, index_BK, mean_B, rstd_B, dtype)
    if norm_target:
        var, mean = torch.var_mean(target_BKP, dim=-1, keepdim=True)
        target_BKP = (target_BKP - mean) * (var + 1e-6).rsqrt()
    error = pred_BKP.to(dtype) - target_BKP
    return error.abs().mean() if kind == "l1" else error.square().mean()
