"""The training of a trial as a process that outlives the driver, can be found again, and is stopped so that it leaves a checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from g3n import train
from g3n.config import G3nError
from g3n.engine import lock

_NOTE = 'printf "%s" "$$ $1 $2" > "$0.part" && mv "$0.part" "$0"; shift 2; exec "$@"'


class Child(Protocol):
    """``subprocess.Popen``."""

    def poll(self) -> int | None: ...


# (run folder, words of the command, environment, file its output is appended to) -> the process, which leads a session of its own and has
# written "<its id> <host> <GPUs>" to <run folder>/process
Launch = Callable[[Path, Sequence[str], Mapping[str, str], Path], Child]


def launch(run: Path, words: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
    """Start ``words`` in a session of its own: Ctrl-C in the driver's terminal does not reach it, nor does the driver's death."""
    gpus = environment.get("CUDA_VISIBLE_DEVICES") or "-"
    note = ["sh", "-c", _NOTE, str(run / "process"), socket.gethostname(), gpus]
    with open(log, "a") as file:
        return subprocess.Popen(
            [*note, *words], env=dict(environment), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip


def command(config: Path, world: int, on_gpus: bool) -> list[str]:
    """``deepspeed g3n/train.py`` of a trial. On GPUs it takes those of CUDA_VISIBLE_DEVICES, which --num_gpus would hide."""
    beside = Path(sys.executable).with_name("deepspeed")
    deepspeed = str(beside) if beside.is_file() else shutil.which("deepspeed") or "deepspeed"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [] if on_gpus else ["--num_gpus", str(world)]
    here = ["--hostfile", os.devnull, "--master_port", str(port)]  # a trial is of this machine
    return [deepspeed, *here, *ranks, str(train.__file__), "--config", str(config), "--resume", "auto"]


def environment(gpus: Sequence[str], processes: int) -> dict[str, str]:
    """Of a trial that shares the cores with ``processes - 1`` others; an empty ``gpus`` is the CPU."""
    found = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return found


@dataclass
class Process:
    """The training in ``run``: this driver's ``child``, or one that another driver left."""

    run: Path
    child: Child | None = None

    def alive(self) -> bool:
        """Also where its launcher is gone and ranks go on."""
        if self.child is not None and self.child.poll() is None:
            return True
        return (self.child is None and self._leader() is not None) or lock.owner(self.run) is not None

    def code(self) -> int | None:
        """Exit code of this driver's child; None while it runs and for another's."""
        return self.child.poll() if self.child is not None else None

    def gpus(self) -> list[str]:
        words = self._note()
        return words[2].split(",") if len(words) == 3 and words[2] != "-" else []

    def elsewhere(self) -> str | None:
        """Who trains in the folder on another host."""
        owner = lock.owner(self.run)
        return owner if owner is not None and not owner.endswith(f" on {socket.gethostname()}") else None

    def stop(self) -> None:
        """Ask for a checkpoint and the end: rank 0 tells the others. One that does not train yet has nothing to keep and is killed."""
        owner = lock.owner(self.run) or ""
        found = re.fullmatch(r"process (\d+) on (.+)", owner)
        if found and found[2] == socket.gethostname():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(found[1]), signal.SIGTERM)
        elif not found:
            self.kill()

    def kill(self) -> None:
        """End the launcher and its ranks at once."""
        leader = self._leader()
        if leader is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)

    def _note(self) -> list[str]:
        try:
            return (self.run / "process").read_text().split()
        except OSError:
            return []

    def _leader(self) -> int | None:
        """The launcher's process id where it still runs: it wrote the note as it started, which tells it from a later one of its number."""
        words = self._note()
        if len(words) != 3 or words[1] != socket.gethostname():
            return None
        try:
            process = psutil.Process(int(words[0]))
            started = abs(process.create_time() - (self.run / "process").stat().st_mtime) < 60
            return process.pid if started and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, OSError, ValueError):
            return None


@dataclass
class Tail:
    """New rows of a file of JSON lines that grows, and is written anew when a run is resumed."""

    path: Path
    _inode: int = 0
    _offset: int = 0
    _rest: bytes = field(default=b"", repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """Rows since the last call; all again after the file was replaced."""
        try:
            with open(self.path, "rb") as file:
                state = os.fstat(file.fileno())
                if state.st_ino != self._inode or state.st_size < self._offset:
                    self._inode, self._offset, self._rest = state.st_ino, 0, b""
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found


def last_error(log: Path) -> str:
    """What a training said last of its mistake."""
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    errors = [line.split("error: ", 1)[1] for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else ""


def visible_gpus() -> list[str]:
    """The GPUs a driver may give away, by the names CUDA_VISIBLE_DEVICES has for them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def check_gpus(count: int) -> None:
    """Raise G3nError where a trial asks for more GPUs than there are, or for the CPU where ranks would find GPUs."""
    there = visible_gpus()
    if count == 0 and there:
        raise G3nError(f"gpus 0 is for machines without a GPU; here are {len(there)}, and ranks take them: give gpus=1")
    if len(there) < count:
        raise G3nError(
            f"gpus {count} a trial, but {len(there)} are visible here; set gpus lower, or gpus=0 cpu_ranks=2 for the CPU"
        )
    if count and not all(name.isdecimal() for name in there):
        raise G3nError(f"CUDA_VISIBLE_DEVICES names '{there[0]}', but deepspeed takes numbers alone; give 0,1,...")
