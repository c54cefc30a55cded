"""Triton gated residual, x + gate * h: the last step of a block, where no norm follows. The gradient of x is that of the sum itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adaln import SLICE
from kernels.rows import blocks, fit, load_modulation, load_rows, on, store_rows, store_sum, strides, sum_slices


def config(D: int) -> dict[str, int]:
    """Tile of both kernels for a width."""
    b = blocks(D)
    return {**b, "ROWS": 4, "num_warps": min(max(b["HEAD"] // 128, 1), 8)}


@triton.jit
def _forward(
    x_ptr, h_ptr, gate_ptr, x1_ptr, T, gate_b, gate_t,
    PER_TOKEN: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, ROWS)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    keep = t < T
    rows = b * T + t
    x, x_ = load_rows(x_ptr, rows, keep, D, D, HEAD, TAIL)
    h, h_ = load_rows(h_ptr, rows, keep, D, D, HEAD, TAIL)
    gate, gate_ = load_modulation(gate_ptr, b, t, keep, gate_b, gate_t, PER_TOKEN, D, HEAD, TAIL)
    store_rows(x1_ptr, rows, keep, D, x + gate * h, x_ + gate_ * h_, D, HEAD, TAIL)


@triton.jit
def _backward(
    d_ptr, h_ptr, gate_ptr, dh_ptr, dgate_ptr, T, slices, gate_b, gate_t,
    PER_TOKEN: tl.constexpr, SLICE: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    first = pid % slices * SLICE
    if not PER_TOKEN:
        gate, gate_ = load_modulation(gate_ptr, b, 0, 0, gate_b, gate_t, False, D, HEAD, TAIL)
        dgate = tl.zeros([ROWS, HEAD], tl.float32)
        dgate_ = tl.zeros([ROWS, TAIL], tl.float32)
    for step in range(0, SLICE, ROWS):
        t = first + step + tl.arange(0, ROWS)
        keep = t < T
        rows = b * T + t
        d, d_ = load_rows(d_ptr, rows, keep, D, D, HEAD, TAIL)
        h, h_ = load_rows(h_ptr, rows, keep, D, D, HEAD, TAIL)
        if PER_TOKEN:
            gate, gate_ = load_modulation(gate_ptr, b, t, keep, gate_b, gate_t, True, D, HEAD, TAIL)
            store_rows(dgate_ptr, rows, keep, D, d * h, d_ * h_, D, HEAD, TAIL)
        else:
            dgate += d * h
            dgate_ += d_ * h_
        store_rows(dh_ptr, rows, keep, D, d * gate, d_ * gate_, D, HEAD, TAIL)
    if not PER_TOKEN:
        store_sum(dgate_ptr + pid * D, dgate, dgate_, D, HEAD, TAIL)


@torch.library.custom_op("g3n::gate_residual", mutates_args=())
def _gate(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    B, T, D = x_BTD.shape
    x, h = x_BTD.contiguous(), h_BTD.contiguous()
    x1 = torch.empty_like(x)
    if x1.numel():
        tile = config(D)
        with on(x):
            _forward[(B * triton.cdiv(T, tile["ROWS"]),)](
                x, h, gate, x1, T, *strides(gate), PER_TOKEN=gate.ndim == 3, **tile
            )
    return x1


@_gate.register_fake
def _(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    return x_BTD.new_empty(x_BTD.shape)


@torch.library.custom_op("g3n::gate_residual_backward", mutates_args=())
def _gate_backward(d_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    B, T, D = h_BTD.shape
    per_token, slices = gate.ndim == 3, triton.cdiv(T, SLICE)
    d, h = d_BTD.contiguous(), h_BTD.contiguous()
    dh = torch.empty_like(h)
    if not h.numel():
        return dh, gate.new_zeros(gate.shape)
    if per_token:
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    else:
        dgate = torch.empty(1, B, slices, D, dtype=torch.float32, device=gate.device)
    with on(h):
        _backward[(B * slices,)](
            d, h, gate, dh, dgate, T, slices, *strides(gate), PER_TOKEN=per_token, SLICE=SLICE, **config(D)
        )
        return dh, dgate if per_token else sum_slices(dgate, gate.dtype)[0]


@_gate_backward.register_fake
def _(d_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return h_BTD.new_empty(h_BTD.shape), gate.new_empty(gate.shape)


def _setup(ctx, inputs, output) -> None:
    _x, h_BTD, gate = inputs
    ctx.save_for_backward(h_BTD, gate)


def _gradient(ctx, d_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (d_BTD, *_gate_backward(d_BTD, *ctx.saved_tensors))


_gate.register_autograd(_gradient, setup_context=_setup)


def gate_residual(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    """As ``reference.gate_residual``."""
    x1_BTD: Tensor = _gate(x_BTD, h_BTD, *fit(x_BTD, gate))
    return x1_BTD
