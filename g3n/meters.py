"""How fast and how long: throughput, waiting for data, time left."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from g3n import levels


class Meter:
    """Times of the last steps. Call ``waited`` for time spent on data and ``stepped`` after each optimizer step."""

    def __init__(self, samples_a_step: int, window: int = 50) -> None:
        self.samples = samples_a_step
        self.steps: deque[tuple[float, float]] = deque(maxlen=window)  # (seconds, of these waiting for data)
        self._wait = 0.0
        self._last = time.perf_counter()

    def waited(self, seconds: float) -> None:
        self._wait += seconds

    def stepped(self) -> None:
        now = time.perf_counter()
        self.steps.append((now - self._last, self._wait))
        self._last, self._wait = now, 0.0

    def pause(self) -> None:
        """Leave out what happened since the last step (validation, checkpoint)."""
        self._last, self._wait = time.perf_counter(), 0.0

    @property
    def step_seconds(self) -> float:
        return sum(s for s, _ in self.steps) / max(1, len(self.steps))

    def step_seconds_at(self, share: float) -> float:
        """The step time that ``share`` of the last steps did not exceed (nearest rank)."""
        times = sorted(s for s, _ in self.steps)
        return times[max(0, math.ceil(share * len(times)) - 1)] if times else 0.0

    @property
    def samples_a_second(self) -> float:
        return self.samples / self.step_seconds if self.steps else 0.0

    @property
    def data_wait_share(self) -> float:
        """Share of the step time spent waiting for data, 0..1."""
        total = sum(s for s, _ in self.steps)
        return sum(w for _, w in self.steps) / total if total else 0.0


class OwnTime:
    """What a rank spends by itself, waiting for data and in the forward, before it meets the others in the backward."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def waited(self, seconds: float) -> None:
        self._seconds += seconds

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        if self._gpu:  # the host runs ahead: the device says how long it took, when somebody asks
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin

    def take(self) -> float:
        """Seconds since the last call; on a GPU this waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1e3
        self._seconds, self._events = 0.0, []
        return seconds


@dataclass(frozen=True)
class Report:
    """What a rank tells the others at a log line."""

    own_seconds: float  # see OwnTime
    data_wait_share: float
    damaged: int  # samples its stream has met so far
    system: dict[str, float]
    losses: levels.Sums


def over_ranks(reports: Sequence[Report]) -> dict[str, float]:
    """The row of metrics that the reports of all ranks make."""
    shares = [report.data_wait_share for report in reports]
    row = {"speed/data_wait_share": statistics.fmean(shares), "speed/data_wait_share_max": max(shares)}
    row["data/damaged"] = sum(report.damaged for report in reports)
    row |= {f"train/{name}": mean for name, mean in levels.means([report.losses for report in reports]).items()}
    for rank, report in enumerate(reports):
        row |= {f"system/rank{rank}/{name}": value for name, value in report.system.items()}
    return row


def memory(reports: Sequence[Report]) -> float:
    """GiB of the rank that needed the most: the peak of its GPU, or of the process where there is none."""
    return max(report.system.get("gpu_peak_memory_gib", report.system["rss_gib"]) for report in reports)


def slow_rank(seconds: Sequence[float], factor: float = 1.5, least_seconds: float = 0.1) -> int | None:
    """The rank whose own time is more than ``factor`` times the median of the others' and ``least_seconds`` above it, if there is one."""
    if len(seconds) < 2:
        return None
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(s for rank, s in enumerate(seconds) if rank != slowest)
    return slowest if seconds[slowest] > max(factor * others, others + least_seconds) else None


def clock(seconds: float) -> str:
    """``h:mm:ss`` or ``mm:ss``."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes:02d}:{s:02d}"


def progress_bar(disable: bool = False) -> Progress:
    """Description, count, time so far and time left, on stderr; a context in which ``add_task`` is called."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=disable)
