"""preprocess and pack killed (SIGKILL, with their workers) at ten random points each: the last run's output is as if
nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.chain import run
from tests.launch import ROOT, environment

pytest.importorskip("ants", reason="needs antspyx (pip install 'g3n[prep]')")
KILLS = 10


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_ten_times(words: list[str], output: Path, whole: dict[str, bytes], seconds: float, seed: int) -> int:
    """Start the command ten times and kill it after up to ``seconds``, then let it end; how many kills hit unfinished work."""
    rng = random.Random(seed)
    within = 0
    for _ in range(KILLS):
        line = [sys.executable, *words]
        process = subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(rng.uniform(0.2, 1) * seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        begun = len(files(output)) if output.exists() else 0
        within += 0 < begun < len(whole)
    return within


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kill")
    run("python", "-m", "data_prep", "phantom", "--output", f"{root}/bids", "--subjects", "4", "--spacing-mm", "8")
    run("python", "-m", "data_prep", "scan", f"{root}/bids", "--output", f"{root}/manifest.tsv")
    return root


def preprocess(work: Path, output: Path) -> list[str]:
    grid = ["--spacing-mm", "8", "--shape", "20,24,20", "--align", "affine", "--strip", "none", "--bias", "none"]
    return ["-m", "data_prep", "preprocess", f"{work}/manifest.tsv", "--output", str(output), "--workers", "2", *grid]


def pack(work: Path, output: Path) -> list[str]:
    return ["-m", "data_prep", "pack", f"{work}/a/manifest.tsv", "--output", str(output), "--workers", "2"]


def test_preprocess(work: Path) -> None:
    begin = time.monotonic()
    run("python", *preprocess(work, work / "a"))
    seconds = time.monotonic() - begin
    whole = files(work / "a")
    assert len(whole) > 20
    within = killed_ten_times(preprocess(work, work / "b"), work / "b", whole, seconds / 3, 0)
    run("python", *preprocess(work, work / "b"))
    assert files(work / "b") == whole
    assert within >= 3


def test_pack(work: Path) -> None:
    if not (work / "a/manifest.tsv").is_file():
        run("python", *preprocess(work, work / "a"))
    begin = time.monotonic()
    run("python", *pack(work, work / "s"))
    seconds = time.monotonic() - begin
    whole = files(work / "s")
    killed_ten_times(pack(work, work / "t"), work / "t", whole, seconds, 1)
    run("python", *pack(work, work / "t"))
    assert files(work / "t") == whole
