"""Ranks for tests, forked from one process that has imported the stack: a launch costs a second instead of fifteen.

``start(2, [...words of g3n/train.py...])`` gives a ``Launch``: its processes run ``g3n.train.main`` with the environment a launcher sets, and
nothing looks after them: what a dead rank does to the others is theirs to find out. ``faults`` break one of them on purpose (tests/faults.py).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_servers: dict[str, subprocess.Popen[str]] = {}


class Launch:
    """The processes of one launch; ``output`` is what they wrote so far, rank by rank."""

    def __init__(self, pids: list[int], folder: Path) -> None:
        self.pids, self._folder = pids, folder

    @property
    def output(self) -> str:
        return "".join(self.text(rank) for rank in range(len(self.pids)))

    def text(self, rank: int) -> str:
        return (self._folder / f"rank{rank}.txt").read_text(errors="replace")

    def code(self, rank: int) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        path = self._folder / f"rank{rank}.exit"
        return int(path.read_text()) if path.is_file() else None

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.pids)):
            if self.code(rank) is None:
                os.kill(self.pids[rank], number)

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit statuses. After ``timeout`` seconds everything is killed and the test fails: nothing may hang."""
        deadline = time.monotonic() + timeout
        while any(self.code(rank) is None for rank in range(len(self.pids))):
            if time.monotonic() > deadline:
                alive = [rank for rank in range(len(self.pids)) if self.code(rank) is None]
                self.send(signal.SIGKILL)
                raise AssertionError(f"ranks {alive} still run after {timeout} s\n{self.output[-4000:]}")
            time.sleep(0.02)
        return [self.code(rank) or 0 for rank in range(len(self.pids))]

    def wait_for(self, path: Path, lines: int, timeout: float = 60) -> None:
        """Until a file has so many lines."""
        deadline = time.monotonic() + timeout
        while not path.is_file() or path.read_text().count("\n") < lines:
            dead = [self.code(rank) for rank in range(len(self.pids)) if self.code(rank) is not None]
            assert not dead, f"exit {dead}\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"{path} has no {lines} lines\n{self.output[-4000:]}"
            time.sleep(0.02)


def start(
    world: int,
    words: Sequence[str],
    faults: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """Begin a launch. ``environment`` is that of the forked process: another one is another server."""
    server = _server(dict(environment or {}))
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    request = {"world": world, "words": list(words), "faults": list(faults), "folder": str(folder), "port": port}
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks the ranks has ended"
    return Launch(json.loads(answer), folder)


def run(
    world: int,
    words: Sequence[str],
    faults: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, str] | None = None,
    expect: int = 0,
    timeout: float = 120,
) -> Launch:
    """A launch to its end; the test fails where a rank's exit status is not ``expect``."""
    launch = start(world, words, faults, environment)
    codes = launch.wait(timeout)
    assert codes == [expect] * world, f"exit {codes}\n{launch.output[-6000:]}"
    return launch


def _server(environment: dict[str, str]) -> subprocess.Popen[str]:
    key = json.dumps(environment, sort_keys=True)
    if key not in _servers or _servers[key].poll() is not None:
        from tests.launch import environment as usual

        _servers[key] = subprocess.Popen(
            [sys.executable, str(Path(__file__)), "serve"],
            cwd=ROOT, env={**usual(), **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return _servers[key]


def _serve() -> None:
    sys.path[0] = str(ROOT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is imported may print
    import deepspeed.ops  # noqa: F401

    import g3n.train  # noqa: F401

    alive: dict[int, Path] = {}
    while True:
        ready, _, _ = select.select([0], [], [], 0.01)
        if ready:
            line = b""
            while not line.endswith(b"\n"):
                byte = os.read(0, 1)
                if not byte:  # the tests have ended
                    for pid in alive:
                        os.kill(pid, signal.SIGKILL)
                    return
                line += byte
            request = json.loads(line)
            pids = [_fork(request, rank) for rank in range(request["world"])]
            alive |= {pid: Path(request["folder"]) / f"rank{rank}.exit" for rank, pid in enumerate(pids)}
            print(json.dumps(pids), file=answers, flush=True)
        for pid, path in list(alive.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del alive[pid]
                part = path.with_suffix(".part")
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                os.replace(part, path)


def _fork(request: Mapping[str, Any], rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        target = os.open(Path(request["folder"]) / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(target, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        world = str(request["world"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]))
        from g3n import train
        from tests import faults

        for fault in request["faults"]:
            if fault.get("rank", rank) == rank:
                faults.inject(fault)
        code = train.main(request["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
