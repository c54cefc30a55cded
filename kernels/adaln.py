"""Triton adaLN: LayerNorm without weights, times (1 + scale), plus shift; with or without a gated residual before it.

One kernel each way. Statistics and sums are float32; what the backward needs beyond its inputs is x1, mean and rstd. Gradients of
shift, scale and gate are sums over tokens: a program adds SLICE tokens of one sample in order, ``rows.sum_slices`` adds the
slices in order. No atomics: the same inputs give the same bits, on any GPU. docs/kernels.md has the count of bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import blocks, fit, load_modulation, load_rows, on, store_rows, store_sum, strides, sum_slices

SLICE = 16  # tokens that one program of the backward sums; a constant, so that sums have one order everywhere


def forward_config(D: int) -> dict[str, int]:
    """Tile of the forward for a width."""
    b = blocks(D)
    return {**b, "ROWS": 4, "num_warps": min(max(b["HEAD"] // 128, 1), 8)}


def backward_config(D: int, gated: bool) -> dict[str, int]:
    """Tile of the backward; a gated one holds twice as many rows in registers."""
    b = blocks(D)
    return {**b, "SLICE": SLICE, "ROWS": 1 if gated else 2, "num_warps": min(max(b["HEAD"] // 256, 1), 8)}


@triton.jit
def _forward(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, x1_ptr, y_ptr, mean_ptr, rstd_ptr,
    T, gate_b, gate_t, shift_b, shift_t, scale_b, scale_t, eps,
    GATED: tl.constexpr, PER_TOKEN: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keep = t < T
    rows = b * T + t
    x, x_ = load_rows(x_ptr, rows, keep, D, D, HEAD, TAIL)
    if GATED:
        h, h_ = load_rows(h_ptr, rows, keep, D, D, HEAD, TAIL)
        gate, gate_ = load_modulation(gate_ptr, b, t, keep, gate_b, gate_t, PER_TOKEN, D, HEAD, TAIL)
        # statistics of x1 as it is stored: the backward sees no other
        x = (x + gate * h).to(x1_ptr.dtype.element_ty).to(tl.float32)
        x_ = (x_ + gate_ * h_).to(x1_ptr.dtype.element_ty).to(tl.float32)
        store_rows(x1_ptr, rows, keep, D, x, x_, D, HEAD, TAIL)
    mean = (tl.sum(x, 1) + tl.sum(x_, 1)) / D
    x = x - mean[:, None]
    x_ = x_ - mean[:, None]
    if HEAD + TAIL != D:
        x_ = tl.where((HEAD + tl.arange(0, TAIL) < D)[None, :], x_, 0.0)
    rstd = 1.0 / tl.sqrt_rn((tl.sum(x * x, 1) + tl.sum(x_ * x_, 1)) / D + eps)
    tl.store(mean_ptr + rows, mean, mask=keep)
    tl.store(rstd_ptr + rows, rstd, mask=keep)
    scale, scale_ = load_modulation(scale_ptr, b, t, keep, scale_b, scale_t, PER_TOKEN, D, HEAD, TAIL)
    shift, shift_ = load_modulation(shift_ptr, b, t, keep, shift_b, shift_t, PER_TOKEN, D, HEAD, TAIL)
    y = x * rstd[:, None] * (1.0 + scale) + shift
    y_ = x_ * rstd[:, None] * (1.0 + scale_) + shift_
    store_rows(y_ptr, rows, keep, D, y, y_, D, HEAD, TAIL)


@triton.jit
def _backward(
    dy_ptr, dx1_ptr, x1_ptr, h_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dh_ptr, dmod_ptr,
    T, slices, gate_b, gate_t, scale_b, scale_t,
    GATED: tl.constexpr, PER_TOKEN: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dmod holds planes: d scale, d gate where GATED, d shift. Per sample they are sums [B, slices, D]; per token they are
    [B, T, D], and d shift, which is dy, is left out."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    first = pid % slices * SLICE
    plane = tl.num_programs(0).to(tl.int64) * D
    if not PER_TOKEN:
        scale, scale_ = load_modulation(scale_ptr, b, 0, 0, scale_b, scale_t, False, D, HEAD, TAIL)
        dscale = tl.zeros([ROWS, HEAD], tl.float32)
        dscale_ = tl.zeros([ROWS, TAIL], tl.float32)
        dshift = tl.zeros([ROWS, HEAD], tl.float32)
        dshift_ = tl.zeros([ROWS, TAIL], tl.float32)
        if GATED:
            gate, gate_ = load_modulation(gate_ptr, b, 0, 0, gate_b, gate_t, False, D, HEAD, TAIL)
            dgate = tl.zeros([ROWS, HEAD], tl.float32)
            dgate_ = tl.zeros([ROWS, TAIL], tl.float32)
    for step in range(0, SLICE, ROWS):
        t = first + step + tl.arange(0, ROWS)
        keep = t < T
        rows = b * T + t
        if PER_TOKEN:
            scale, scale_ = load_modulation(scale_ptr, b, t, keep, scale_b, scale_t, True, D, HEAD, TAIL)
        mean = tl.load(mean_ptr + rows, mask=keep, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=keep, other=0.0)[:, None]
        x, x_ = load_rows(x1_ptr, rows, keep, D, D, HEAD, TAIL)
        dy, dy_ = load_rows(dy_ptr, rows, keep, D, D, HEAD, TAIL)
        x = (x - mean) * rstd
        x_ = (x_ - mean) * rstd
        if HEAD + TAIL != D:
            x_ = tl.where((HEAD + tl.arange(0, TAIL) < D)[None, :], x_, 0.0)
        if PER_TOKEN:
            store_rows(dmod_ptr, rows, keep, D, dy * x, dy_ * x_, D, HEAD, TAIL)
        else:
            dscale += dy * x
            dscale_ += dy_ * x_
            dshift += dy
            dshift_ += dy_
        dy = dy * (1.0 + scale)
        dy_ = dy_ * (1.0 + scale_)
        along = ((tl.sum(dy * x, 1) + tl.sum(dy_ * x_, 1)) / D)[:, None]
        across = ((tl.sum(dy, 1) + tl.sum(dy_, 1)) / D)[:, None]
        dx = (dy - across - x * along) * rstd
        dx_ = (dy_ - across - x_ * along) * rstd
        if GATED:
            more, more_ = load_rows(dx1_ptr, rows, keep, D, D, HEAD, TAIL)
            dx += more
            dx_ += more_
            h, h_ = load_rows(h_ptr, rows, keep, D, D, HEAD, TAIL)
            if PER_TOKEN:
                gate, gate_ = load_modulation(gate_ptr, b, t, keep, gate_b, gate_t, True, D, HEAD, TAIL)
                every = tl.num_programs(0).to(tl.int64) // slices * T * D
                store_rows(dmod_ptr + every, rows, keep, D, dx * h, dx_ * h_, D, HEAD, TAIL)
            else:
                dgate += dx * h
                dgate_ += dx_ * h_
            store_rows(dh_ptr, rows, keep, D, dx * gate, dx_ * gate_, D, HEAD, TAIL)
        store_rows(dx_ptr, rows, keep, D, dx, dx_, D, HEAD, TAIL)
    if not PER_TOKEN:
        store_sum(dmod_ptr + pid * D, dscale, dscale_, D, HEAD, TAIL)
        if GATED:
            store_sum(dmod_ptr + plane + pid * D, dgate, dgate_, D, HEAD, TAIL)
            store_sum(dmod_ptr + 2 * plane + pid * D, dshift, dshift_, D, HEAD, TAIL)
        else:
            store_sum(dmod_ptr + plane + pid * D, dshift, dshift_, D, HEAD, TAIL)


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
        config = forward_config(D)
        with on(x):
            _forward[(B * triton.cdiv(T, config["ROWS"]),)](
                x, h, shift if gate is None else gate, shift, scale, x1, y, mean_BT, rstd_BT,
                T, *strides(gate), *strides(shift), *strides(scale), eps,
                GATED=gate is not None, PER_TOKEN=scale.ndim == 3, **config,
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
                GATED=gated, PER_TOKEN=per_token, **backward_config(D, gated),
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
