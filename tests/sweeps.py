"""Sweeps for tests: a driver and trainings that are forked from one preloaded process, and a stand-in for a training.

``python tests/sweeps.py serve SOCKET`` forks on request a driver (``run_sweep``) or a training (``g3n.train.main`` as one rank), so that a
launch costs a second instead of fifteen. Both are processes of their own that can be killed; the server reaps them.
``python tests/sweeps.py stand-in TRIAL_YAML`` does what a driver sees of a training, without training.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Forked:
    """A process the server forked; its exit code is in a file once it has ended."""

    pid: int
    exit: Path

    def poll(self) -> int | None:
        return int(self.exit.read_text()) if self.exit.is_file() else None

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"process {self.pid} still runs after {timeout} s"
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Server:
    """Forks drivers for a test; ``close`` ends it and everything it forked."""

    def __init__(self) -> None:
        from tests.launch import environment

        self.folder = Path(tempfile.mkdtemp(prefix="sweeps-"))
        self.socket = self.folder / "s"
        words = [sys.executable, str(Path(__file__)), "serve", str(self.socket)]
        self._process = subprocess.Popen(words, cwd=ROOT, env=environment())
        until = time.monotonic() + 60
        while not self.socket.exists():
            assert self._process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)

    def driver(self, words: Sequence[str], log: Path) -> Forked:
        """``g3n sweep`` with these words, its output appended to ``log``."""
        return ask(self.socket, {"kind": "driver", "words": list(words), "log": str(log)})

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


def ask(server: Path, request: Mapping[str, Any]) -> Forked:
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(server))
        line.sendall(json.dumps(request).encode() + b"\n")
        pid = int(line.makefile().readline())
    return Forked(pid, server.parent / f"{pid}.exit")


def _serve(path: Path) -> None:
    sys.path[0] = str(ROOT)
    import deepspeed.ops  # noqa: F401
    import mlflow.tracking  # noqa: F401

    import g3n.sweep.drive  # noqa: F401

    alive: set[int] = set()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path.with_name("s.part")))
    listener.listen(16)
    path.with_name("s.part").rename(path)

    def end(*_: Any) -> None:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    while True:
        if select.select([listener], [], [], 0.02)[0]:
            connection, _ = listener.accept()
            with connection:
                request = json.loads(connection.makefile().readline())
                pid = os.fork()
                if not pid:
                    _child(request, path)
                alive.add(pid)
                connection.sendall(f"{pid}\n".encode())
        for pid in list(alive):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                alive.discard(pid)
                part = path.parent / f"{pid}.part"
                part.write_text(str(os.waitstatus_to_exitcode(status)))
                part.rename(path.parent / f"{pid}.exit")


def _child(request: Mapping[str, Any], server: Path) -> None:
    code = 99
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(3, 256)
        target = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(target, stream)
        if request["kind"] == "driver":
            code = _drive(request["words"], server)
        else:
            run = Path(request["run"])
            (run / "process").write_text(f"{os.getpid()} {socket.gethostname()} -")
            os.environ.clear()
            os.environ.update(request["environment"])
            from g3n import train

            code = train.main(request["words"])
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _drive(words: Sequence[str], server: Path) -> int:
    from g3n.config import G3nError
    from g3n.sweep.drive import run_sweep
    from g3n.sweep.plan import load_sweep

    def launch(run: Path, line: Sequence[str], environment: Mapping[str, str], log: Path) -> Forked:
        of_train = list(line[[Path(word).name for word in line].index("train.py") + 1 :])
        request = {
            "kind": "trial",
            "run": str(run),
            "words": of_train,
            "environment": dict(environment),
            "log": str(log),
        }
        return ask(server, request)

    try:
        return run_sweep(load_sweep(words[0], words[1:]), "the same", launch)
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def stand_in(run: Path, words: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
    """A ``launch`` whose training is the one below."""
    from g3n.sweep import process

    config = words[list(words).index("--config") + 1]
    return process.launch(run, [sys.executable, str(Path(__file__)), "stand-in", config], environment, log)


def _stand_in(config: Path) -> int:
    """Metrics of a made-up law of optim.lr and optim.weight_decay, a checkpoint every save_every steps, SIGTERM obeyed, the folder locked.

    Files in the study's folder change that: ``slow.txt`` holds seconds a step, ``fail.txt`` a message to end with 2.
    """
    import fcntl
    import math

    import yaml

    tree = yaml.safe_load(config.read_text())
    run = config.parent
    settings, optim = tree["trainer"], tree["optim"]
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, _: stopped.append(n))
    held = open(run / ".lock", "a+")  # noqa: SIM115
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    held.truncate(0)
    held.write(f"process {os.getpid()} on {socket.gethostname()}")
    held.flush()
    (run / "starts").open("a").write("x")

    def told(name: str) -> str:
        return (run.parent / f"{name}.txt").read_text() if (run.parent / f"{name}.txt").is_file() else ""

    def save(step: int) -> None:
        folder = run / "ckpt" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "COMPLETE").write_text("{}")

    if message := told("fail"):
        print(f"error: {message}")
        return 2
    done = sorted((run / "ckpt").glob("step_*/COMPLETE"))
    step = int(done[-1].parent.name[5:]) if done else 0
    path = run / "metrics.jsonl"
    kept = [
        line for line in (path.read_text().splitlines() if path.is_file() else []) if json.loads(line)["step"] <= step
    ]
    path.with_suffix(".part").write_text("".join(f"{line}\n" for line in kept))
    path.with_suffix(".part").rename(path)
    with open(path, "a", buffering=1) as file:
        while step < settings["steps"] and not stopped:
            time.sleep(float(told("slow") or 0))
            step += 1
            if step % settings["eval_every"] == 0:
                value = abs(math.log10(float(optim["lr"])) + 3) + optim["weight_decay"] + 1 / step
                file.write(json.dumps({"step": step, "time": 0.0, "val/masked": value}) + "\n")
            if step % settings["save_every"] == 0 or stopped:
                save(step)
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(Path(sys.argv[2]))
    sys.exit(_stand_in(Path(sys.argv[2])))
