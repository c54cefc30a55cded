"""Triton patchify and unpatchify: one program a token, normalization on the way, no copy of the volume in between."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


@triton.jit
def _voxels(token, i, Y, Z, GY, GZ, P: tl.constexpr):
    """Offsets inside one volume of elements ``i`` of a patch."""
    x = token // (GY * GZ) * P + i // (P * P)
    y = token // GZ % GY * P + i // P % P
    z = token % GZ * P + i % P
    return (x.to(tl.int64) * Y + y) * Z + z


@triton.jit
def _patchify(
    volume_ptr, index_ptr, mean_ptr, rstd_ptr, out_ptr, K, X, Y, Z,
    P: tl.constexpr, HAS_INDEX: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    token = tl.load(index_ptr + pid) if HAS_INDEX else pid % K
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P * P * P
    where = b * X * Y * Z + _voxels(token, i, Y, Z, Y // P, Z // P, P)
    v = tl.load(volume_ptr + where, mask=inside, other=0)
    if NORMALIZE:
        v = v.to(tl.float32)
        v = tl.where(v == 0, 0.0, (v - tl.load(mean_ptr + b)) * tl.load(rstd_ptr + b))
    tl.store(out_ptr + pid * (P * P * P) + i, v.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpatchify(patches_ptr, out_ptr, N, X, Y, Z, P: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // N
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P * P * P
    where = b * X * Y * Z + _voxels(pid % N, i, Y, Z, Y // P, Z // P, P)
    tl.store(out_ptr + where, tl.load(patches_ptr + pid * (P * P * P) + i, mask=inside), mask=inside)


def _grid(tokens: int, patch: int) -> tuple[tuple[int, int], int]:
    block = min(triton.next_power_of_2(patch**3), MAX_BLOCK)
    return (tokens, triton.cdiv(patch**3, block)), block


def _on(x: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@torch.library.custom_op("g3n::patchify3d", mutates_args=())
def _patchify_op(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None,
    mean_B: Tensor | None,
    rstd_B: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    v = volume_BXYZ.contiguous()
    B, X, Y, Z = v.shape
    K = index_BK.shape[1] if index_BK is not None else X * Y * Z // patch**3
    out_BKP = torch.empty(B, K, patch**3, dtype=out_dtype, device=v.device)
    if out_BKP.numel():
        grid, block = _grid(B * K, patch)
        index = index_BK.contiguous() if index_BK is not None else v
        mean = mean_B.float().contiguous() if mean_B is not None else v
        rstd = rstd_B.float().contiguous() if rstd_B is not None else v
        with _on(v):
            _patchify[grid](
                v, index, mean, rstd, out_BKP, K, X, Y, Z,
                P=patch, HAS_INDEX=index_BK is not None, NORMALIZE=mean_B is not None, BLOCK=block,
            )  # fmt: skip
    return out_BKP


@_patchify_op.register_fake
def _(volume_BXYZ, patch, index_BK, mean_B, rstd_B, out_dtype):
    B, X, Y, Z = volume_BXYZ.shape
    K = index_BK.shape[1] if index_BK is not None else X * Y * Z // patch**3
    return volume_BXYZ.new_empty((B, K, patch**3), dtype=out_dtype)


@torch.library.custom_op("g3n::unpatchify3d", mutates_args=())
def _unpatchify_op(patches_BNP: Tensor, patch: int, x: int, y: int, z: int) -> Tensor:
    p = patches_BNP.contiguous()
    B, N, _ = p.shape
    out_BXYZ = torch.empty(B, x * patch, y * patch, z * patch, dtype=p.dtype, device=p.device)
    if out_BXYZ.numel():
        grid, block = _grid(B * N, patch)
        with _on(p):
            _unpatchify[grid](p, out_BXYZ, N, *out_BXYZ.shape[1:], P=patch, BLOCK=block)
    return out_BXYZ


@_unpatchify_op.register_fake
def _(patches_BNP, patch, x, y, z):
    return patches_BNP.new_empty((patches_BNP.shape[0], x * patch, y * patch, z * patch))


def _patchify_setup(ctx, inputs, output) -> None:
    volume_BXYZ, ctx.patch, index_BK, mean_B, rstd_B, _ = inputs
    ctx.shape, ctx.dtype = volume_BXYZ.shape, volume_BXYZ.dtype
    ctx.save_for_backward(volume_BXYZ if mean_B is not None else None, index_BK, rstd_B)


def _patchify_gradient(ctx, d_BKP: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    volume_BXYZ, index_BK, rstd_B = ctx.saved_tensors
    B, *sides = ctx.shape
    tokens = [side // ctx.patch for side in sides]
    d_BNP = d_BKP.to(ctx.dtype)
    if index_BK is not None:
        n = tokens[0] * tokens[1] * tokens[2]
        index_BKP = index_BK[..., None].expand_as(d_BNP)
        d_BNP = d_BNP.new_zeros(B, n, ctx.patch**3).scatter_add(1, index_BKP, d_BNP)
    d_BXYZ = _unpatchify_op(d_BNP, ctx.patch, *tokens)
    if volume_BXYZ is not None:
        d_BXYZ = torch.where(volume_BXYZ == 0, 0, d_BXYZ * rstd_B.view(-1, 1, 1, 1).to(ctx.dtype))
    return d_BXYZ, None, None, None, None, None


def _unpatchify_setup(ctx, inputs, output) -> None:
    ctx.patch, ctx.dtype = inputs[1], inputs[0].dtype


def _unpatchify_gradient(ctx, d_BXYZ: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _patchify_op(d_BXYZ, ctx.patch, None, None, None, ctx.dtype), None, None, None, None


_patchify_op.register_autograd(_patchify_gradient, setup_context=_patchify_setup)
_unpatchify_op.register_autograd(_unpatchify_gradient, setup_context=_unpatchify_setup)


def patchify3d(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None = None,
    mean_B: Tensor | None = None,
    rstd_B: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """As ``reference.patchify3d``; gradients reach the volume only, not the statistics."""
    sides = tuple(volume_BXYZ.shape[1:])
    if any(side % patch for side in sides):
        raise ValueError(f"volume {sides} is not divisible by patch {patch} on every axis")
    if mean_B is None or rstd_B is None:
        mean_B = rstd_B = None
    out: Tensor = _patchify_op(volume_BXYZ, patch, index_BK, mean_B, rstd_B, out_dtype)
    return out


def unpatchify3d(patches_BNP: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    """As ``reference.unpatchify3d``."""
    x, y, z = grid_tokens
    if tuple(patches_BNP.shape[1:]) != (x * y * z, patch**3):
        shape = tuple(patches_BNP.shape[1:])
        raise ValueError(f"patches {shape} do not fill a grid of {grid_tokens} tokens with patch {patch}")
    out: Tensor = _unpatchify_op(patches_BNP, patch, x, y, z)
    return out
