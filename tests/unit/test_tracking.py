"""metrics.jsonl always; MLflow beside it; nothing of it may stop a run."""

from __future__ import annotations

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from g3n import tracking
from g3n.tracking import Tracker, TrackingConfig


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def prepared(tmp_path: Path) -> Path:
    run = tmp_path / "mae"
    run.mkdir()
    (run / "config.yaml").write_text("task: mae\n")
    (run / "env.json").write_text("{}")
    return run


def test_metrics_parameters_and_pictures_reach_mlflow_and_the_run_folder(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = prepared(tmp_path)
    tracker = Tracker(run, TrackingConfig(), {"optim.lr": 0.1}, step=0, run_id=None)
    tracker.metrics(1, {"train/loss": 0.5})
    tracker.metrics(2, {"train/loss": 0.25})
    tracker.picture(2, "seen", np.arange(64, dtype=np.uint8).reshape(8, 8))
    tracker.close(finished=True)
    assert [r["train/loss"] for r in rows(run)] == [0.5, 0.25]
    assert (run / "samples" / "step_00000002_seen.png").is_file()
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (entry,) = client.search_runs([client.get_experiment_by_name("g3n").experiment_id])
    assert entry.info.run_id == tracker.run_id
    assert entry.info.status == "FINISHED"
    assert entry.data.params == {"optim.lr": "0.1"}
    history = client.get_metric_history(entry.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.5), (2, 0.25)]
    names = {f.path for f in client.list_artifacts(entry.info.run_id)}
    assert names == {"config.yaml", "env.json", "samples"}
    assert "git_sha" in entry.data.tags


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path: Path) -> None:
    run = prepared(tmp_path)
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "tra')
    tracker = Tracker(run, TrackingConfig(mlflow=False), {}, step=2, run_id=None)
    tracker.metrics(3, {"train/loss": 1.0})
    tracker.close(finished=True)
    assert [r["step"] for r in rows(run)] == [1, 2, 3]


def test_a_dead_server_costs_a_warning_and_no_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = prepared(tmp_path)
    with caplog.at_level(logging.WARNING):
        tracker = Tracker(run, TrackingConfig(uri="http://127.0.0.1:9"), {}, step=0, run_id=None)
        tracker.metrics(1, {"train/loss": 0.5})
        tracker.close(finished=True)
    assert [r["train/loss"] for r in rows(run)] == [0.5]
    assert "MLflow is off for this run" in caplog.text


class Answers(BaseHTTPRequestHandler):
    """500 to everything, or silence."""

    silent = False

    def do_GET(self) -> None:
        if self.silent:
            time.sleep(30)
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", ["500", "slow"])
def test_a_server_that_answers_500_or_not_at_all_costs_a_warning_and_no_metric(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(Answers, "silent", kind == "slow")
    run = prepared(tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with caplog.at_level(logging.WARNING):
        config = TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}", close_seconds=2)
        tracker = Tracker(run, config, {}, step=0, run_id=None)
        for step in range(1, 201):
            tracker.metrics(step, {"train/loss": 0.5})
        tracker.close(finished=True)
    server.shutdown()
    assert [r["step"] for r in rows(run)] == list(range(1, 201))
    assert ("MLflow is off for this run" if kind == "500" else "MLflow did not answer within 2 s") in caplog.text


def test_a_server_that_comes_back_misses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(tracking, "_RETRY_SECONDS", (0.01,) * 5)
    whole, failures = MlflowClient.log_batch, iter([True, True, False, True] + [False] * 1000)

    def log_batch(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("metrics") and next(failures):
            raise ConnectionError("the server is being restarted")
        return whole(*args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    tracker = Tracker(prepared(tmp_path), TrackingConfig(), {}, step=0, run_id=None)
    for step in range(1, 6):
        tracker.metrics(step, {"train/loss": float(step)})
    assert tracker._mlflow is not None
    while not tracker._mlflow._queue.empty():
        time.sleep(0.05)
    tracker.close(finished=True)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert [m.step for m in client.get_metric_history(tracker.run_id or "", "train/loss")] == [1, 2, 3, 4, 5]


def test_a_process_that_was_killed_leaves_a_run_that_the_next_one_finds_by_its_tag(tmp_path: Path) -> None:
    """As in a sweep: no checkpoint has the id yet, the study's run is known to the second process alone, a row is sent twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = TrackingConfig(identity="abc/1", uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    first = tracking.MLflowRun(prepared(tmp_path), config, {"optim.lr": 0.1, "tracking.parent": None}, None)
    first.metrics(1, {"train/loss": 0.5}, 12.5)
    first.do(lambda _: first._queue.put(None))  # the thread ends, and nobody says that the run has
    first._thread.join(60)
    second = tracking.MLflowRun(tmp_path / "mae", config, {"optim.lr": 0.1, "seed": 0, "tracking.parent": "x"}, None)
    second.metrics(1, {"train/loss": 0.5}, 12.5)
    second.metrics(2, {"train/loss": 0.25}, 13.5)
    second.close("FINISHED")
    (entry,) = client.search_runs([client.get_experiment_by_name("g3n").experiment_id])
    assert first.run_id == second.run_id == entry.info.run_id
    assert entry.info.status == "FINISHED"
    assert entry.data.params == {"optim.lr": "0.1", "seed": "0"}
    history = client.get_metric_history(entry.info.run_id, "train/loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [(1, 0.5, 12500), (2, 0.25, 13500)]
    assert client.get_experiment_by_name("g3n").artifact_location == (tmp_path / "mlartifacts").as_uri()
