"""Attention backends and ``auto`` against float64 math: ``python -m benchmarks.attention``.

Cases run by importance until --minutes are used up. A forward counts 4 B H T^2 K floating point operations, a
backward 2.5 times as many. error is ||out - exact|| / ||exact|| on the first sample, of the gradient where it is
largest. Rows of ``auto`` name what it chose and how many percent it took longer than the fastest backend of the same
run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Deadline, device, in_words, quick_seconds, relative_error, write_rows
from kernels.attention import BACKENDS, attention, chosen, obstacles

WIDTH = 1152
HEAD_WIDTHS = (72, 64, 96, 128)
TOKENS = (1200, 1201, 360)  # 1201: one more for the class
BATCHES = (16, 4, 64, 1)


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    H: int
    K: int
    dtype: torch.dtype

    def flop(self, pass_: str) -> float:
        return 4 * self.B * self.H * self.T**2 * self.K * (2.5 if pass_ == "backward" else 1)

    def draw(self) -> list[Tensor]:
        torch.manual_seed(0)
        shape = (self.B, self.T, self.H, self.K)
        return [torch.randn(shape, device=device(), dtype=self.dtype) for _ in range(3)]


def cases(small: bool) -> list[Case]:
    """The most important ones first."""
    if small or device() == "cpu":
        return [Case(2, T, 4, 48, torch.float32) for T in (150, 151)]
    order = [(16, T, K) for T in TOKENS for K in HEAD_WIDTHS]
    order += [(B, T, K) for B in BATCHES[1:] for T in TOKENS for K in HEAD_WIDTHS]
    return [Case(B, T, WIDTH // K, K, torch.bfloat16) for B, T, K in order]


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2)


def call_of(function: Callable[..., Tensor], tensors: Sequence[Tensor], pass_: str) -> Callable[[], list[Tensor]]:
    """The output without a graph, or the gradients of one forward that was done before."""
    leaves = [t.detach().requires_grad_(pass_ == "backward") for t in tensors]
    out = function(*leaves)
    if pass_ == "forward":
        return lambda: [function(*leaves)]
    down = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1)).to(out.dtype)
    return lambda: list(torch.autograd.grad(out, leaves, down, retain_graph=True))


def measure(case: Case, pass_: str, backend: str, tensors: list[Tensor], exact: list[Tensor]) -> list[dict[str, Any]]:
    """Rows of one backend, cache flushed and not."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, backend)

    call = call_of(function, tensors, pass_)
    error = relative_error([t[:1].detach() for t in call()], exact)
    took = ""
    if backend == "auto":
        took = chosen(*(t.detach().requires_grad_(pass_ == "backward") for t in tensors), "auto")[0]
    rows = []
    for flush in (True, False) if device() == "cuda" else ("",):
        median, low, high = quick_seconds(call, bool(flush))
        speed = case.flop(pass_) / median / 1e12
        rows.append(
            {
                "backend": backend,
                "chosen": took,
                "pass": pass_,
                "dtype": str(case.dtype).removeprefix("torch."),
                "B": case.B,
                "T": case.T,
                "H": case.H,
                "K": case.K,
                "flush": flush,
                "ms": f"{1e3 * median:.5f}",
                "ms_20": f"{1e3 * low:.5f}",
                "ms_80": f"{1e3 * high:.5f}",
                "tflop_per_s": f"{speed:.3f}",
                "error": f"{error:.3e}",
                "behind_best_percent": "",
            }
        )
        shape = f"{case.B}x{case.T}x{case.H}x{case.K}"
        state = {True: "flushed", False: "warm", "": ""}[flush]
        print(
            f"{shape:16s} {pass_:9s} {backend:15s} {took:14s} {state:7s} {1e3 * median:9.4f} ms  {speed:7.2f} TFLOP/s",
            flush=True,
        )
    return rows


def exact_first(case: Case, pass_: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The first sample in float64, under the first sample of what ``call_of`` draws for the whole batch."""
    first = [t[:1].double().requires_grad_(pass_ == "backward") for t in tensors]
    out = exact_attention(*first)
    if pass_ == "forward":
        return [out.detach()]
    whole = (case.B, *out.shape[1:])
    down = torch.randn(whole, device=out.device, generator=torch.Generator(out.device).manual_seed(1))[:1]
    return list(torch.autograd.grad(out, first, down.to(case.dtype).double()))


def measure_case(case: Case, backends: Sequence[str]) -> list[dict[str, Any]]:
    """All rows of a case; what fails is a printed line."""
    tensors = case.draw()
    rows: list[dict[str, Any]] = []
    for pass_ in ("forward", "backward"):
        exact = exact_first(case, pass_, tensors)
        for backend in backends:
            try:
                rows += measure(case, pass_, backend, tensors, exact)
            except Exception as error:
                print(f"{case.B}x{case.T}x{case.H}x{case.K} {pass_} {backend}: failed, {in_words(error)}", flush=True)
                if device() == "cuda":
                    torch.cuda.empty_cache()
    for row in rows:
        if row["backend"] == "auto":
            others = [
                float(r["ms"])
                for r in rows
                if r["backend"] != "auto" and (r["pass"], r["flush"]) == (row["pass"], row["flush"])
            ]
            row["behind_best_percent"] = f"{100 * (float(row['ms']) / min(others) - 1):.2f}" if others else ""
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.5, help="no new case is started after these; default 2.5")
    parser.add_argument("--small", action="store_true", help="sizes for a laptop; always so without a GPU")
    parser.add_argument("--output", type=Path, help="folder of attention.csv; default benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    deadline = Deadline(args.minutes)
    why_not = obstacles()
    for name, reason in why_not.items():
        if reason:
            print(f"{name}: {reason}")
    backends = ["auto", *(name for name in BACKENDS if not why_not[name])]
    todo = cases(args.small)
    while todo and not deadline.passed():
        if rows := measure_case(todo.pop(0), backends):
            print(write_rows("attention", rows, args.output), flush=True)
    print(f"{len(todo)} cases left unmeasured after {args.minutes:g} minutes" if todo else "all cases measured")


if __name__ == "__main__":
    main()
