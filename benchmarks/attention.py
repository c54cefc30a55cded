"""Attention backends against fp32 math: ``python -m benchmarks.attention``. Speed and largest error of each in one run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.measure import seconds, write_rows
from g3n import ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of attention.csv; default benchmarks/results/<device>")
    parser.add_argument("--small", action="store_true", help="a size for a laptop")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [(2, 150, 4, 48)] if args.small else [(16, 1200, 16, 72), (16, 1200, 18, 64), (16, 1200, 12, 96)]
    rows = []
    for shape in shapes:
        q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
        os.environ["G3N_ATTENTION"] = "math"
        exact = ops.attention(q.float(), k.float(), v.float())
        slowest, *_ = seconds(lambda: ops.attention(q, k, v))  # noqa: B023
        for name, why_not in ops.attention_backends().items():
            if why_not:
                print(f"{name}: {why_not}")
                continue
            os.environ["G3N_ATTENTION"] = name
            error = float((ops.attention(q, k, v).float() - exact).abs().max())
            median, low, high = seconds(lambda: ops.attention(q, k, v))  # noqa: B023
            rows.append(
                {"backend": name, "shape_BTHK": "x".join(map(str, shape)), "ms": round(1e3 * median, 4),
                 "ms_20": round(1e3 * low, 4), "ms_80": round(1e3 * high, 4),
                 "speedup_over_math": round(slowest / median, 3), "max_error": f"{error:.2e}"}
            )  # fmt: skip
            print(f"{name:9s} {shape}  {1e3 * median:9.3f} ms  x{slowest / median:.2f} of math  max error {error:.1e}")
    print(write_rows("attention", rows, args.output))


if __name__ == "__main__":
    main()
