"""Runs inside the launched ranks: trains a list of configurations one after the other in one process group.

``worker.py JOBS.json``: a list of {"config": YAML path, "overrides": [...], "resume": ...}. One launch for many runs, because
importing the stack costs more than twenty steps of a tiny model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from g3n.engine import distributed
from g3n.engine.trainer import train
from g3n.stream.index import load_index
from g3n.tasks import TASKS
from g3n.train import load_config


def main() -> int:
    jobs = json.loads(Path(sys.argv[-1]).read_text())
    ranks = distributed.start()
    for job in jobs:
        config = load_config(job["config"], job["overrides"])
        index = load_index(config.data.shards)
        code = train(config, TASKS[config.task](config.model, index), index, ranks, job.get("resume", "auto"))
        if code:
            return code
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
