"""Triton adaLN: LayerNorm without weights, times (1 + scale), plus shift; one read of x each way, no atomics."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

SLICE = 16  # rows of one sample that a backward program sums; fixed, so that sums have one order on every GPU


@triton.jit
def _forward(
    x_ptr,
    shift_ptr,
    scale_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    D,
    shift_b,
    shift_t,
    scale_b,
    scale_t,
    eps,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    # A row is two blocks, the largest power of two in D and the rest: 1152 = 1024 + 128 wastes no lane.
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    inside = tail < D
    x1 = tl.load(x_ptr + row * D + head).to(tl.float32)
    x2 = tl.load(x_ptr + row * D + tail, mask=inside, other=0.0).to(tl.float32)
    mean = (tl.sum(x1, 0) + tl.sum(x2, 0)) / D
    x1 = x1 - mean
    x2 = tl.where(inside, x2 - mean, 0.0)
    var = (tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / D
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    shift_row = shift_ptr + b * shift_b + t * shift_t
    scale_row = scale_ptr + b * scale_b + t * scale_t
    y1 = x1 * rstd * (1.0 + tl.load(scale_row + head).to(tl.float32)) + tl.load(shift_row + head).to(tl.float32)
    scale2 = tl.load(scale_row + tail, mask=inside, other=0.0).to(tl.float32)
    y2 = x2 * rstd * (1.0 + scale2) + tl.load(shift_row + tail, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + head, y1.to(y_ptr.dtype.element_ty))
    tl.store(y_ptr + row * D + tail, y2.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _row_gradient(dy, x, scale, mean, rstd):
    """Normalized x and the gradient that reaches it."""
    return (x - mean) * rstd, dy * (1.0 + scale)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dshift_ptr,
    dscale_ptr,
    T,
    D,
    slices,
    scale_b,
    scale_t,
    PER_TOKEN: tl.constexpr,
    SLICE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    first = (pid % slices) * SLICE
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    inside = tail < D
    dshift1 = tl.zeros([HEAD], tl.float32)
    dshift2 = tl.zeros([TAIL], tl.float32)
    dscale1 = tl.zeros([HEAD], tl.float32)
    dscale2 = tl.zeros([TAIL], tl.float32)
    for t in range(first, tl.minimum(first + SLICE, T)):
        row = b * T + t
        scale_row = scale_ptr + b * scale_b + t * scale_t
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        dy1 = tl.load(dy_ptr + row * D + head).to(tl.float32)
        dy2 = tl.load(dy_ptr + row * D + tail, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + row * D + head).to(tl.float32)
        x2 = tl.load(x_ptr + row * D + tail, mask=inside, other=0.0).to(tl.float32)
        scale1 = tl.load(scale_row + head).to(tl.float32)
        scale2 = tl.load(scale_row + tail, mask=inside, other=0.0).to(tl.float32)
        n1, g1 = _row_gradient(dy1, x1, scale1, mean, rstd)
        n2, g2 = _row_gradient(dy2, x2, scale2, mean, rstd)
        mean_g = (tl.sum(g1, 0) + tl.sum(g2, 0)) / D
        mean_gn = (tl.sum(g1 * n1, 0) + tl.sum(g2 * n2, 0)) / D
        dx1 = (g1 - mean_g - n1 * mean_gn) * rstd
        dx2 = (g2 - mean_g - n2 * mean_gn) * rstd
        tl.store(dx_ptr + row * D + head, dx1.to(dx_ptr.dtype.element_ty))
        tl.store(dx_ptr + row * D + tail, dx2.to(dx_ptr.dtype.element_ty), mask=inside)
        if PER_TOKEN:
            tl.store(dshift_ptr + row * D + head, dy1.to(dshift_ptr.dtype.element_ty))
            tl.store(dshift_ptr + row * D + tail, dy2.to(dshift_ptr.dtype.element_ty), mask=inside)
            tl.store(dscale_ptr + row * D + head, (dy1 * n1).to(dscale_ptr.dtype.element_ty))
            tl.store(dscale_ptr + row * D + tail, (dy2 * n2).to(dscale_ptr.dtype.element_ty), mask=inside)
        else:
            dshift1 += dy1
            dshift2 += dy2
            dscale1 += dy1 * n1
            dscale2 += dy2 * n2
    if not PER_TOKEN:
        tl.store(dshift_ptr + pid * D + head, dshift1)
        tl.store(dshift_ptr + pid * D + tail, dshift2, mask=inside)
        tl.store(dscale_ptr + pid * D + head, dscale1)
        tl.store(dscale_ptr + pid * D + tail, dscale2, mask=inside)


def _blocks(D: int) -> dict[str, int]:
    """HEAD, TAIL and warps for a width; a power of two still has a tail, of one masked lane."""
    head = 1 << (D.bit_length() - 1)
    tail = triton.next_power_of_2(D - head) if head < D else 1
    return {"HEAD": head, "TAIL": tail, "num_warps": min(max(head // 256, 1), 16)}


def _strides(m: Tensor) -> tuple[int, int]:
    """Step to the next sample and to the next token."""
    return (m.stride(0), 0) if m.ndim == 2 else (m.stride(0), m.stride(1))


@torch.library.custom_op("g3n::adaln_modulate", mutates_args=())
def _adaln(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x_BTD.shape
    x_BTD = x_BTD.contiguous()
    y_BTD = torch.empty_like(x_BTD)
    mean_BT = torch.empty(B, T, dtype=torch.float32, device=x_BTD.device)
    rstd_BT = torch.empty_like(mean_BT)
    if y_BTD.numel():
        strides = (*_strides(shift), *_strides(scale))
        with _on(x_BTD):
            _forward[(B * T,)](x_BTD, shift, scale, y_BTD, mean_BT, rstd_BT, T, D, *strides, eps, **_blocks(D))
    return y_BTD, mean_BT, rstd_BT


@_adaln.register_fake
def _(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    mean_BT = x_BTD.new_empty(x_BTD.shape[:2], dtype=torch.float32)
    return y_BTD, mean_BT, torch.empty_like(mean_BT)


@torch.library.custom_op("g3n::adaln_modulate_backward", mutates_args=())
def _adaln_backward(
    dy_BTD: Tensor, x_BTD: Tensor, scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x_BTD.shape
    x_BTD, dy_BTD = x_BTD.contiguous(), dy_BTD.contiguous()
    dx_BTD = torch.empty_like(x_BTD)
    per_token = scale.ndim == 3
    slices = triton.cdiv(T, SLICE)
    if per_token:
        dshift = torch.empty(B, T, D, dtype=scale.dtype, device=scale.device)
    else:
        dshift = torch.empty(B, slices, D, dtype=torch.float32, device=scale.device)
    dscale = torch.empty_like(dshift)
    if x_BTD.numel():
        with _on(x_BTD):
            _backward[(B * slices,)](
                dy_BTD, x_BTD, scale, mean_BT, rstd_BT, dx_BTD, dshift, dscale, T, D, slices, *_strides(scale),
                PER_TOKEN=per_token, SLICE=SLICE, **_blocks(D),
            )  # fmt: skip
    if not per_token:
        dshift, dscale = dshift.sum(1).to(scale.dtype), dscale.sum(1).to(scale.dtype)
    return dx_BTD, dshift, dscale


@_adaln_backward.register_fake
def _(dy_BTD: Tensor, x_BTD: Tensor, scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dx_BTD = torch.empty_like(x_BTD, memory_format=torch.contiguous_format)
    return dx_BTD, scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _setup(ctx, inputs, output) -> None:
    x_BTD, _shift, scale, _eps = inputs
    _y, mean_BT, rstd_BT = output
    ctx.mark_non_differentiable(mean_BT, rstd_BT)
    ctx.save_for_backward(x_BTD, scale, mean_BT, rstd_BT)


def _gradient(ctx, dy_BTD: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return (*_adaln_backward(dy_BTD, *ctx.saved_tensors), None)


_adaln.register_autograd(_gradient, setup_context=_setup)


def _on(x: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def adaln_modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """As ``reference.adaln_modulate``; statistics and sums in float32."""
    B, T, D = x_BTD.shape
    per_token = shift.ndim == 3 or scale.ndim == 3
    dtype = torch.promote_types(shift.dtype, scale.dtype)

    def fit(m: Tensor) -> Tensor:
        m = (m[:, None] if m.ndim == 2 else m).expand(B, T, D) if per_token else m.expand(B, D)
        m = m.to(dtype)
        return m if m.stride(-1) == 1 else m.contiguous()

    y_BTD: Tensor = _adaln(x_BTD, fit(shift), fit(scale), eps)[0]
    return y_BTD
