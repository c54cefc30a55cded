"""Timing and the CSV rows of all benchmarks."""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """The GPU's name, or cpu-<architecture>, as a folder name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"
    return name.lower().replace(" ", "-")


def seconds(call: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of one call's seconds; on a GPU by events with the L2 cache flushed between."""
    gpu = torch.cuda.is_available()
    flush = torch.empty(64 * 2**20 if gpu else 0, dtype=torch.int32, device="cuda" if gpu else "cpu")
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        if gpu:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    low, high = statistics.quantiles(times, n=5)[0], statistics.quantiles(times, n=5)[3]
    return statistics.median(times), low, high


def write_rows(name: str, rows: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """``results/<device>/<name>.csv``: the rows with device, torch version and date before each."""
    about = {"device": device_name(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}
    path = (folder or RESULTS / device_name()) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*about, *rows[0]])
        writer.writeheader()
        writer.writerows({**about, **row} for row in rows)
    return path
