"""What this machine has, what g3n will use of it, and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from g3n import ops

PACKAGES = (
    "torch", "deepspeed", "triton", "xformers", "webdataset", "monai", "nibabel", "numpy", "mlflow",
    "nilearn", "antspyx", "deepbet",
)  # fmt: skip


def version(package: str) -> str:
    """The installed version or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def facts() -> list[tuple[str, str, str]]:
    """(part, what is there, what that means) in the order in which a user asks."""
    rows = []
    memory = psutil.virtual_memory()
    rows.append(("python", platform.python_version(), f"{platform.system()} {platform.machine()}"))
    rows.append(("processors", str(len(os.sched_getaffinity(0))), "data_prep uses them all; see OMP_NUM_THREADS"))
    rows.append(("memory", f"{memory.total / 2**30:.0f} GiB", f"{memory.available / 2**30:.0f} GiB free"))
    rows.append(("disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free", "for shards and checkpoints"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append(
                (f"GPU {i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}", "bf16 training")
            )
    else:
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no usable driver or device"
        rows.append(("GPU", "none", f"{reason}: training runs on the CPU in fp32 with gloo"))
    for package in PACKAGES:
        rows.append((package, version(package), ""))
    rows.append(("kernels", *ops.explain()))
    wanted = ops.attention_requested()
    how = (
        f"measures once a shape on a GPU; {ops.attention_cache()}" if wanted == "auto" else "asked for by G3N_ATTENTION"
    )
    rows.append(("attention", wanted, how))
    for name, why_not in ops.attention_obstacles().items():
        rows.append(("attention", name, why_not or f"there; G3N_ATTENTION={name} takes it always"))
    return rows


def report(console: Console | None = None) -> None:
    """Print the facts as a table."""
    table = Table("part", "found", "so", title="g3n doctor", title_justify="left")
    for row in facts():
        table.add_row(*map(escape, row))  # [xformers] is no style
    (console or Console()).print(table)
