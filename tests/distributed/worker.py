"""Runs inside the launched ranks: trains a list of configurations one after the other in one process group.

``worker.py JOBS.json``: a list of {"config": YAML path, "overrides": [...], "resume": ..., "fault": {"kind": "nan", "rank": 1,
"calls": [4]}}. One launch for many runs, because importing the stack costs more than twenty steps of a tiny model. A fault happens in these
calls of the loss on one rank: ``nan`` spoils it, ``stuck`` never comes back.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

from g3n.engine import distributed
from g3n.engine.trainer import train
from g3n.stream.index import load_index
from g3n.tasks import TASKS
from g3n.train import load_config


def inject(task: Any, kind: str, calls: list[int]) -> None:
    whole, count = task.loss, itertools.count()

    def sleep_for_ever() -> None:
        while True:
            time.sleep(1)

    def loss(model: Any, batch: Any) -> Any:
        value, logs = whole(model, batch)
        if next(count) not in calls:
            return value, logs
        if kind == "stuck":
            sleep_for_ever()
        if kind == "slow":
            time.sleep(0.2)
            return value, logs
        return value * float("nan"), logs

    task.loss = loss


def main() -> int:
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    ranks = distributed.start()
    for job in jobs:
        config = load_config(job["config"], job["overrides"])
        index = load_index(config.data.shards)
        task = TASKS[config.task](config.model, index)
        fault = job.get("fault", {"rank": None})
        if fault["rank"] == ranks.rank:
            inject(task, fault["kind"], fault["calls"])
        code = train(config, task, index, ranks, job.get("resume", "auto"))
        if code:
            return code
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
