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
    elif kind == "save again":
        _save_at_once()
    elif kind == "live bytes":
        _count_bytes()
    elif kind == "load wrong":
        _spoil_what_is_loaded(fault["parameter"])
    else:
        _losses(kind, fault)


def _losses(kind: str, fault: Mapping[str, Any]) -> None:
    """Faults in some calls (counted from 0) of the loss: nan, high, out of memory, stuck, slow, or a signal by its name."""
    from g3n.tasks import TASKS

    calls, count = fault["calls"], itertools.count()

    def sleep_for_ever() -> None:
        while True:
            time.sleep(1)

    for task in TASKS.values():
        whole = task.loss

        def loss(self: Any, model: Any, batch: Any, whole: Any = whole) -> Any:
            value, logs = whole(self, model, batch)
            if value.is_meta or next(count) not in calls:  # FLOPs are counted by a loss without numbers
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
            if kind.startswith("SIG"):
                os.kill(os.getpid(), signal.Signals[kind])
            return value, logs

        task.loss = loss  # type: ignore[method-assign]


def _writes(kind: str, fault: Mapping[str, Any]) -> None:
    """Faults in some of the tensor files this rank writes (counted from 0, four a save) when half of one is written; ``save slow`` in each."""
    from g3n.engine import tensorfile

    whole, count = tensorfile.write_parts, itertools.count()

    def write_parts(path: Any, plan: Any, parts: list[Any]) -> None:
        if kind == "save slow":
            time.sleep(fault["seconds"])
        elif next(count) in fault["files"]:
            whole(path, plan, parts[: len(parts) // 2])
            if kind == "save full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, plan, parts)

    tensorfile.write_parts = write_parts


def _save_at_once() -> None:
    """Instead of training, save again what was loaded."""
    from g3n.engine.trainer import Trainer
    from g3n.engine.watchdog import Watchdog

    def run(self: Trainer) -> int:
        self.watchdog = Watchdog(self.config.folder, self.ranks.rank, 0)
        self.saved_step = -1
        self._save()
        self._finish_save()
        return 0

    Trainer.run = run  # type: ignore[method-assign]


def _spoil_what_is_loaded(parameter: str) -> None:
    """A parameter that arrives as zeros, as if it had been carried over to the wrong place."""
    from g3n.engine import checkpoint, pieces

    whole = checkpoint.load

    def load(folder: Any, engine: Any, steps: int) -> Any:
        loaded = whole(folder, engine, steps)
        for piece in pieces.owned(engine):
            if piece.name == parameter:
                piece.weight.zero_()
        pieces.publish_weights(engine)
        return loaded

    checkpoint.load = load


def _count_bytes() -> None:
    """No fault: the most bytes of tensors alive during the third step go to ``live-bytes-rank<r>`` in the run folder."""
    import g3n.train
    from g3n.engine.trainer import Trainer
    from g3n.memory_plan import LiveBytes

    counted, whole, step = LiveBytes(meta=False), g3n.train.train, Trainer._train_step

    def train(*args: Any) -> int:
        with counted:
            return whole(*args)

    def _train_step(self: Trainer) -> bool:
        counted.peak = counted.live  # building a model and the first states is done with
        moved = step(self)
        if self.step == 3:
            (self.config.folder / f"live-bytes-rank{self.ranks.rank}").write_text(str(counted.peak))
        return moved

    g3n.train.train = train
    Trainer._train_step = _train_step  # type: ignore[method-assign]
