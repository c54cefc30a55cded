"""Ends a process that makes no progress, and says where it stands: a rank that hangs in a collective would wait for ever."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import torch

EXIT_CODE = 70  # "software error" of sysexits.h: neither the user's mistake nor a stop that was asked for


class Watchdog:
    """A thread that ends the process when ``beat`` has not been called for ``seconds``.

    Every rank has its own, and ranks that wait for a stuck one do not beat either: all of them end and leave their stacks,
    without a word between them. The stacks of all threads go to ``folder/stuck-rank<r>.txt`` and to stderr, and on GPUs the flight
    record of NCCL to ``stuck-rank<r>.nccl.json``.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self._folder, self._rank, self._seconds = folder, rank, seconds
        self.doing, self._since = "start", time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def beat(self, doing: str) -> None:
        """Progress: the process now begins ``doing``."""
        self.doing, self._since = doing, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            idle = time.monotonic() - self._since
            if idle > self._seconds:
                self._end(idle)

    def _end(self, idle: float) -> None:
        path = self._folder / f"stuck-rank{self._rank}.txt"
        print(
            f"error: [rank {self._rank}] no progress for {idle:.0f} s at {self.doing}; stacks are in '{path}'. The rank whose "
            f"stack is not in a collective is the one that holds up the others (trainer.stuck_seconds {self._seconds:g})",
            file=sys.stderr,
            flush=True,
        )
        try:
            with open(path, "w") as file:
                faulthandler.dump_traceback(file)
            faulthandler.dump_traceback()
            flight_record = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
            if flight_record is not None and torch.cuda.is_available():
                path.with_suffix(".nccl.json").write_bytes(flight_record())
        except Exception as error:  # a full disk must not keep a dead process alive
            print(f"[rank {self._rank}] stacks could not be written: {error}", file=sys.stderr, flush=True)
        finally:
            # Its connections close with it, and the others would end by that before they have left their stacks.
            time.sleep(min(5.0, self._seconds / 2))
            os._exit(EXIT_CODE)
