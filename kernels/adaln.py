"""Triton adaLN: LayerNorm without weights, times (1 + scale), plus shift; with or without a gated residual before it.

One kernel each way. Statistics and sums are float32; what the backward needs beyond its inputs is x1, mean and rstd. Gradients of
shift, scale and gate are sums over tokens: a program adds SLICE tokens of one sample in order, ``rows.sum_slices`` adds the
slices in order. No atomics: the same inputs give the same bits. docs/kernels.md has the count of bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import Tile, fit, load_row, on, outside_zero, store_row, strides, sum_slices

SLICE = 16  # tokens that one program of the backward sums; a constant, so that sums have one order everywhere
# Speed alone, see benchmarks/tune.py
FORWARD = Tile(lanes=16, registers=96)
BACKWARD = {False: Tile(lanes=8, registers=128), True: Tile(lanes=8, registers=168)}  # without and with a gate
STAGES = 1  # of the pipeline in the backward: 1 loads a row when its turn comes, more load ahead


@triton.jit
def _forward(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, x1_ptr, y_ptr, mean_ptr, rstd_ptr,
    T, gate_b, gate_t, shift_b, shift_t, scale_b, scale_t, eps,
    GATED: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program makes one row."""
    row = tl.program_id(0).to(tl.int64)
    b = row // T
    t = row % T
    x, x_ = load_row(x_ptr + row * D, D, HEAD, TAIL)
    if GATED:
        h, h_ = load_row(h_ptr + row * D, D, HEAD, TAIL)
        gate, gate_ = load_row(gate_ptr + b * gate_b + t * gate_t, D, HEAD, TAIL)
        # statistics of x1 as it is stored: the backward sees no other
        x = (x + gate * h).to(x1_ptr.dtype.element_ty).to(tl.float32)
        x_ = (x_ + gate_ * h_).to(x1_ptr.dtype.element_ty).to(tl.float32)
        store_row(x1_ptr + row * D, x, x_, D, HEAD, TAIL)
    mean = (tl.sum(x, 0) + tl.sum(x_, 0)) / D
    x = x - mean
    x_ = outside_zero(x_ - mean, D, HEAD, TAIL)
    rstd = 1.0 / tl.sqrt_rn((tl.sum(x * x, 0) + tl.sum(x_ * x_, 0)) / D + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    scale, scale_ = load_row(scale_ptr + b * scale_b + t * scale_t, D, HEAD, TAIL)
    shift, shift_ = load_row(shift_ptr + b * shift_b + t * shift_t, D, HEAD, TAIL)
    y = x * rstd * (1.0 + scale) + shift
    y_ = x_ * rstd * (1.0 + scale_) + shift_
    store_row(y_ptr + row * D, y, y_, D, HEAD, TAIL)


@triton.jit
def _backward(
    dy_ptr, dx1_ptr, x1_ptr, h_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, dmod_ptr,
    T, slices, gate_b, gate_t, scale_b, scale_t,
    GATED: tl.constexpr, PER_TOKEN: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program takes SLICE tokens of one sample, one after the other.

    dmod holds planes: d scale, d gate where GATED, d shift. Per sample they are sums [B, slices, D]; per token they are
    [B, T, D], and d shift, which is dy, is left out.
    """
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    first = pid % slices * SLICE
    if not PER_TOKEN:
        dscale = tl.zeros([HEAD], tl.float32)
        dscale_ = tl.zeros([TAIL], tl.float32)
        dshift = tl.zeros([HEAD], tl.float32)
        dshift_ = tl.zeros([TAIL], tl.float32)
        if GATED:
            dgate = tl.zeros([HEAD], tl.float32)
            dgate_ = tl.zeros([TAIL], tl.float32)
    for t in tl.range(first, tl.minimum(first + SLICE, T), num_stages=STAGES):
        row = b * T + t
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        x, x_ = load_row(x1_ptr + row * D, D, HEAD, TAIL)
        dy, dy_ = load_row(dy_ptr + row * D, D, HEAD, TAIL)
        scale, scale_ = load_row(scale_ptr + b * scale_b + t * scale_t, D, HEAD, TAIL)
        x = (x - mean) * rstd
        x_ = (x_ - mean) * rstd  # not 0 beyond D, but dy is
        if PER_TOKEN:
            store_row(dmod_ptr + row * D, dy * x, dy_ * x_, D, HEAD, TAIL)
        else:
            dscale += dy * x
            dscale_ += dy_ * x_
            dshift += dy
            dshift_ += dy_
        dy = dy * (1.0 + scale)
        dy_ = dy_ * (1.0 + scale_)
        along = (tl.sum(dy * x, 0) + tl.sum(dy_ * x_, 0)) / D
        across = (tl.sum(dy, 0) + tl.sum(dy_, 0)) / D
        dx = (dy - across - x * along) * rstd
        dx_ = (dy_ - across - x_ * along) * rstd
        if GATED:
            more, more_ = load_row(dx1_ptr + row * D, D, HEAD, TAIL)
            h, h_ = load_row(h_ptr + row * D, D, HEAD, TAIL)
            gate, gate_ = load_row(gate_ptr + b * gate_b + t * gate_t, D, HEAD, TAIL)
            dx += more
            dx_ += more_
            store_row(dh_ptr + row * D, dx * gate, dx_ * gate_, D, HEAD, TAIL)
            if PER_TOKEN:
                all_rows = tl.num_programs(0).to(tl.int64) // slices * T
                store_row(dmod_ptr + (all_rows + row) * D, dx * h, dx_ * h_, D, HEAD, TAIL)
            else:
                dgate += dx * h
                dgate_ += dx_ * h_
        store_row(dx_ptr + row * D, dx, dx_, D, HEAD, TAIL)
    if not PER_TOKEN:
        plane = tl.num_programs(0).to(tl.int64) * D
        here = dmod_ptr + pid * D
        store_row(here, dscale, dscale_, D, HEAD, TAIL)
        if GATED:
            store_row(here + plane, dgate, dgate_, D, HEAD, TAIL)
            store_row(here + 2 * plane, dshift, dshift_, D, HEAD, TAIL)
        else:
            store_row(here + plane, dshift, dshift_, D, HEAD, TAIL)


def _run_forward(
    x: Tensor, h: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x1, y, mean, rstd); x1 is x where there is no gate."""
    B, T, D = x.shape
    x = x.contiguous()
    h = x if h is None else h.contiguous()
    x1 = x if gate is None else torch.empty_like(x)
    y = torch.empty_like(x)
    mean_BT = torch.empty(B, T, dtype=torch.float32, device=x.device)
    rstd_BT = torch.empty_like(mean_BT)
    if y.numel():
        with on(x):
            _forward[(B * T,)](
                x, h, shift if gate is None else gate, shift, scale, x1, y, mean_BT, rstd_BT,
                T, *strides(gate), *strides(shift), *strides(scale), eps,
                GATED=gate is not None, **FORWARD.config(D),
            )  # fmt: skip
    return x1, y, mean_BT, rstd_BT


def _run_backward(
    dy: Tensor, dx1: Tensor | None, x1: Tensor, h: Tensor | None, gate: Tensor | None,
    scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dh, dmod): dmod [2 or 3, B, D] is d scale, d gate, d shift; per token [1 or 2, B, T, D] without d shift."""
    B, T, D = x1.shape
    gated, per_token = gate is not None, scale.ndim == 3
    dy, x1 = dy.contiguous(), x1.contiguous()
    dx1 = dy if dx1 is None else dx1.contiguous()
    h = x1 if h is None else h.contiguous()
    dx = torch.empty_like(x1)
    dh = torch.empty_like(h) if gated else dx.new_empty(0)
    slices = triton.cdiv(T, SLICE)
    if per_token:
        dmod = torch.empty(1 + gated, B, T, D, dtype=scale.dtype, device=x1.device)
    else:
        dmod = torch.empty(2 + gated, B, slices, D, dtype=torch.float32, device=x1.device)
    with on(x1):
        if x1.numel():
            _backward[(B * slices,)](
                dy, dx1, x1, h, scale if gate is None else gate, scale, mean_BT, rstd_BT, dx, dh, dmod,
                T, slices, *strides(gate), *strides(scale),
                GATED=gated, PER_TOKEN=per_token, SLICE=SLICE, STAGES=STAGES, **BACKWARD[gated].config(D),
            )  # fmt: skip
        if not per_token:
            dmod = sum_slices(dmod, scale.dtype) if x1.numel() else dmod.new_zeros(2 + gated, B, D, dtype=scale.dtype)
    return dx, dh, dmod


def _planes(scale: Tensor, gated: bool) -> list[int]:
    return [(1 if scale.ndim == 3 else 2) + gated, *scale.shape]


@torch.library.custom_op("g3n::adaln_modulate", mutates_args=())
def _adaln(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _run_forward(x_BTD, None, None, shift, scale, eps)[1:]


@_adaln.register_fake
def _(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean_BT = x_BTD.new_empty(x_BTD.shape[:2], dtype=torch.float32)
    return x_BTD.new_empty(x_BTD.shape), mean_BT, torch.empty_like(mean_BT)


@torch.library.custom_op("g3n::adaln_modulate_backward", mutates_args=())
def _adaln_backward(
    dy_BTD: Tensor, x_BTD: Tensor, scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor
) -> tuple[Tensor, Tensor]:
    dx, _, dmod = _run_backward(dy_BTD, None, x_BTD, None, None, scale, mean_BT, rstd_BT)
    return dx, dmod


@_adaln_backward.register_fake
def _(dy_BTD: Tensor, x_BTD: Tensor, scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor) -> tuple[Tensor, Tensor]:
    return x_BTD.new_empty(x_BTD.shape), scale.new_empty(_planes(scale, False))


def _adaln_setup(ctx, inputs, output) -> None:
    x_BTD, _shift, scale, _eps = inputs
    _y, mean_BT, rstd_BT = output
    ctx.mark_non_differentiable(mean_BT, rstd_BT)
    ctx.save_for_backward(x_BTD, scale, mean_BT, rstd_BT)


def _adaln_gradient(ctx, dy_BTD: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x_BTD, scale, mean_BT, rstd_BT = ctx.saved_tensors
    dx_BTD, dmod = _adaln_backward(dy_BTD, x_BTD, scale, mean_BT, rstd_BT)
    return dx_BTD, dy_BTD.to(scale.dtype) if scale.ndim == 3 else dmod[-1], dmod[0], None


_adaln.register_autograd(_adaln_gradient, setup_context=_adaln_setup)


@torch.library.custom_op("g3n::gate_residual_adaln", mutates_args=())
def _gated(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run_forward(x_BTD, h_BTD, gate, shift, scale, eps)


@_gated.register_fake
def _(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean_BT = x_BTD.new_empty(x_BTD.shape[:2], dtype=torch.float32)
    return x_BTD.new_empty(x_BTD.shape), x_BTD.new_empty(x_BTD.shape), mean_BT, torch.empty_like(mean_BT)


@torch.library.custom_op("g3n::gate_residual_adaln_backward", mutates_args=())
def _gated_backward(
    dx1_BTD: Tensor, dy_BTD: Tensor, x1_BTD: Tensor, h_BTD: Tensor, gate: Tensor,
    scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _run_backward(dy_BTD, dx1_BTD, x1_BTD, h_BTD, gate, scale, mean_BT, rstd_BT)


@_gated_backward.register_fake
def _(
    dx1_BTD: Tensor, dy_BTD: Tensor, x1_BTD: Tensor, h_BTD: Tensor, gate: Tensor,
    scale: Tensor, mean_BT: Tensor, rstd_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return x1_BTD.new_empty(x1_BTD.shape), h_BTD.new_empty(h_BTD.shape), scale.new_empty(_planes(scale, True))


def _gated_setup(ctx, inputs, output) -> None:
    _x, h_BTD, gate, _shift, scale, _eps = inputs
    x1_BTD, _y, mean_BT, rstd_BT = output
    ctx.mark_non_differentiable(mean_BT, rstd_BT)
    ctx.save_for_backward(x1_BTD, h_BTD, gate, scale, mean_BT, rstd_BT)


def _gated_gradient(ctx, dx1_BTD: Tensor, dy_BTD: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x1_BTD, h_BTD, gate, scale, mean_BT, rstd_BT = ctx.saved_tensors
    dx, dh, dmod = _gated_backward(dx1_BTD, dy_BTD, x1_BTD, h_BTD, gate, scale, mean_BT, rstd_BT)
    return dx, dh, dmod[1], dy_BTD.to(scale.dtype) if scale.ndim == 3 else dmod[2], dmod[0], None


_gated.register_autograd(_gated_gradient, setup_context=_gated_setup)


def adaln_modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """As ``reference.adaln_modulate``."""
    shift, scale = fit(x_BTD, shift, scale)
    y_BTD: Tensor = _adaln(x_BTD, shift, scale, eps)[0]
    return y_BTD


def gate_residual_adaln(
    x_BTD: Tensor, h_BTD: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As ``reference.gate_residual_adaln``."""
    gate, shift, scale = fit(x_BTD, gate, shift, scale)
    x1_BTD, y_BTD, _, _ = _gated(x_BTD, h_BTD, gate, shift, scale, eps)
    return x1_BTD, y_BTD
