"""Writes checkpoints while training goes on.

A save has three parts. Each rank copies its pieces to host memory, during the next step's forward and backward: nothing changes weights
before the optimizer does. A thread of each rank then writes them to their places in the shared files, under a temporary name. When all have
written, rank 0's thread hashes the files, writes COMPLETE and renames the folder. Ranks agree through the trainer's one exchange a step.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g3n.engine import checkpoint, tensorfile
from g3n.engine.distributed import Ranks
from g3n.engine.ema import Average
from g3n.engine.pieces import MOMENTS, Piece, moment, owned, shapes


class Saver:
    """One save at a time; ``step`` is that of the save under way, None where there is none.

    All methods are called alike on every rank. It needs host memory for 16 bytes a parameter, shared out among the ranks.
    """

    def __init__(self, run: Path, engine: Any, ranks: Ranks, keep_last: int, keep_every: int | None) -> None:
        self.step: int | None = None
        self.error: str | None = None  # why this rank's part of the save failed
        self._run, self._engine, self._ranks = run, engine, ranks
        self._keep_last, self._keep_every = keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._committing = False
        self._copied = threading.Event()
        self._copied.set()
        self._stream = torch.cuda.Stream() if ranks.device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None
        self._pieces: list[Piece] = owned(engine)
        self._host = {file: [_host_like(piece) for piece in self._pieces] for file in checkpoint.TENSORS}
        if ranks.main:
            for part in checkpoint.unfinished(run):  # a job that was killed left them; this one holds the lock
                shutil.rmtree(part, ignore_errors=True)

    def start(self, step: int, average: Average, texts: Mapping[str, str]) -> None:
        """Begin to save ``step``: weights, average and moments as they are now, and small files by name."""
        assert self.step is None, "one save at a time"
        self.step, self.error, self._committing = step, None, False
        engine, pieces = self._engine, self._pieces
        sources = {"model": [p.weight for p in pieces], "ema": [average[p.name] for p in pieces]}
        sources |= {name: [moment(engine, p, name) for p in pieces] for name in MOMENTS}
        buffers = {name: b.detach().cpu().clone() for name, b in engine.module.named_buffers()}
        pairs = [(h, s) for file in checkpoint.TENSORS for h, s in zip(self._host[file], sources[file], strict=True)]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for host, source in pairs:
                    if source.is_cuda:
                        host.copy_(source, non_blocking=True)
                self._event = self._stream.record_event()
            pairs = [(host, source) for host, source in pairs if not source.is_cuda]
        self._copied.clear()
        self._run_thread(lambda: self._write(pairs, buffers, dict(texts)))

    def before_update(self) -> None:
        """Call before weights, average or moments change: waits for what is still being copied."""
        self._copied.wait()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def advance(self, busy_anywhere: bool, failed_anywhere: bool) -> bool:
        """Go on with what all ranks agree on; True when the save is over, well or not."""
        if self.step is None or busy_anywhere:
            return False
        if failed_anywhere and self._ranks.main:
            shutil.rmtree(checkpoint.part_folder(self._run, self.step), ignore_errors=True)
        if failed_anywhere or self._committing:
            self.step = None
            return True
        self._committing = True
        if self._ranks.main:
            self._run_thread(self._commit)
        return False

    def _run_thread(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except Exception as error:  # the training thread must hear of it, and training goes on
                reason = error.strerror if isinstance(error, OSError) and error.strerror else None
                self.error = reason or " ".join(str(error).split()) or type(error).__name__
            finally:
                self._copied.set()

        self._thread = threading.Thread(target=guarded, name="g3n-saver", daemon=True)
        self._thread.start()

    def _write(self, pairs: list[tuple[Tensor, Tensor]], buffers: dict[str, Tensor], texts: dict[str, str]) -> None:
        assert self.step is not None
        for host, source in pairs:
            host.copy_(source)
        self._copied.set()
        if self._event is not None:
            self._event.synchronize()
        part = checkpoint.part_folder(self._run, self.step)
        part.mkdir(parents=True, exist_ok=True)
        whole = {name: (shape, torch.float32) for name, shape in shapes(self._engine).items()}
        for file in checkpoint.TENSORS:
            extra = buffers if file in ("model", "ema") else {}
            plan = tensorfile.layout({**whole, **{n: (tuple(b.shape), b.dtype) for n, b in extra.items()}})
            path = part / f"{file}.safetensors"
            parts = [(p.name, p.start, host) for p, host in zip(self._pieces, self._host[file], strict=True)]
            if self._ranks.main:
                tensorfile.write_header(path, plan)
                parts += [(name, 0, b.flatten()) for name, b in extra.items()]
            tensorfile.write_parts(path, plan, parts)
        if self._ranks.main:
            for name, text in texts.items():
                (part / name).write_text(text)

    def _commit(self) -> None:
        assert self.step is not None
        part, final = checkpoint.part_folder(self._run, self.step), checkpoint.step_folder(self._run, self.step)
        files = sorted(p for p in part.rglob("*") if p.is_file())
        hashes = {p.relative_to(part).as_posix(): checkpoint.hash_file(p) for p in files}
        checkpoint.write_atomically(part / "COMPLETE", json.dumps(hashes, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        checkpoint.write_atomically(self._run / "latest", final.name)
        checkpoint.prune(self._run, self._keep_last, self._keep_every)


def _host_like(piece: Piece) -> Tensor:
    return torch.empty(piece.numel, dtype=torch.float32, pin_memory=piece.flat.is_cuda)
