"""Timing, ceilings and the CSV rows of all benchmarks."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FLUSH_BYTES = 2**28  # several times the largest L2 there is
HEAD_START_CYCLES = (
    600_000  # the device waits some 0.3 ms, so that the host has queued the whole call before its clock starts
)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU's name, or cpu-<architecture>, as a folder name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu-{platform.machine()}"
    return name.lower().replace(" ", "-")


def seconds(
    call: Callable[[], Any], repeats: int = 20, warmup: int = 3, flush: bool = True
) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of one call's seconds.

    On a GPU by events around each call alone, the L2 cache emptied before it where ``flush``; on a CPU by the clock.
    """
    for _ in range(warmup):
        call()
    times = _gpu_times(call, repeats, flush) if torch.cuda.is_available() else _cpu_times(call, repeats)
    low, *_, high = statistics.quantiles(times, n=5)
    return statistics.median(times), low, high


def quick_seconds(call: Callable[[], Any], flush: bool = True) -> tuple[float, float, float]:
    """As ``seconds``, with a quarter of the repeats where a call takes longer than 5 ms."""
    once = seconds(call, repeats=2, warmup=2, flush=False)[0]
    return seconds(call, repeats=20 if once < 5e-3 else 5, warmup=1, flush=flush)


def _gpu_times(call: Callable[[], Any], repeats: int, flush: bool) -> list[float]:
    cache = torch.empty(FLUSH_BYTES // 4 if flush else 0, dtype=torch.int32, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        cache.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _cpu_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def host_seconds(call: Callable[[], Any], calls: int = 200) -> float:
    """Seconds of one call as Python sees it: what a small shape costs when the host cannot run ahead of the device."""
    for _ in range(10):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def graph_seconds(call: Callable[[], Any], calls: int = 20) -> float | None:
    """Seconds of one call inside a replayed CUDA graph, where Python is out of the way; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return seconds(graph.replay, flush=False)[0] / calls


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes that one call holds at most beyond what was allocated before it, its result included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def relative_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """||found - exact|| / ||exact|| of the tensor in which it is largest, in float64; NaN where one is not finite."""
    errors = []
    for f, e in zip(found, exact, strict=True):
        error = (f.double() - e.double()).norm() / e.double().norm()
        errors.append(float(error))
    return max(errors, key=lambda error: (error != error, error))


class Deadline:
    """Minutes from now on."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def passed(self) -> bool:
        return time.monotonic() > self._end


def in_words(error: BaseException) -> str:
    """The first line of what failed, for a printed line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]}"


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy: the roof of everything that only moves memory."""
    n = 2**30 if torch.cuda.is_available() else 2**26
    source, target = (torch.empty(n, dtype=torch.uint8, device=device()).fill_(1) for _ in range(2))
    return 2 * n / seconds(lambda: target.copy_(source), flush=False)[0]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


@functools.cache
def about() -> dict[str, str]:
    """What a row must carry so that it can be compared with another: device, driver, versions, commit, day."""
    return {
        "device": device_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "git": os.environ.get("G3N_GIT_SHA") or _output("git", "describe", "--always", "--dirty", "--abbrev=10"),
        "date": datetime.date.today().isoformat(),
    }


def _output(*line: str) -> str:
    """What a program prints; empty where it is missing or fails."""
    try:
        return subprocess.run(
            line, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_rows(name: str, rows: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """Append rows, each after ``about``, to ``results/<device>/<name>.csv``; a column that is new is empty in old rows."""
    path = (folder or RESULTS / device_name()) / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    everything: list[dict[str, Any]] = [*(read_rows(path) if path.exists() else []), *({**about(), **r} for r in rows)]
    columns = list(dict.fromkeys(key for row in [*everything[::-1][:1], *everything] for key in row))
    part = path.with_suffix(".part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)
    part.replace(path)
    return path
