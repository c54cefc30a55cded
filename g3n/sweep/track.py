"""A study in MLflow: a run for the study, under it the runs that its trainings keep themselves.

The trainings open their own runs by a tag, whether the study's is there yet or not, so neither waits for the other. What a killed or
impatient training did not send is sent here, from its metrics.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from g3n.config import build, read_yaml, to_plain, write_yaml
from g3n.engine.checkpoint import flat
from g3n.sweep.plan import Plan
from g3n.sweep.process import Tail
from g3n.tracking import MLflowRun, TrackingConfig, describe_run, find_run, git_sha, log_rows, store_uri

_WAIT_SECONDS = 1.0  # of the first trial for the study's run; without it the trial is put under it later
_TRIAL_CLOSE_SECONDS = 1.0


class StudyTracker:
    def __init__(self, plan: Plan, uid: str) -> None:
        self.uid = uid
        self.begin = time.monotonic()
        folder = plan.sweep.folder
        base = build(TrackingConfig, plan.base["tracking"], "tracking")
        self.config = replace(base, uri=store_uri(folder, base), identity=uid)
        self._run: MLflowRun | None = None
        (folder / "sweep.yaml").write_text(write_yaml(plan.sweep))
        if base.mlflow:
            self._run = MLflowRun(folder, self.config, params(plan), None)
            self._run.artifact(folder / "sweep.yaml", "")

    def wait_briefly(self) -> None:
        """Until the study's run is known, but not long."""
        while self._run is not None and self._run.run_id is None and time.monotonic() < self.begin + _WAIT_SECONDS:
            time.sleep(0.02)

    def of_trial(self, config: TrackingConfig, number: int) -> dict[str, Any]:
        """The tracking section of a trial's config."""
        parent = self._run.run_id if self._run is not None else None
        mine = {"uri": self.config.uri, "identity": f"{self.uid}/{number}", "parent": parent}
        return {**to_plain(config), **mine, "close_seconds": min(config.close_seconds, _TRIAL_CLOSE_SECONDS)}

    def finished(self, trial: FrozenTrial, plan: Plan) -> None:
        """Put a finished trial's run under the study's, complete it, and add its value to the study. Telling twice changes nothing."""
        if self._run is None:
            return
        parent, folder = self._run, plan.trial_folder(trial.number)
        ended = trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0
        if trial.value is not None:
            parent.metrics(trial.number, {plan.sweep.metric: trial.value}, ended)

        def complete(client: Any) -> None:
            experiment = client.get_run(parent.run_id).info.experiment_id
            child = find_run(client, experiment, f"{self.uid}/{trial.number}")
            if child is None:  # tracking was off or away for as long as it trained
                tags = {"g3n.identity": f"{self.uid}/{trial.number}"}
                child = str(client.create_run(experiment, run_name=folder.name, tags=tags).info.run_id)
                if (folder / "config.yaml").is_file():
                    describe_run(client, child, folder, flat(read_yaml(folder / "config.yaml")))
            rows = Tail(folder / "metrics.jsonl").rows()
            if any(_missing(client, child, name, rows) for name in (plan.sweep.metric, "train/loss")):
                log_rows(client, child, rows)
            found = client.get_run(child)
            tags = {"mlflow.parentRunId": str(parent.run_id), "g3n.state": trial.state.name.lower()}
            tags |= {f"g3n.space.{key}": str(value) for key, value in trial.params.items()}
            for name, value in tags.items():
                if found.data.tags.get(name) != value:
                    client.set_tag(child, name, value)
            status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}.get(trial.state.name, "FAILED")
            if found.info.status != status:
                client.set_terminated(child, status)

        parent.do(complete)

    def close(self, files: Sequence[Path], finished: bool) -> None:
        if self._run is None:
            return
        for path in files:
            self._run.artifact(path, "")
        self._run.close("FINISHED" if finished else "KILLED")


def _missing(client: Any, run_id: str, name: str, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether MLflow lacks a step of a metric."""
    steps = {row["step"] for row in rows if name in row}
    return bool(steps) and not steps <= {metric.step for metric in client.get_metric_history(run_id, name)}


def params(plan: Plan) -> dict[str, Any]:
    """What a study is, as MLflow's parameters."""
    sweep = plan.sweep
    found: dict[str, Any] = {f"space.{key}": str(dimension) for key, dimension in sweep.space.items()}
    for name in ("sampler", "pruner"):
        found |= flat(to_plain(getattr(sweep, name)), f"{name}.")
    found |= {"metric": sweep.metric, "direction": sweep.direction, "trials": plan.trials, "world": sweep.world}
    found |= {"git_sha": git_sha(), "data_fingerprint": plan.data_fingerprint, "config_file": sweep.config}
    return found | {
        f"config.{key}": json.dumps(value) for key, value in flat(plan.base).items() if not key.startswith("tracking.")
    }
