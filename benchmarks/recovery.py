"""What a killed job costs: ``python -m benchmarks.recovery --config configs/tiny/mae.yaml data.shards=runs/demo/shards``.

Trains with the user's line, kills it (SIGKILL) ``--kills`` times and starts it again. Measured: seconds from the start of a fresh process to its first step
(start-up), from the kill to the next new step (recovery), and the steps done twice. From these the share of an hour with one kill that
is spent on new steps (goodput) is computed, not waited for: the clock of that hour is simulated, and the column says so.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import write_rows

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, help="folder of recovery.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    runs = Path(tempfile.mkdtemp(prefix="recovery-"))
    run = runs / "recovery"
    fixed = ["trainer.steps=1000000", "trainer.log_every=1", "trainer.eval_every=1000000", "tracking.mlflow=false"]
    settings = [
        f"runs={runs}",
        "name=recovery",
        f"trainer.save_every={args.save_every}",
        *fixed,
        "trainer.panels=false",
    ]
    line = [sys.executable, "g3n/train.py", "--config", args.config, *args.overrides, *settings]
    chance = random.Random(0)
    startup, recovery, again = [], [], []
    steps: dict[int, float] = {}
    killed_at, reached = 0.0, 0
    for number in range(args.kills + 1):
        begin = time.time()
        with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            first = _wait(process, run, after=begin, step=0)
            if number == 0:
                startup.append(first - begin)
            else:
                came_back = _wait(process, run, after=killed_at, step=reached + 1)
                resumed = min(s for s, t in _rows(run) if t > begin)
                again.append(reached - resumed + 1)
                redo = again[-1] * statistics.median(steps.values())
                recovery.append(came_back - killed_at - redo)
            goal = max(s for s, _ in _rows(run)) + args.save_every + chance.randrange(args.save_every)
            _wait(process, run, after=begin, step=goal)
            os.kill(process.pid, signal.SIGKILL)
            killed_at = time.time()
        rows = _rows(run)
        reached = rows[-1][0]
        pairs = list(zip(rows, rows[1:], strict=False))
        steps |= {b[0]: b[1] - a[1] for a, b in pairs if b[0] == a[0] + 1 and b[1] - a[1] < 60}
    step_s = statistics.median(steps.values())
    lost = statistics.fmean(again) * step_s
    # A killed hour: start-up and what comes with a resume, the steps done again; saves run beside the steps.
    goodput = 1 - (statistics.median(recovery) + lost) / 3600
    row = {"config": Path(args.config).stem, "step_s": round(step_s, 4), "save_every": args.save_every}
    row |= {"startup_s": round(startup[0], 2), "recovery_s": round(statistics.median(recovery), 2)}
    row |= {
        "beyond_startup_s": round(statistics.median(recovery) - startup[0], 2),
        "steps_again": statistics.fmean(again),
    }
    row |= {"goodput_one_kill_an_hour_simulated": round(goodput, 4), "kills": args.kills}
    for name, value in row.items():
        print(f"{name:36} {value}")
    shutil.rmtree(runs)
    print(write_rows("recovery", [row], args.output))


def _rows(run: Path) -> list[tuple[int, float]]:
    """(step, wall-clock time) of each training line."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = []
    for text in path.read_text().splitlines():
        try:
            row = json.loads(text)
        except ValueError:  # cut by a kill
            continue
        if "train/loss" in row:
            rows.append((row["step"], row["time"]))
    return rows


def _wait(process: subprocess.Popen[str], run: Path, after: float, step: int) -> float:
    """When a step from ``step`` on was logged after a point in time."""
    while True:
        for number, at in _rows(run):
            if number >= step and at > after:
                return at
        if process.poll() is not None:
            raise SystemExit(f"error: the training ended: {process.stderr.read()[-500:] if process.stderr else ''}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
