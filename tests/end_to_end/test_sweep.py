"""Sweeps of real trainings whose driver and trials are killed, and what a user sees of a study in an MLflow server."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from g3n.config import write_yaml
from g3n.sweep.process import Process
from g3n.train import load_config
from tests import nano
from tests.launch import ROOT, environment
from tests.sweeps import Forked, Server

SWEEP: dict[str, Any] = {
    "name": "study", "metric": "val/masked", "trials": 4, "gpus": 0,
    "sampler": {"kind": "tpe", "seed": 1, "startup": 2}, "pruner": {"kind": "asha", "min_steps": 4, "factor": 2},
    "overrides": ["trainer.steps=12", "trainer.eval_every=4", "trainer.save_every=4", "trainer.panels=false"],
    "space": {
        "optim.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "model.mask_ratio": {"type": "categorical", "values": [0.5, 0.75]},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    nano.shards(root / "shards", train=6, val=2)
    nano.configs(root)
    return root


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def write(root: Path, runs: str, **changes: Any) -> Path:
    path = root / f"{runs}.yaml"
    path.write_text(write_yaml({**SWEEP, "config": f"{root}/mae.yaml", "runs": f"{root}/{runs}", **changes}))
    return path


def table(study: Path) -> list[dict[str, str]]:
    with open(study / "study.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "run", "deaths")} for row in csv.DictReader(file)]


def wait_for(
    condition: Callable[[], bool], driver: Forked | None = None, log: Path | None = None, seconds: float = 180
) -> None:
    until = time.monotonic() + seconds
    while not condition():
        told = log.read_text()[-3000:] if log is not None and log.is_file() else ""
        assert driver is None or driver.poll() is None, told
        assert time.monotonic() < until, told
        time.sleep(0.01)


def run(server: Server, path: Path) -> None:
    log = path.with_suffix(".log")
    assert server.driver([str(path)], log).wait() == 0, log.read_text()[-4000:]


def checkpoints(run: Path) -> int:
    return len(list(run.glob("ckpt/step_*/COMPLETE")))


def test_a_study_whose_driver_and_trial_were_killed_is_that_of_an_undisturbed_one(root: Path, server: Server) -> None:
    """Killed: the driver while trial 0 trains, which goes on by itself; trial 1 after its first checkpoint; the driver together with
    trial 2. The trials, their values to the last digit and the best config are those of the study that nobody touched."""
    run(server, write(root, "calm"))
    path = write(root, "hurt")
    log, study = path.with_suffix(".log"), root / "hurt" / "study"

    def start() -> Forked:
        return server.driver([str(path)], log)

    driver = start()
    wait_for((study / "trial_0000" / "metrics.jsonl").is_file, driver, log)
    driver.kill()
    driver = start()
    wait_for(lambda: checkpoints(study / "trial_0001") >= 1, driver, log)
    Process(study / "trial_0001").kill()
    wait_for((study / "trial_0002" / "metrics.jsonl").is_file, driver, log)
    driver.kill()
    Process(study / "trial_0002").kill()
    run(server, path)
    assert table(study) == table(root / "calm" / "study")
    assert table(study)[0]["state"] == "complete"
    assert len(table(study)) == 4
    best, calm = (load_config(root / name / "study" / "best.yaml") for name in ("hurt", "calm"))
    assert (best.optim, best.model, best.trainer) == (calm.optim, calm.model, calm.trainer)
    assert "still trains: gone on with" in log.read_text()
    logs = [(study / f"trial_{i:04d}" / "train.log").read_text() for i in range(4)]
    assert [text.count("a new run in") for text in logs[:2]] == [1, 1]  # none was trained twice from the start


def test_a_user_sweeps_by_the_command_and_ends_it_by_ctrl_c(root: Path) -> None:
    """``g3n sweep`` with ``deepspeed`` on two ranks; Ctrl-C, and the same line again."""
    path = write(root, "typed", trials=1, cpu_ranks=2, pruner={"kind": "none"})
    study = root / "typed" / "study"
    line = [sys.executable, "-m", "g3n.cli", "sweep", str(path)]
    steps = "overrides=[trainer.steps=120,trainer.eval_every=60,trainer.save_every=60,trainer.panels=false]"
    with subprocess.Popen([*line, steps], cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as driver:
        wait_for(
            lambda: (
                (study / "trial_0000" / "metrics.jsonl").is_file()
                and (study / "trial_0000" / "metrics.jsonl").stat().st_size > 0
            )
        )
        driver.send_signal(signal.SIGINT)
        assert driver.stderr
        told = driver.stderr.read()
        assert driver.wait(180) == 130, told
    assert "stopped with 0 of 1 trials finished" in told
    assert f"g3n sweep {path} '{steps}'' goes on" in told
    assert not Process(study / "trial_0000").alive()
    reached = int(sorted((study / "trial_0000" / "ckpt").glob("step_*"))[-1].name[5:])
    assert 0 < reached < 120
    again = subprocess.run([*line, steps], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "best: trial 0" in again.stdout
    assert (
        f"go on from '{study}/trial_0000/ckpt/step_{reached:08d}'" in (study / "trial_0000" / "train.log").read_text()
    )


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]], cwd=folder, env=environment(), stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait_for(answers, seconds=120)
    yield url
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_server_shows_the_study_with_its_trials_under_it(root: Path, server: Server, mlflow_server: str) -> None:
    """The driver is killed once and a trial once: both go on in the runs they had."""
    from mlflow.tracking import MlflowClient

    changes = [
        *SWEEP["overrides"],
        "tracking.mlflow=true",
        f"tracking.uri={mlflow_server}",
        "tracking.experiment=sweeps",
    ]
    path = write(root, "served", overrides=changes, trials=2)
    log, study = path.with_suffix(".log"), root / "served" / "study"
    driver = server.driver([str(path)], log)
    wait_for(lambda: checkpoints(study / "trial_0000") >= 1, driver, log)
    driver.kill()
    Process(study / "trial_0000").kill()
    run(server, path)

    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("sweeps")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert sorted(children) == ["trial_0000", "trial_0001"]
    assert len(runs) == 3
    assert (parent.info.run_name, parent.info.status) == ("study", "FINISHED")
    plan = json.loads((study / "plan.json").read_text())
    told = {
        "space.optim.lr": "float 0.0001 .. 0.01 log", "space.model.mask_ratio": "0.5 | 0.75", "sampler.kind": "tpe",
        "sampler.seed": "1", "pruner.kind": "asha", "metric": "val/masked", "trials": "2", "git_sha": plan["git_sha"],
        "data_fingerprint": plan["plan"]["data_fingerprint"], "config.trainer.steps": "12",
    }  # fmt: skip
    assert {name: parent.data.params.get(name) for name in told} == told
    assert (
        parent.data.params["data_fingerprint"]
        == json.loads((root / "shards" / "index.json").read_text())["fingerprint"]
    )
    values = {m.step: m.value for m in client.get_metric_history(parent.info.run_id, "val/masked")}
    rows = table(study)
    assert values == {int(row["trial"]): pytest.approx(float(row["value"])) for row in rows}
    artifacts = {f.path for f in client.list_artifacts(parent.info.run_id)}
    assert {"best.yaml", "study.csv", "sweep.png", "sweep.yaml"} <= artifacts
    if sum(row["state"] == "complete" for row in rows) > 1:
        assert "parallel_coordinates.png" in artifacts
    for row in rows:
        child = children[f"trial_{int(row['trial']):04d}"]
        assert child.data.tags["g3n.state"] == row["state"]
        assert child.info.status == {"complete": "FINISHED", "pruned": "KILLED"}[row["state"]]
        assert child.data.params["optim.lr"] == row["optim.lr"]
        lines = [json.loads(line) for line in (study / child.info.run_name / "metrics.jsonl").read_text().splitlines()]
        measured = {line["step"]: line["val/masked"] for line in lines if "val/masked" in line}
        history = client.get_metric_history(child.info.run_id, "val/masked")
        assert {m.step: m.value for m in history} == {step: pytest.approx(value) for step, value in measured.items()}


def test_a_server_that_never_answers_stops_no_sweep(root: Path, server: Server) -> None:
    """Connections are taken and left unanswered. Trials wait a second for it at their end, the driver a minute at its own."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        uri = f"tracking.uri=http://127.0.0.1:{silent.getsockname()[1]}"
        changes = [*SWEEP["overrides"], "tracking.mlflow=true", uri, "tracking.close_seconds=2"]
        path = write(root, "deaf", overrides=changes, trials=1)
        run(server, path)
    study = root / "deaf" / "study"
    assert len(table(study)) == 1
    assert "MLflow did not answer within 1 s" in (study / "trial_0000" / "train.log").read_text()
