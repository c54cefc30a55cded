"""``mlflow run``: each entry's line is one that its command takes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from g3n.sweep.plan import load_sweep
from g3n.train import load_config, parse
from tests.launch import ROOT, environment


def words(entry: str, **parameters: str) -> list[str]:
    """The words bash makes of an entry's command."""
    from mlflow.projects._project_spec import load_project

    command = load_project(str(ROOT)).get_entry_point(entry).compute_command(parameters, None)
    line = ["bash", "-c", f"printf '%s\\n' {command}"]
    return subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()


@pytest.mark.parametrize("task", ["mae", "decoder", "dit", "forecast"])
def test_training_entries_train_their_task_with_any_overrides(task: str) -> None:
    assert words(task)[:2] == ["deepspeed", "g3n/train.py"]
    args = parse(words(task)[2:])
    assert (args.config, args.overrides) == (f"configs/{task}.yaml", [])
    assert load_config(args.config).task == task
    args = parse(words(task, config=f"configs/tiny/{task}.yaml", overrides="optim.lr=1e-4 optim.betas=[0.8,0.9]")[2:])
    config = load_config(args.config, args.overrides)
    assert (config.runs, config.optim.lr, config.optim.betas) == ("runs/demo", 1e-4, (0.8, 0.9))


def test_the_other_entries() -> None:
    sweep = words("sweep", config="configs/sweeps/tiny/dit.yaml", overrides="trials=3 parallel=2")
    assert sweep[:4] == ["python", "-m", "g3n.cli", "sweep"]
    assert load_sweep(sweep[4], sweep[5:]).trials == 3
    assert load_sweep(words("sweep")[4]).name == "sweep-dit"
    assert words("probe", options="--features f.parquet --id subject")[3:] == [
        "probe",
        "--features",
        "f.parquet",
        "--id",
        "subject",
    ]
    assert words("demo", seed="1") == ["python", "examples/demo.py", "--seed", "1"]
    assert (ROOT / words("demo")[1]).is_file()


def test_mlflow_runs_an_entry(tmp_path: Path) -> None:
    shutil.copy(ROOT / "MLproject", tmp_path)
    for name in ("g3n", "kernels", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    mlflow = Path(sys.executable).with_name("mlflow")
    line = [
        str(mlflow),
        "run",
        str(tmp_path),
        "-e",
        "mae",
        "--env-manager",
        "local",
        "-P",
        "config=configs/tiny/mae.yaml",
    ]
    env = {**environment(), "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    done = subprocess.run(
        [*line, "-P", "overrides=optim.lr=3e-4 --print-config"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lr: 0.0003" in done.stdout
    assert "task: mae" in done.stdout
