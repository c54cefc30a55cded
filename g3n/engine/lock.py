"""One job a run folder: two of them would write each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from g3n.config import G3nError

PATIENCE_SECONDS = 10  # a job that is started again may come while the one before still ends


def hold(folder: Path, until: ExitStack) -> None:
    """Own ``folder`` until the stack closes or the process ends, however it ends.

    Raises G3nError where another job does, or where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = until.enter_context(open(folder / ".lock", "a+"))  # noqa: SIM115
    except OSError as error:
        raise G3nError(
            f"run folder '{folder}' cannot be written ({error.strerror}); give another by runs=..."
        ) from error
    patience = time.monotonic() + PATIENCE_SECONDS
    while not _locked(file):
        if time.monotonic() > patience:
            file.seek(0)
            owner = file.read(200).strip() or "unknown"
            raise G3nError(
                f"another job trains in '{folder}' ({owner}); stop it, or give this one another name (name=...)"
            )
        time.sleep(0.5)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _locked(file: IO[str]) -> bool:
    """False where another process has it; a file system without locks can refuse nobody."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def owner(folder: Path) -> str | None:
    """Who holds ``folder``, as "process 123 on host"; None where nobody does."""
    try:
        with open(folder / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read(200).strip() or "unknown"
    except OSError:
        return None
    return None
