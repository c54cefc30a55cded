"""What a run leaves behind for people: metrics.jsonl always, MLflow where it works. Only rank 0 tracks.

MLflow runs in a thread of its own: a slow, broken or missing tracking server never slows or stops training.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

log = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_METRICS = 1000  # of one call, says MLflow's REST API
_RETRY_SECONDS = (
    1.0,
    5.0,
    25.0,
    125.0,
    625.0,
)  # a server that is started again within a quarter of an hour misses nothing


@dataclass(frozen=True)
class TrackingConfig:
    mlflow: bool = True
    uri: str | None = None  # default: sqlite in the runs folder
    experiment: str = "g3n"
    close_seconds: float = 60.0  # that the end of a run waits at most for a server; metrics.jsonl holds everything
    identity: str | None = None  # set by g3n sweep: an MLflow run with this tag g3n.identity is gone on with
    parent: str | None = None  # set by g3n sweep: the MLflow run that this one is shown under

    def __post_init__(self) -> None:
        if self.close_seconds < 0:
            raise ValueError(f"close_seconds {self.close_seconds} must be >= 0")


class Tracker:
    """metrics.jsonl and pictures in the run folder, and the same in MLflow."""

    def __init__(
        self, run: Path, config: TrackingConfig, params: Mapping[str, Any], step: int, run_id: str | None
    ) -> None:
        self.run = run
        run.mkdir(parents=True, exist_ok=True)
        _keep_until(run / "metrics.jsonl", step)
        self._file = open(run / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (closed in close)
        self._mlflow = MLflowRun(run, config, params, run_id) if config.mlflow else None

    @property
    def run_id(self) -> str | None:
        return self._mlflow.run_id if self._mlflow else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time(), 3)
        self._file.write(json.dumps({"step": step, "time": now, **values}) + "\n")
        if self._mlflow:
            self._mlflow.metrics(step, values, now)

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """What a person should know of later, as a line of events.jsonl: a skipped step, a spike with its samples, a failed save."""
        with open(self.run / "events.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), "kind": kind, **facts}) + "\n")

    def picture(self, step: int, name: str, gray: np.ndarray) -> None:
        """``gray`` uint8 [height, width] -> samples/step_<step>_<name>.png."""
        from matplotlib.image import imsave

        path = self.run / "samples" / f"step_{step:08d}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        imsave(path, gray, cmap="gray", vmin=0, vmax=255)
        self.artifact(path, "samples")

    def artifact(self, path: Path, folder: str = "") -> None:
        if self._mlflow:
            self._mlflow.artifact(path, folder)

    def close(self, finished: bool) -> None:
        self._file.close()
        if self._mlflow:
            self._mlflow.close("FINISHED" if finished else "KILLED")


def log_evaluation(
    run: Path, config: TrackingConfig, run_id: str, step: int, values: Mapping[str, float], page: Path
) -> None:
    """Add the figures of an evaluation and its page to the MLflow run of a training; a server that is away costs a warning."""
    mlflow = MLflowRun(run, config, {}, run_id)
    mlflow.metrics(step, values, time.time())
    mlflow.artifact(page, "report")
    mlflow.close("FINISHED")


class MLflowRun:
    """One thread that owns the MLflow client; ``run_id`` is known soon after the start, or never."""

    def __init__(self, run: Path, config: TrackingConfig, params: Mapping[str, Any], run_id: str | None) -> None:
        self.run_id = run_id
        self._close_seconds = config.close_seconds
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(run, config, dict(params)), daemon=True)
        self._thread.start()

    def metrics(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """``seconds`` is the time of day; the same values of the same time are kept once."""
        row = {"step": step, "time": seconds, **values}
        self._queue.put(lambda client: log_rows(client, str(self.run_id), [row]))

    def do(self, job: Callable[[Any], None]) -> None:
        """Have ``job`` called with the ``MlflowClient``, after what was asked before; again where it raises."""
        self._queue.put(job)

    def artifact(self, path: Path, folder: str) -> None:
        self._queue.put(lambda client: client.log_artifact(self.run_id, str(path), folder or None))

    def close(self, status: str) -> None:
        self._closing.set()
        self._queue.put(lambda client: client.set_terminated(self.run_id, status))
        self._queue.put(None)
        self._thread.join(self._close_seconds)
        if self._thread.is_alive():
            log.warning("MLflow did not answer within %.0f s; metrics.jsonl holds everything", self._close_seconds)

    def _work(self, run: Path, config: TrackingConfig, params: dict[str, Any]) -> None:
        try:
            client = self._patiently(lambda: self._open(run, config, params))
            while (job := self._queue.get()) is not None:
                self._patiently(functools.partial(job, client))
        except Exception as error:  # tracking must never stop training, whatever a plugin or server throws
            reason = " ".join(str(error).split())[:200]
            log.warning("MLflow is off for this run (%s: %s); metrics.jsonl goes on", type(error).__name__, reason)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Try again and again, but not while the run waits to end."""
        for seconds in _RETRY_SECONDS:
            try:
                return call()
            except Exception as error:  # whatever a plugin or server throws
                if self._closing.is_set():
                    raise
                reason = " ".join(str(error).split())[:200]
                log.warning("MLflow does not take what it is given (%s: %s)", type(error).__name__, reason)
                self._closing.wait(seconds)
        return call()

    def _open(self, run: Path, config: TrackingConfig, params: dict[str, Any]) -> Any:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        from mlflow.tracking import MlflowClient

        client = MlflowClient(store_uri(run, config))
        experiment = client.get_experiment_by_name(config.experiment)
        if experiment is None:
            experiment_id = client.create_experiment(config.experiment, artifact_location=_artifacts(run, config))
        else:
            experiment_id = experiment.experiment_id
        if self.run_id is None and config.identity is not None:
            self.run_id = find_run(client, experiment_id, config.identity)
        elif self.run_id is not None:
            client.update_run(self.run_id, status="RUNNING")
            return client
        if self.run_id is None:
            tags = {"g3n.identity": config.identity, "mlflow.parentRunId": config.parent}
            tags = {name: value for name, value in tags.items() if value is not None}
            self.run_id = client.create_run(experiment_id, run_name=run.name, tags=tags).info.run_id
        client.update_run(self.run_id, status="RUNNING")
        describe_run(client, self.run_id, run, params)
        return client


def store_uri(run: Path, config: TrackingConfig) -> str:
    """The MLflow store of a run folder: ``config.uri``, or a database in the folder of runs."""
    return config.uri or f"sqlite:///{run.parent.resolve() / 'mlflow.db'}"


def _artifacts(run: Path, config: TrackingConfig) -> str | None:
    """Where files go: beside a database; a server decides itself."""
    uri = store_uri(run, config)
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def find_run(client: Any, experiment_id: str, identity: str) -> str | None:
    """The id of the MLflow run whose tag g3n.identity this is."""
    found = client.search_runs([experiment_id], filter_string=f"tags.`g3n.identity` = '{identity}'")
    return str(min(found, key=lambda run: run.info.start_time).info.run_id) if found else None


def describe_run(client: Any, run_id: str, run: Path, params: Mapping[str, Any]) -> None:
    """Parameters that are not there yet (a killed process may have sent some), the run folder's config and environment, the commit."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    items = [Param(k, str(v)[:500]) for k, v in params.items() if k not in known and not k.startswith("tracking.")]
    for i in range(0, len(items), 100):
        client.log_batch(run_id, params=items[i : i + 100])
    for name in ("config.yaml", "env.json"):
        if (run / name).is_file():
            client.log_artifact(run_id, str(run / name))
    client.set_tag(run_id, "git_sha", git_sha())


def log_rows(client: Any, run_id: str, rows: Sequence[Mapping[str, float]]) -> None:
    """Rows of metrics.jsonl as metrics. A row that MLflow has already is not kept twice."""
    from mlflow.entities import Metric

    found = [
        Metric(name, float(value), round(1000 * row["time"]), int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    ]
    for i in range(0, len(found), _MOST_METRICS):
        client.log_batch(run_id, metrics=found[i : i + _MOST_METRICS])


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``: a resumed run writes them again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue  # a line cut by a kill
    part = path.with_name(".metrics.jsonl.part")
    part.write_text("".join(f"{line}\n" for line in kept))
    os.replace(part, path)


def git_sha() -> str:
    """The commit of the checkout g3n was imported from, "+" appended where it has changes; "unknown" outside git."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run[0].strip() + ("+" if run[1].strip() else "")


def environment() -> dict[str, Any]:
    """Versions and hardware of this process, for env.json."""
    import torch

    packages = {}
    for name in ("torch", "deepspeed", "triton", "xformers", "webdataset", "monai", "numpy", "mlflow", "nibabel"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "missing"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "git_sha": git_sha(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "gpus": gpus,
        "cores": os.cpu_count(),
        "packages": packages,
    }
