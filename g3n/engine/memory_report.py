"""What a rank leaves behind when memory runs out."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from g3n.config import G3nError

ADVICE = "lower trainer.micro_batch (trainer.global_batch may stay), or set trainer.recompute=true or a higher trainer.zero_stage"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the host's memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def out_of_memory(folder: Path, rank: int, doing: str, keys: list[str], error: BaseException) -> G3nError:
    """Writes ``out-of-memory-rank<r>.txt`` and gives the one line to raise: this rank ends, and the others when they miss it."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    process = psutil.Process().memory_info().rss / 2**30
    lines = [
        f"{first}\nat {doing}, samples {', '.join(keys) or 'none'}; {ADVICE}",
        f"host: this process {process:.2f} GiB, {psutil.virtual_memory().available / 2**30:.2f} GiB free",
    ]
    if torch.cuda.is_available():
        lines.append(torch.cuda.memory_summary())
    path = folder / f"out-of-memory-rank{rank}.txt"
    try:
        path.write_text("\n\n".join(lines) + "\n")
    except OSError as failure:
        path = Path(f"nowhere: {os.strerror(failure.errno or 0)}")
    return G3nError(f"out of memory at {doing} ({first[:200]}); {ADVICE}. Details: '{path}'")
