"""How fast and how long: throughput, waiting for data, time left."""

from __future__ import annotations

import math
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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


def clock(seconds: float) -> str:
    """``h:mm:ss`` or ``mm:ss``."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes:02d}:{s:02d}"


def progress_bar(disable: bool = False) -> Progress:
    """Description, count, time so far and time left, on stderr; a context in which ``add_task`` is called."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=disable)
