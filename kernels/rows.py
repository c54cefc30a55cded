"""Tiles of rows of any width: the part that adaLN and gating share.

A row of width D is two blocks, HEAD (a power of two below D) and TAIL (the rest, rounded up): 1152 = 1024 + 128 and
768 = 512 + 256 waste no lane, where one power of two would waste 44 % and 25 %. A program holds ROWS tokens of one sample, so
that what is shared by a sample is read once for all of them.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_rows(ptr, rows, keep, stride, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Rows as float32 tiles [ROWS, HEAD] and [ROWS, TAIL]; what lies outside is 0."""
    at = ptr + rows[:, None] * stride
    head = tl.arange(0, HEAD)[None, :]
    tail = HEAD + tl.arange(0, TAIL)[None, :]
    inside = keep[:, None] if HEAD + TAIL == D else keep[:, None] & (tail < D)
    a = tl.load(at + head, mask=keep[:, None], other=0.0)
    b = tl.load(at + tail, mask=inside, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_rows(ptr, rows, keep, stride, a, b, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The way back, rounded to the pointer's type."""
    at = ptr + rows[:, None] * stride
    head = tl.arange(0, HEAD)[None, :]
    tail = HEAD + tl.arange(0, TAIL)[None, :]
    inside = keep[:, None] if HEAD + TAIL == D else keep[:, None] & (tail < D)
    tl.store(at + head, a.to(ptr.dtype.element_ty), mask=keep[:, None])
    tl.store(at + tail, b.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_modulation(
    ptr, b, t, keep, stride_b, stride_t,
    PER_TOKEN: tl.constexpr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Shift, scale or gate for the tokens ``t`` of sample ``b``: a row a token, or one row [1, ...] for all of them."""
    if PER_TOKEN:
        return load_rows(ptr + b * stride_b, t, keep, stride_t, D, HEAD, TAIL)
    else:
        one = tl.arange(0, 1).to(tl.int64)
        return load_rows(ptr + b * stride_b, one, one == 0, 0, D, HEAD, TAIL)


@triton.jit
def store_sum(ptr, a, b, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Sum a tile over its rows into one float32 row."""
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    tl.store(ptr + head, tl.sum(a, 0))
    if HEAD + TAIL == D:
        tl.store(ptr + tail, tl.sum(b, 0))
    else:
        tl.store(ptr + tail, tl.sum(b, 0), mask=tail < D)


@triton.jit
def _sum_slices(parts_ptr, out_ptr, S, D, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """parts [N, S, D] float32 -> out [N, D]: slices are added in the order in which they lie, never by atomics."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, AT_ONCE)
    total = tl.zeros([AT_ONCE, BLOCK], tl.float32)
    for first in range(0, S, AT_ONCE):
        here = (first + s)[:, None]
        inside = (here < S) & (d < D)[None, :]
        total += tl.load(parts_ptr + (n * S + here) * D + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + n * D + d, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=d < D)


SUM = {"AT_ONCE": 8, "BLOCK": 128, "num_warps": 4}


def sum_slices(parts_NBSD: Tensor, dtype: torch.dtype) -> Tensor:
    """Second stage of a sum over tokens: float32 [N, B, S, D] -> [N, B, D]."""
    N, B, S, D = parts_NBSD.shape
    out_NBD = torch.empty(N, B, D, dtype=dtype, device=parts_NBSD.device)
    _sum_slices[(N * B, triton.cdiv(D, SUM["BLOCK"]))](parts_NBSD, out_NBD, S, D, **SUM)
    return out_NBD


def blocks(D: int) -> dict[str, int]:
    """D with its HEAD and TAIL; a power of two is two halves."""
    head = 1 << max((D - 1).bit_length() - 1, 0)
    return {"D": D, "HEAD": head, "TAIL": triton.next_power_of_2(max(D - head, 1))}


def strides(m: Tensor | None) -> tuple[int, int]:
    """Step to the next sample and to the next token of a shift, scale or gate."""
    if m is None:
        return 0, 0
    return (m.stride(0), 0) if m.ndim == 2 else (m.stride(0), m.stride(1))


def fit(x_BTD: Tensor, *modulations: Tensor) -> list[Tensor]:
    """All [B, D], or all [B, T, D] where one of them is; one dtype, last axis dense."""
    B, T, D = x_BTD.shape
    per_token = any(m.ndim == 3 for m in modulations)
    dtype = modulations[0].dtype
    for m in modulations[1:]:
        dtype = torch.promote_types(dtype, m.dtype)
    fitted = []
    for m in modulations:
        m = (m[:, None].expand(B, T, D) if per_token and m.ndim == 2 else m).to(dtype)
        fitted.append(m if m.stride(-1) == 1 else m.contiguous())
    return fitted


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
