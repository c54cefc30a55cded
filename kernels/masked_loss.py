"""Triton loss on masked patches: statistics of the target patch, error, its sum and its slope in one read of prediction and volume.

A program holds one patch in registers; targets are never written anywhere. Its error is summed in the program, the patches' sums by
torch in fixed order. The slope (sign or 2 x error) is kept instead of the prediction; the backward multiplies it by what comes down.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.patchify import float32, normalize, voxels
from kernels.rows import on

SCALE = {"BLOCK": 4096, "num_warps": 4}
MAX_PATCH = 20  # 8000 voxels; more do not fit the registers of a program


@triton.jit
def _masked_loss(
    pred_ptr, volume_ptr, index_ptr, mean_ptr, rstd_ptr, sum_ptr, slope_ptr, K,
    X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, SQUARE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // K
    i = tl.arange(0, BLOCK)
    inside = i < P * P * P
    at = b * (X * Y * Z) + voxels(tl.load(index_ptr + pid), i, Y, Z, P)
    v = tl.load(volume_ptr + at, mask=inside, other=0).to(tl.float32)
    pred = tl.load(pred_ptr + pid * (P * P * P) + i, mask=inside, other=0.0).to(tl.float32)
    target = normalize(v, v != 0, tl.load(mean_ptr + b), tl.load(rstd_ptr + b))
    if NORM:
        target = tl.where(inside, target - tl.sum(target, 0) / (P * P * P), 0.0)
        target *= 1.0 / tl.sqrt_rn(tl.sum(target * target, 0) / (P * P * P - 1) + 1e-6)
    error = pred - target
    tl.store(sum_ptr + pid, tl.sum(error * error if SQUARE else tl.abs(error), 0))
    if GRADIENT:
        sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))  # NaN stays NaN, 0 stays 0
        slope = 2.0 * error if SQUARE else sign
        tl.store(slope_ptr + pid * (P * P * P) + i, slope.to(slope_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scale(slope_ptr, dloss_ptr, out_ptr, n, share, BLOCK: tl.constexpr):
    """slope * dloss * share: the factor is float32 and need not be known to the host."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slope = tl.load(slope_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (slope * (tl.load(dloss_ptr) * share)).to(out_ptr.dtype.element_ty), mask=i < n)


def config(patch: int) -> dict[str, int]:
    """Block and warps: 16 voxels a thread."""
    block = triton.next_power_of_2(patch**3)
    return {"P": patch, "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


@torch.library.custom_op("g3n::masked_patch_loss", mutates_args=())
def _loss_op(
    pred_BKP: Tensor,
    volume_BXYZ: Tensor,
    index_BK: Tensor,
    patch: int,
    mean_B: Tensor,
    rstd_B: Tensor,
    norm_target: bool,
    square: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    pred, v, index = pred_BKP.contiguous(), volume_BXYZ.contiguous(), index_BK.contiguous()
    sums_BK = torch.empty(pred.shape[:2], dtype=torch.float32, device=pred.device)
    slope_BKP = torch.empty_like(pred) if gradient else pred.new_empty(0)
    if pred.numel():
        shape = dict(zip("XYZ", v.shape[1:], strict=True))
        with on(pred):
            _masked_loss[(sums_BK.numel(),)](
                pred, v, index, float32(mean_B, v), float32(rstd_B, v), sums_BK, slope_BKP, index.shape[1],
                NORM=norm_target, SQUARE=square, GRADIENT=gradient, **shape, **config(patch),
            )  # fmt: skip
    return sums_BK.sum() / pred.numel(), slope_BKP


@_loss_op.register_fake
def _(pred_BKP, volume_BXYZ, index_BK, patch, mean_B, rstd_B, norm_target, square, gradient):
    loss = pred_BKP.new_empty((), dtype=torch.float32)
    return loss, pred_BKP.new_empty(pred_BKP.shape if gradient else 0)


@torch.library.custom_op("g3n::masked_patch_loss_backward", mutates_args=())
def _loss_backward(slope_BKP: Tensor, dloss: Tensor) -> Tensor:
    out = torch.empty_like(slope_BKP)
    n = out.numel()
    if n:
        with on(out):
            _scale[(triton.cdiv(n, SCALE["BLOCK"]),)](slope_BKP, dloss, out, n, 1 / n, **SCALE)
    return out


@_loss_backward.register_fake
def _(slope_BKP, dloss):
    return slope_BKP.new_empty(slope_BKP.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _gradient(ctx, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (_loss_backward(*ctx.saved_tensors, dloss), *[None] * 8)


_loss_op.register_autograd(_gradient, setup_context=_setup)


def masked_patch_loss(
    pred_BKP: Tensor,
    volume_BXYZ: Tensor,
    index_BK: Tensor,
    patch: int,
    mean_B: Tensor,
    rstd_B: Tensor,
    norm_target: bool,
    kind: str,
) -> Tensor:
    """As ``reference.masked_patch_loss``; gradients reach the prediction only."""
    wanted = torch.is_grad_enabled() and pred_BKP.requires_grad
    out = _loss_op(pred_BKP, volume_BXYZ, index_BK, patch, mean_B, rstd_B, norm_target, kind == "l2", wanted)
    loss: Tensor = out[0]
    return loss
