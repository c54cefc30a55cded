"""A sweep that is killed twice against one that nobody touches: ``python -m benchmarks.sweep --sweep configs/sweeps/tiny/dit.yaml``.

Carries the sweep out twice by ``g3n sweep``. The first is left alone, and what the sweep costs beyond its trainings is measured: wall time of the
command minus the time in which a training ran, as a share of the latter (with one trial at a time). In the second the driver is killed (SIGKILL) in
trial ``--kill-driver`` and the training of trial ``--kill-trial`` after its first checkpoint; each time the same line is given again where it ended.
Ends with 1 where the two do not have the same trials, values and best config.

A study that is complete is not run again, but then its overhead is not measured either.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import write_rows
from g3n.engine import checkpoint
from g3n.evaluate.report import write_json
from g3n.sweep.plan import load_sweep
from g3n.sweep.process import Process

ROOT = Path(__file__).resolve().parents[1]
_NOT_COMPARED = ("seconds", "deaths", "run")


class Watch(threading.Thread):
    """When trainings of a study ran, seen from outside twenty times a second."""

    def __init__(self, study: Path) -> None:
        super().__init__(daemon=True)
        self.study, self.busy_s, self.first, self.last, self.over = study, 0.0, 0.0, 0.0, threading.Event()

    def run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(0.05):
            now = time.monotonic()
            if any(Process(note.parent).alive() for note in self.study.glob("trial_*/process")):
                self.busy_s += now - before
                self.first, self.last = self.first or before, now
            before = now


def table(study: Path) -> list[dict[str, str]]:
    if not (study / "study.csv").is_file():
        return []
    with open(study / "study.csv") as file:
        return [{k: v for k, v in row.items() if k not in _NOT_COMPARED} for row in csv.DictReader(file)]


def start(sweep: str, words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "g3n.cli", "sweep", sweep, *words], cwd=ROOT)


def finish(driver: subprocess.Popen[bytes]) -> None:
    if code := driver.wait():
        raise SystemExit(f"error: the sweep ended with {code}")


def undisturbed(sweep: str, words: list[str], study: Path) -> dict[str, float]:
    """Run it; seconds of the command and of its parts."""
    watch = Watch(study)
    begin = time.monotonic()
    watch.start()
    finish(start(sweep, words))
    end = time.monotonic()
    watch.over.set()
    watch.join()
    wall, busy = end - begin, watch.busy_s
    parts = {"before_s": watch.first - begin, "after_s": end - watch.last, "between_s": watch.last - watch.first - busy}
    return {"wall_s": wall, "training_s": busy, "overhead_percent": 100 * (wall - busy) / busy, **parts}


def disturbed(sweep: str, words: list[str], study: Path, kill_driver: int, kill_trial: int) -> int:
    """Run it, killing one driver and one trial; how many kills there were (fewer where the study was complete before)."""

    def reached(number: int) -> bool:
        run = study / f"trial_{number:04d}"
        return bool(checkpoint.finished_steps(run)) and Process(run).alive()

    kills, driver = 0, start(sweep, words)
    for number, of_driver in sorted([(kill_driver, True), (kill_trial, False)]):
        while driver.poll() is None and not reached(number):
            time.sleep(0.05)
        if driver.poll() is not None:
            continue
        kills += 1
        if of_driver:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
            print(f"-- killed the driver in trial {number}", flush=True)
            driver = start(sweep, words)
        else:
            os.killpg(int((study / f"trial_{number:04d}" / "process").read_text().split()[0]), signal.SIGKILL)
            print(f"-- killed trial {number}", flush=True)
    finish(driver)
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="configs/sweeps/tiny/dit.yaml")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep-benchmark"))
    parser.add_argument("--kill-driver", type=int, default=3, help="number of the trial in which the driver is killed")
    parser.add_argument(
        "--kill-trial", type=int, default=7, help="number of the trial that is killed; one that is not pruned early"
    )
    parser.add_argument("--output", type=Path, help="folder of sweep.csv; default benchmarks/results/<device>")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    runs = args.runs.resolve()
    name = load_sweep(args.sweep, args.overrides).name
    calm, hurt = runs / "calm" / name, runs / "hurt" / name
    row: dict[str, Any] = {"sweep": Path(args.sweep).stem}
    row |= {k: round(v, 2) for k, v in undisturbed(args.sweep, [*args.overrides, f"runs={calm.parent}"], calm).items()}
    row["kills"] = disturbed(
        args.sweep, [*args.overrides, f"runs={hurt.parent}"], hurt, args.kill_driver, args.kill_trial
    )
    first, second = table(calm), table(hurt)
    row["trials"] = len(second)
    row["same_trials"] = first == second
    configs = [(study / "best.yaml").read_text().splitlines() for study in (calm, hurt)]
    row["same_best"] = [line for line in configs[0] if "runs" not in line] == [
        line for line in configs[1] if "runs" not in line
    ]
    for key, value in row.items():
        print(f"{key:20} {value}")
    for one, other in zip(first, second, strict=False):
        if one != other:
            print(json.dumps({"undisturbed": one, "killed": other}, indent=1))
    write_json(runs / "result.json", row)
    print(write_rows("sweep", [row], args.output))
    return 0 if row["same_trials"] and row["same_best"] else 1


if __name__ == "__main__":
    sys.exit(main())
