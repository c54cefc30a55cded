"""Triton gated residual, x + gate * h: the last step of a block, where no norm follows. The gradient of x is that of the sum itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adaln import BACKWARD, FORWARD, SLICE
from kernels.rows import fit, load_row, on, store_row, strides, sum_slices


@triton.jit
def _forward(
    x_ptr, h_ptr, gate_ptr, x1_ptr, T, gate_b, gate_t, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x, x_ = load_row(x_ptr + row * D, D, HEAD, TAIL)
    h, h_ = load_row(h_ptr + row * D, D, HEAD, TAIL)
    gate, gate_ = load_row(gate_ptr + row // T * gate_b + row % T * gate_t, D, HEAD, TAIL)
    store_row(x1_ptr + row * D, x + gate * h, x_ + gate_ * h_, D, HEAD, TAIL)


@triton.jit
def _backward(
    d_ptr, h_ptr, gate_ptr, dh_ptr, dgate_ptr, T, slices, gate_b, gate_t,
    PER_TOKEN: tl.constexpr, SLICE: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """A program takes SLICE tokens of one sample; dgate is [B, slices, D] of sums, or [B, T, D] where PER_TOKEN."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // slices
    first = pid % slices * SLICE
    if not PER_TOKEN:
        dgate = tl.zeros([HEAD], tl.float32)
        dgate_ = tl.zeros([TAIL], tl.float32)
    for t in range(first, tl.minimum(first + SLICE, T)):
        row = b * T + t
        d, d_ = load_row(d_ptr + row * D, D, HEAD, TAIL)
        h, h_ = load_row(h_ptr + row * D, D, HEAD, TAIL)
        gate, gate_ = load_row(gate_ptr + b * gate_b + t * gate_t, D, HEAD, TAIL)
        store_row(dh_ptr + row * D, d * gate, d_ * gate_, D, HEAD, TAIL)
        if PER_TOKEN:
            store_row(dgate_ptr + row * D, d * h, d_ * h_, D, HEAD, TAIL)
        else:
            dgate += d * h
            dgate_ += d_ * h_
    if not PER_TOKEN:
        store_row(dgate_ptr + pid * D, dgate, dgate_, D, HEAD, TAIL)


@torch.library.custom_op("g3n::gate_residual", mutates_args=())
def _gate(x_BTD: Tensor, h_BTD: Tensor, gate: Tensor) -> Tensor:
    B, T, D = x_BTD.shape
    x, h = x_BTD.contiguous(), h_BTD.contiguous()
    x1 = torch.empty_like(x)
    if x1.numel():
        with on(x):
            _forward[(B * T,)](x, h, gate, x1, T, *strides(gate), **FORWARD.config(D))
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
            d,
            h,
            gate,
            dh,
            dgate,
            T,
            slices,
            *strides(gate),
            PER_TOKEN=per_token,
            SLICE=SLICE,
            **BACKWARD[False].config(D),
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
