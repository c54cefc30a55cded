"""Rows of any width in registers: the part that adaLN and gating share.

A row of width D is two blocks, HEAD (a power of two below D) and TAIL (the rest, rounded up): 1152 = 1024 + 128 and
768 = 512 + 256 waste no lane, where one power of two would waste 44 % and 25 %.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_row(ptr, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A row as float32 blocks [HEAD] and [TAIL]; lanes beyond D are 0."""
    tail = HEAD + tl.arange(0, TAIL)
    a = tl.load(ptr + tl.arange(0, HEAD))
    b = tl.load(ptr + tail) if HEAD + TAIL == D else tl.load(ptr + tail, mask=tail < D, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def store_row(ptr, a, b, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The way back, rounded to the pointer's type."""
    tail = HEAD + tl.arange(0, TAIL)
    tl.store(ptr + tl.arange(0, HEAD), a.to(ptr.dtype.element_ty))
    if HEAD + TAIL == D:
        tl.store(ptr + tail, b.to(ptr.dtype.element_ty))
    else:
        tl.store(ptr + tail, b.to(ptr.dtype.element_ty), mask=tail < D)


@triton.jit
def outside_zero(b, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The TAIL block with 0 beyond D, where arithmetic has put something else."""
    return b if HEAD + TAIL == D else tl.where(HEAD + tl.arange(0, TAIL) < D, b, 0.0)


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


@dataclass(frozen=True)
class Tile:
    """How a row lies in a program. Below 8 lanes a thread could not load 16 bytes of bf16 at a time."""

    lanes: int  # elements of HEAD that a thread holds: more of them are more bytes under way, and more registers
    registers: int  # allowed a thread; without the limit ptxas spills a few bytes to fit one program more

    def config(self, D: int) -> dict[str, int]:
        """Constants and options of a launch; a D that is a power of two is two halves."""
        head = 1 << max((D - 1).bit_length() - 1, 0)
        tail = triton.next_power_of_2(max(D - head, 1))
        warps = min(max(head // (32 * self.lanes), 1), 16)
        return {"D": D, "HEAD": head, "TAIL": tail, "num_warps": warps, "maxnreg": self.registers}


def strides(m: Tensor | None) -> tuple[int, int]:
    """Step to the next sample and to the next token of a shift, scale or gate; a token's step is 0 where all share one."""
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
