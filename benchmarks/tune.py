"""Sweeps the constants of the kernels that decide about speed alone, on a GPU: ``python -m benchmarks.tune``.

A candidate is set as the module's constant, its outputs and gradients are compared with the reference in float64 (one
that errs is named and dropped), and it is timed with the L2 cache flushed. Prints each sweep with the best first and
writes ``tune.csv``; what wins is set by hand in kernels/, because a constant is the same on every GPU. Exits 2
without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import OPS, PATCH, VOLUME, Case, Exact, call_of, patch_cases
from benchmarks.measure import Deadline, copy_bandwidth, in_words, quick_seconds, write_rows

SHAPES = ((16, 1200, 1152), (4, 1200, 768))
LANES = (4, 8, 16, 32)
REGISTERS = (64, 96, 128, 168, 255)
STAGES = (1, 2, 3)
SLICES = (8, 16, 32)
BLOCKS = (1024, 2048, 4096)
WARPS = (2, 4, 8, 16)
KEPT = 3  # tiles that go on from the first sweep of the backward to the one of stages and slices
# ||error|| / ||exact||: two roundings of the type, so that a wrong kernel is told from a rounded one
TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


@dataclass(frozen=True)
class Candidate:
    """Values of module constants, as (module, name) -> value, and how they are printed."""

    text: str
    values: dict[tuple[Any, str], Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        before = {(module, name): getattr(module, name) for module, name in self.values}
        try:
            for (module, name), value in self.values.items():
                setattr(module, name, value)
            yield
        finally:
            for (module, name), value in before.items():
                setattr(module, name, value)


def try_one(case: Case, pass_: str, candidate: Candidate, tensors: list[torch.Tensor], exact: Exact) -> dict[str, Any]:
    """The row of a candidate. Raises ValueError where it errs."""
    op = OPS[case.op]
    with candidate.set():
        error = exact.error("g3n", op.ours, pass_)
        if not error <= TOLERANCE[case.dtype]:
            raise ValueError(f"errs by {error:.2e}")
        median, low, high = quick_seconds(call_of(case, op.ours, tensors, pass_))
    moved = op.count(case, pass_)
    return {
        "op": case.op,
        "pass": pass_,
        "dtype": str(case.dtype).removeprefix("torch."),
        "B": case.B,
        "T": case.T,
        "D": case.D,
        "option": case.option,
        "candidate": candidate.text,
        "ms": f"{1e3 * median:.5f}",
        "ms_20": f"{1e3 * low:.5f}",
        "ms_80": f"{1e3 * high:.5f}",
        "bytes": moved,
        "share_of_copy": f"{moved / median / copy_bandwidth():.4f}",
        "error": f"{error:.3e}",
    }


def sweep(case: Case, pass_: str, candidates: Sequence[Candidate], deadline: Deadline) -> list[tuple[Candidate, dict]]:
    """Candidates that are right with their rows, fastest first, printed; those after the deadline are counted."""
    if not candidates:
        return []
    torch.manual_seed(0)
    tensors = OPS[case.op].draw(case)
    exact = Exact(case, tensors)
    found, left = [], 0
    for candidate in candidates:
        if deadline.passed():
            left += 1
            continue
        try:
            found.append((candidate, try_one(case, pass_, candidate, tensors, exact)))
        except Exception as error:
            print(f"{case} {pass_}: {candidate.text} dropped, {in_words(error)}", flush=True)
    found.sort(key=lambda pair: float(pair[1]["ms"]))
    print(f"\n{case} {pass_}" + (f", {left} candidates left untried" if left else ""))
    for _, row in found:
        print(
            f"  {float(row['ms']):9.4f} ms  {float(row['share_of_copy']):6.1%} of copy  {row['candidate']}", flush=True
        )
    return found


def forward_tiles() -> list[Candidate]:
    from kernels import adaln
    from kernels.rows import Tile

    return [
        Candidate(f"lanes {lanes} registers {registers}", {(adaln, "FORWARD"): Tile(lanes, registers)})
        for lanes, registers in itertools.product(LANES, REGISTERS)
    ]


def backward_tiles(gated: bool) -> list[Candidate]:
    from kernels import adaln
    from kernels.rows import Tile

    return [
        Candidate(
            f"lanes {lanes} registers {registers}",
            {(adaln, "BACKWARD"): {**adaln.BACKWARD, gated: Tile(lanes, registers)}},
        )
        for lanes, registers in itertools.product(LANES, REGISTERS)
    ]


def with_stages(tiles: Sequence[Candidate]) -> list[Candidate]:
    from kernels import adaln

    return [
        Candidate(
            f"{tile.text} stages {stages} slice {tokens}",
            {**tile.values, (adaln, "STAGES"): stages, (adaln, "SLICE"): tokens},
        )
        for tile, stages, tokens in itertools.product(tiles, STAGES, SLICES)
    ]


def blocks() -> list[Candidate]:
    from kernels import patchify

    return [Candidate(f"block {block}", {(patchify, "MAX_BLOCK"): block}) for block in BLOCKS]


def warps() -> list[Candidate]:
    from kernels import masked_loss

    config = masked_loss.config

    def fixed(count: int) -> Callable[[int], dict[str, int]]:
        return lambda patch: {**config(patch), "num_warps": count}

    return [Candidate(f"warps {count}", {(masked_loss, "config"): fixed(count)}) for count in WARPS]


def rows_of(found: Sequence[tuple[Candidate, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [row for _, row in found]


def sweeps(cases: Sequence[Case], patches: Sequence[Case], deadline: Deadline) -> Iterator[list[dict[str, Any]]]:
    """Rows of one sweep after the other; a sweep that has no time left yields none."""
    for case in cases:
        yield rows_of(sweep(case, "forward", forward_tiles(), deadline))
        found = sweep(case, "backward", backward_tiles(case.op == "gate_residual_adaln"), deadline)
        yield rows_of(found)
        yield rows_of(sweep(case, "backward", with_stages([c for c, _ in found[:KEPT]]), deadline))
        if case is cases[0]:
            for other in patches:
                yield rows_of(
                    sweep(other, "forward", warps() if other.op == "masked_patch_loss" else blocks(), deadline)
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4, help="no candidate is tried after these; default 4")
    parser.add_argument("--output", type=Path, help="folder of tune.csv; default benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning needs a GPU: nothing was run")
        return 2
    cases = [
        Case(op, *shape, torch.bfloat16, "sample")
        for shape in SHAPES
        for op in ("gate_residual_adaln", "adaln_modulate")
    ]
    patches = patch_cases(16, VOLUME, PATCH, torch.bfloat16)
    for rows in sweeps(cases, patches, Deadline(args.minutes)):
        if rows:
            print(write_rows("tune", rows, args.output), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
