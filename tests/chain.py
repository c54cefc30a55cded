"""The chain's commands as a user gives them, on the tiny configs with few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.launch import ROOT, environment, launch


def run(*words: str) -> str:
    """``python -m ...`` or ``g3n ...``; what it printed. Fails the test where it fails."""
    line = [sys.executable, "-m", "g3n.cli", *words[1:]] if words[0] == "g3n" else [sys.executable, *words[1:]]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def prepare(bids: Path, work: Path, *scan: str, pack: tuple[str, ...] = ()) -> None:
    """BIDS folder -> ``work/shards`` at 4 mm."""
    prep = ("python", "-m", "data_prep")
    run(*prep, "scan", str(bids), "--output", f"{work}/manifest.tsv", *scan)
    grid = ("--spacing-mm", "4", "--shape", "40,48,40", "--align", "header", "--strip", "none", "--bias", "none")
    run(*prep, "preprocess", f"{work}/manifest.tsv", "--output", f"{work}/derivatives", *grid)
    run(*prep, "pack", f"{work}/derivatives/manifest.tsv", "--output", f"{work}/shards", *pack)


def train(task: str, work: Path, steps: int, *more: str) -> None:
    """One stage in one process into ``work/<task>``."""
    inputs = {
        "mae": ("data.shards={0}/shards",),
        "decoder": ("data.shards={0}/shards", "model.encoder={0}/mae"),
        "dit": ("data.shards={0}/latents", "model.tokenizer={0}/decoder"),
        "forecast": ("data.shards={0}/latents", "model.tokenizer={0}/decoder"),
    }[task]
    words = ["--config", f"configs/tiny/{task}.yaml", f"runs={work}", *(i.format(work) for i in inputs)]
    words += [f"trainer.steps={steps}", f"trainer.eval_every={steps}", f"trainer.save_every={steps}", "data.lanes=2"]
    done = launch(1, "g3n/train.py", *words, "trainer.global_batch=4", "trainer.micro_batch=4", *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
