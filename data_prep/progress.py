"""Running the same work on many items in parallel with a progress bar, in order, stoppable."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from g3n.config import G3nError
from g3n.meters import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None,
    label: str,
    on_crash: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """``work(item)`` for each item, results in the order of items; ``workers`` processes (None: all processors).

    At most a few items a worker are under way at once, so memory stays bounded. An exception of ``work`` or Ctrl-C
    drops what has not begun and goes on to the caller. A worker that dies (out of memory, a crash in a library) takes the
    pool with it: what was under way is tried again, each in a process of its own, and an item that kills that one too has
    the result ``on_crash(item)``, or raises G3nError where none is given.
    """
    count = default_workers() if workers is None else workers
    if count < 1:
        raise G3nError(f"workers is {count}; give at least 1")
    with progress_bar(disable=not items) as progress:
        task = progress.add_task(label, total=len(items))
        if len(items) <= 1 or (count == 1 and on_crash is None):
            for item in items:
                yield work(item)
                progress.advance(task)
            return
        pool = _pool(min(count, len(items)))
        ahead: deque[Future[Result]] = deque()  # of items[done:begun]
        begun = 0
        try:
            for done, item in enumerate(items):
                while begun < min(done + 4 * count, len(items)):
                    ahead.append(_submit(pool, work, items[begun]))
                    begun += 1
                try:
                    result = ahead[0].result()
                except BrokenProcessPool:
                    result = _alone(work, item, on_crash)
                    pool.shutdown(wait=True, cancel_futures=True)
                    pool = _pool(min(count, len(items)))
                    for i in range(1, len(ahead)):
                        if not _finished(ahead[i]):
                            ahead[i] = _submit(pool, work, items[done + i])
                ahead.popleft()
                yield result
                progress.advance(task)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Callable[[Item], Result], item: Item) -> Future[Result]:
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        failed: Future[Result] = Future()
        failed.set_exception(error)
        return failed


def _alone(work: Callable[[Item], Result], item: Item, on_crash: Callable[[Item], Result] | None) -> Result:
    pool = _pool(1)
    try:
        return pool.submit(work, item).result()
    except BrokenProcessPool:
        if on_crash is None:
            raise G3nError("a worker process died twice on one item (out of memory?); give fewer --workers") from None
        return on_crash(item)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(future: Future[Result]) -> bool:
    return future.done() and not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool)


def _pool(count: int) -> ProcessPoolExecutor:
    # spawn: a fork would copy whatever threads and locks the caller has
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    """A worker a processor is all there is to gain; torch and BLAS read this when they are loaded."""
    os.environ["OMP_NUM_THREADS"] = "1"
