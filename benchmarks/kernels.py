"""Kernels against plain torch: ``python -m benchmarks.kernels``. Ratios of one run; bandwidth counts each tensor once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.measure import seconds, write_rows
from kernels import reference


def adaln_cases(
    batch: int, tokens: int, width: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[Any], Any]]:
    """Calls of an implementation (kernels or reference), forward and forward + backward."""
    x = torch.randn(batch, tokens, width, dtype=dtype, device=device, requires_grad=True)
    shift, scale = (torch.randn(batch, width, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn_like(x)

    def forward(module: Any) -> Tensor:
        with torch.no_grad():
            return module.adaln_modulate(x, shift, scale)

    def both(module: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module.adaln_modulate(x, shift, scale), (x, shift, scale), dy)

    return {"adaln_modulate forward": forward, "adaln_modulate forward+backward": both}


def patchify_cases(batch: int, side: int, patch: int, device: str) -> dict[str, Callable[[Any], Any]]:
    """Gather 30 % of the patches of int16 volumes, normalized; and the way back from patches to volumes."""
    volume = torch.randint(0, 3000, (batch, side, side, side), dtype=torch.int16, device=device)
    tokens = side // patch
    n = tokens**3
    index = torch.stack([torch.randperm(n, device=device)[: int(0.3 * n)] for _ in range(batch)])
    mean, rstd = torch.full((batch,), 1500.0, device=device), torch.full((batch,), 1e-3, device=device)
    patches = torch.randn(batch, n, patch**3, device=device)
    return {
        "patchify3d 30 %": lambda m: m.patchify3d(volume, patch, index, mean, rstd),
        "unpatchify3d": lambda m: m.unpatchify3d(patches, patch, (tokens, tokens, tokens)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of kernels.csv; default benchmarks/results/<device>")
    parser.add_argument("--small", action="store_true", help="a size for a laptop")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, tokens, width, side, patch = (2, 150, 192, 40, 8) if args.small else (16, 1200, 1152, 160, 16)
    cases = adaln_cases(batch, tokens, width, dtype, device) | patchify_cases(batch, side, patch, device)
    choice, reason = kernels.explain()
    print(f"kernels: {choice} ({reason})")
    rows = []
    for name, case in cases.items():
        ours, low, high = seconds(lambda: case(kernels))  # noqa: B023
        plain, *_ = seconds(lambda: case(reference))  # noqa: B023
        rows.append(
            {"op": name, "ours": choice, "batch": batch, "ms": round(1e3 * ours, 4), "ms_20": round(1e3 * low, 4),
             "ms_80": round(1e3 * high, 4), "reference_ms": round(1e3 * plain, 4), "speedup": round(plain / ours, 3)}
        )  # fmt: skip
        print(f"{name:34s} {1e3 * ours:9.3f} ms   reference {1e3 * plain:9.3f} ms   x{plain / ours:.2f}")
    print(write_rows("kernels", rows, args.output))


if __name__ == "__main__":
    main()
