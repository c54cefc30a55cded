"""Triton patchify and unpatchify: volumes in any stored type are read once, and only where a patch was chosen.

A program moves one patch (or 4096 of its voxels): read along z, P voxels at a time, written as one row. Normalization and the
cast happen on the way. docs/kernels.md has the count of bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import on

MAX_BLOCK = 4096


@triton.jit
def voxels(token, i, Y: tl.constexpr, Z: tl.constexpr, P: tl.constexpr):
    """Offsets inside one volume of elements ``i`` of a patch; tokens and elements run x-major."""
    x = token // ((Y // P) * (Z // P)) * P + i // (P * P)
    y = token // (Z // P) % (Y // P) * P + i // P % P
    z = token % (Z // P) * P + i % P
    return (x.to(tl.int64) * Y + y) * Z + z


@triton.jit
def normalize(v, brain, mean, rstd):
    """float32: (v - mean) * rstd where ``brain``, else 0."""
    return tl.where(brain, (v - mean) * rstd, 0.0)


@triton.jit
def _patchify(
    volume_ptr, mask_ptr, index_ptr, mean_ptr, rstd_ptr, out_ptr, K,
    X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, P: tl.constexpr,
    HAS_INDEX: tl.constexpr, NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    token = tl.load(index_ptr + pid) if HAS_INDEX else pid % K
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P * P * P
    at = b * (X * Y * Z) + voxels(token, i, Y, Z, P)
    v = tl.load(volume_ptr + at, mask=inside, other=0)
    if NORMALIZE:
        v = v.to(tl.float32)
        brain = tl.load(mask_ptr + at, mask=inside, other=0) != 0 if HAS_MASK else v != 0
        v = normalize(v, brain, tl.load(mean_ptr + b), tl.load(rstd_ptr + b))
    elif HAS_MASK:
        v = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, v, 0)
    tl.store(out_ptr + pid * (P * P * P) + i, v.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpatchify(
    patches_ptr, out_ptr, N,
    X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // N
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P * P * P
    at = b * (X * Y * Z) + voxels(pid % N, i, Y, Z, P)
    tl.store(out_ptr + at, tl.load(patches_ptr + pid * (P * P * P) + i, mask=inside), mask=inside)


@triton.jit
def _patchify_backward(
    d_ptr, volume_ptr, mask_ptr, index_ptr, rstd_ptr, out_ptr, K, N,
    X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, P: tl.constexpr, HAS_INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr, KBLOCK: tl.constexpr,
):  # fmt: skip
    """One program a place of the grid: the gradients of all rows that chose it, added in the order of their rows."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // N
    token = pid % N
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < P * P * P
    if HAS_INDEX:
        k = tl.arange(0, KBLOCK)
        chosen = tl.load(index_ptr + b * K + k, mask=k < K, other=-1) == token
        d = tl.zeros([BLOCK], tl.float32)
        row = -1
        for _ in range(tl.sum(chosen.to(tl.int32), 0)):
            row = tl.min(tl.where(chosen & (k > row), k, KBLOCK), 0)
            d += tl.load(d_ptr + (b * K + row) * (P * P * P) + i, mask=inside, other=0.0).to(tl.float32)
    else:
        d = tl.load(d_ptr + pid * (P * P * P) + i, mask=inside, other=0.0).to(tl.float32)
    at = b * (X * Y * Z) + voxels(token, i, Y, Z, P)
    if HAS_MASK:
        d = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, d, 0.0)
    elif NORMALIZE:
        d = tl.where(tl.load(volume_ptr + at, mask=inside, other=0).to(tl.float32) != 0, d, 0.0)
    if NORMALIZE:
        d *= tl.load(rstd_ptr + b)
    tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=inside)


def config(patch: int) -> dict[str, int]:
    """Block and warps: a thread moves up to 16 voxels."""
    block = min(triton.next_power_of_2(patch**3), MAX_BLOCK)
    return {"P": patch, "BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}


def _launch(patch: int, tokens: int, shape: tuple[int, ...]) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants for ``tokens`` patches of volumes of this shape."""
    c = config(patch)
    return (tokens, triton.cdiv(patch**3, c["BLOCK"])), {**c, **dict(zip("XYZ", shape, strict=True))}


def float32(statistic: Tensor | None, stand_in: Tensor) -> Tensor:
    """Mean or rstd [B] as the kernels read it; ``stand_in`` is a pointer that is never read."""
    return stand_in if statistic is None else statistic.float().contiguous()


@torch.library.custom_op("g3n::patchify3d", mutates_args=())
def patchify3d(
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None,
    mean_B: Tensor | None,
    rstd_B: Tensor | None,
    mask_BXYZ: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As ``reference.patchify3d``; gradients reach the volume only, not the statistics."""
    v = volume_BXYZ.contiguous()
    B, *shape = v.shape
    K = index_BK.shape[1] if index_BK is not None else shape[0] * shape[1] * shape[2] // patch**3
    out_BKP = torch.empty(B, K, patch**3, dtype=out_dtype, device=v.device)
    if out_BKP.numel():
        grid, constants = _launch(patch, B * K, tuple(shape))
        with on(v):
            _patchify[grid](
                v, _or(mask_BXYZ, v), _or(index_BK, v), float32(mean_B, v), float32(rstd_B, v), out_BKP, K,
                HAS_INDEX=index_BK is not None, NORMALIZE=mean_B is not None, HAS_MASK=mask_BXYZ is not None,
                **constants,
            )  # fmt: skip
    return out_BKP


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if x is None else x.contiguous()


@patchify3d.register_fake
def _(volume_BXYZ, patch, index_BK, mean_B, rstd_B, mask_BXYZ, out_dtype):
    B, X, Y, Z = volume_BXYZ.shape
    K = index_BK.shape[1] if index_BK is not None else X * Y * Z // patch**3
    return volume_BXYZ.new_empty((B, K, patch**3), dtype=out_dtype)


@torch.library.custom_op("g3n::patchify3d_backward", mutates_args=())
def _patchify_backward_op(
    d_BKP: Tensor,
    volume_BXYZ: Tensor,
    patch: int,
    index_BK: Tensor | None,
    rstd_B: Tensor | None,
    mask_BXYZ: Tensor | None,
) -> Tensor:
    d, v = d_BKP.contiguous(), volume_BXYZ.contiguous()
    out_BXYZ = torch.empty_like(v)
    if not v.numel():
        return out_BXYZ
    B, *shape = v.shape
    N, K = v[0].numel() // patch**3, d.shape[1]
    grid, constants = _launch(patch, B * N, tuple(shape))
    with on(v):
        _patchify_backward[grid](
            d, v, _or(mask_BXYZ, v), _or(index_BK, v), float32(rstd_B, v), out_BXYZ, K, N,
            HAS_INDEX=index_BK is not None, NORMALIZE=rstd_B is not None, HAS_MASK=mask_BXYZ is not None,
            KBLOCK=triton.next_power_of_2(max(K, 1)), **constants,
        )  # fmt: skip
    return out_BXYZ


@_patchify_backward_op.register_fake
def _(d_BKP, volume_BXYZ, patch, index_BK, rstd_B, mask_BXYZ):
    return volume_BXYZ.new_empty(volume_BXYZ.shape)


@torch.library.custom_op("g3n::unpatchify3d", mutates_args=())
def unpatchify3d(patches_BNP: Tensor, patch: int, x: int, y: int, z: int) -> Tensor:
    """As ``reference.unpatchify3d`` with a grid of x, y, z tokens."""
    p = patches_BNP.contiguous()
    B, N, _ = p.shape
    out_BXYZ = torch.empty(B, x * patch, y * patch, z * patch, dtype=p.dtype, device=p.device)
    if out_BXYZ.numel():
        grid, constants = _launch(patch, B * N, tuple(out_BXYZ.shape[1:]))
        with on(p):
            _unpatchify[grid](p, out_BXYZ, N, **constants)
    return out_BXYZ


@unpatchify3d.register_fake
def _(patches_BNP, patch, x, y, z):
    return patches_BNP.new_empty((patches_BNP.shape[0], x * patch, y * patch, z * patch))


def _patchify_setup(ctx, inputs, output) -> None:
    volume_BXYZ, ctx.patch, index_BK, _, rstd_B, mask_BXYZ, _ = inputs
    ctx.save_for_backward(volume_BXYZ, index_BK, rstd_B, mask_BXYZ)


def _patchify_gradient(ctx, d_BKP: Tensor) -> tuple[Tensor | None, ...]:
    volume_BXYZ, index_BK, rstd_B, mask_BXYZ = ctx.saved_tensors
    d_BXYZ = _patchify_backward_op(d_BKP, volume_BXYZ, ctx.patch, index_BK, rstd_B, mask_BXYZ)
    return d_BXYZ, None, None, None, None, None, None


def _unpatchify_setup(ctx, inputs, output) -> None:
    ctx.patch, ctx.dtype = inputs[1], inputs[0].dtype


def _unpatchify_gradient(ctx, d_BXYZ: Tensor) -> tuple[Tensor, None, None, None, None]:
    return patchify3d(d_BXYZ, ctx.patch, None, None, None, None, ctx.dtype), None, None, None, None


patchify3d.register_autograd(_patchify_gradient, setup_context=_patchify_setup)
unpatchify3d.register_autograd(_unpatchify_gradient, setup_context=_unpatchify_setup)
