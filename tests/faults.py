"""What can go wrong in a rank, done to it on purpose. A fault is a mapping with ``kind``, ``rank`` (all where absent) and its own facts."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch


def inject(fault: Mapping[str, Any]) -> None:
    """Break this process as ``fault`` says."""
    kind = fault["kind"]
    if kind in ("save full", "save kill", "save slow"):
        _writes(kind, fault)
    else:
        _losses(kind, fault)


def _losses(kind: str, fault: Mapping[str, Any]) -> None:
    """Faults in some calls (counted from 0) of the loss: nan, high, out of memory, stuck, slow, kill, stop."""
    from g3n.tasks import TASKS

    calls, count = fault["calls"], itertools.count()

    def sleep_for_ever() -> None:
        while True:
            time.sleep(1)

    for task in TASKS.values():
        whole = task.loss

        def loss(self: Any, model: Any, batch: Any, whole: Any = whole) -> Any:
            value, logs = whole(self, model, batch)
            if next(count) not in calls:
                return value, logs
            if kind == "nan":
                return value * float("nan"), logs
            if kind == "high":
                return value * 100, logs
            if kind == "out of memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")
            if kind == "stuck":
                sleep_for_ever()
            if kind == "slow":
                time.sleep(fault.get("seconds", 0.2))
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            return value, logs

        task.loss = loss  # type: ignore[method-assign]


def _writes(kind: str, fault: Mapping[str, Any]) -> None:
    """Faults in some calls (counted from 0) of os.pwrite, which only checkpoints use; ``save slow`` in each."""
    whole, calls, count = os.pwrite, fault.get("calls"), itertools.count()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if kind == "save slow":
            time.sleep(fault["seconds"])
        elif next(count) in calls:
            if kind == "save full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(fd, data, offset)

    os.pwrite = pwrite
