"""Running the same work on many items in parallel with a progress bar, in order, stoppable."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from g3n.config import G3nError
from g3n.meters import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(work: Callable[[Item], Result], items: Sequence[Item], workers: int | None, label: str) -> Iterator[Result]:
    """``work(item)`` for each item, results in the order of items; ``workers`` processes (None: all processors).

    At most a few items a worker are under way at once, so memory stays bounded. An exception of ``work`` or Ctrl-C
    drops what has not begun and goes on to the caller.
    """
    count = default_workers() if workers is None else workers
    if count < 1:
        raise G3nError(f"workers is {count}; give at least 1")
    with progress_bar(disable=not items) as progress:
        task = progress.add_task(label, total=len(items))
        if count == 1 or len(items) <= 1:
            for item in items:
                yield work(item)
                progress.advance(task)
            return
        # spawn: a fork would copy whatever threads and locks the caller has
        pool = ProcessPoolExecutor(min(count, len(items)), mp_context=multiprocessing.get_context("spawn"))
        try:
            ahead = [pool.submit(work, item) for item in items[: 4 * count]]
            for done in range(len(items)):
                yield ahead[0].result()
                progress.advance(task)
                ahead.pop(0)
                if done + 4 * count < len(items):
                    ahead.append(pool.submit(work, items[done + 4 * count]))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
