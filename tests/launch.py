"""Launch trainings as a user would: ``deepspeed --num_gpus N`` or plain ``python``, on CPU, and read what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    env["OMP_NUM_THREADS"] = "1"
    env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def command(ranks: int, script: str, *words: str) -> list[str]:
    """The user's line for one process or for several ranks."""
    if ranks == 1:
        return [sys.executable, script, *words]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port), script, *words]


def launch(ranks: int, script: str, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run to the end; output captured as text."""
    return subprocess.run(
        command(ranks, script, *words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )


def losses(run: Path) -> dict[int, float]:
    """Training loss by step from metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
