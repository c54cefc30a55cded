"""``g3n compare`` on run folders and MLflow runs with known curves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from g3n.cli import app
from g3n.compare import compare, config_differences, last_and_best
from g3n.config import G3nError, write_yaml
from g3n.evaluate.intervals import Interval
from g3n.evaluate.report import write_json

VAL = [1.0, 0.5, 0.25, 0.75]


def run(folder: Path, lr: float, scale: float, **more: Any) -> Path:
    """A run folder whose validation error is ``scale`` * VAL at steps 10 to 40, and lowest at 30."""
    folder.mkdir(parents=True)
    tree = {"name": folder.name, "runs": "r", "task": "mae", "optim": {"lr": lr, "betas": [0.9, 0.95]}, **more}
    (folder / "config.yaml").write_text(write_yaml({**tree, "tracking": {"experiment": folder.name}}))
    (folder / "env.json").write_text(json.dumps({"git_sha": f"sha{lr}", "world": 2, "device": "cpu", "python": "3"}))
    rows: list[dict[str, float]] = [
        {"step": s, "time": s, "train/loss": scale * s, "system/rank0/rss": 1.0} for s in range(1, 41)
    ]
    rows += [
        {"step": 10 * (i + 1), "time": 0.0, "val/masked": scale * v, "val/masked_by_sex/F": 1.0}
        for i, v in enumerate(VAL)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 41, "tra')
    return folder


def test_what_differs_the_curves_and_the_last_and_lowest_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = run(tmp_path / "a", 1e-7, 1.0), run(tmp_path / "b", 2e-7, 2.0, seed=3)
    found = {"run": str(a), "split": "val", "psnr_db": Interval(20.0, 19.0, 21.5, 30, 10), "n": 3}
    write_json(tmp_path / "evaluations" / "reconstruction" / "metrics.json", found)
    of_step = {
        "run": str(b / "ckpt" / "step_00000040"),
        "by_sex": {"F": {"psnr_db": Interval(22.0, 21.0, 23.0, 30, 10)}},
    }
    write_json(tmp_path / "evaluations" / "other" / "metrics.json", of_step)
    write_json(tmp_path / "evaluations" / "foreign" / "metrics.json", {"run": "elsewhere", "psnr_db": found["psnr_db"]})
    out = tmp_path / "out"
    compare([str(a), str(b)], out, None, [tmp_path / "evaluations"], [])
    tree = json.loads((out / "compare.json").read_text())
    assert tree["config"] == {
        "git_sha": {"a": "sha1e-07", "b": "sha2e-07"},
        "optim.lr": {"a": "1e-07", "b": "2e-07"},
        "seed": {"a": None, "b": "3"},
    }
    assert tree["metrics"] == {
        "val/masked": {
            "a": {"last": 0.75, "step": 40, "best": 0.25, "best_step": 30},
            "b": {"last": 1.5, "step": 40, "best": 0.5, "best_step": 30},
        },
        "train/loss": {"a": {"last": 40.0, "step": 40}, "b": {"last": 80.0, "step": 40}},
    }
    assert tree["evaluations"] == {
        "reconstruction/psnr_db": {"a": {"value": 20.0, "low": 19.0, "high": 21.5}},
        "other/by_sex/F/psnr_db": {"b": {"value": 22.0, "low": 21.0, "high": 23.0}},
    }
    with open(out / "compare.csv") as file:
        rows = list(csv.DictReader(file))
    assert {(r["kind"], r["name"], r["run"], r["value"]) for r in rows} >= {
        ("config", "optim.lr", "a", "1e-07"),
        ("metric", "val/masked", "b", "1.5"),
        ("evaluation", "reconstruction/psnr_db", "a", "20.0"),
    }
    assert (out / "compare.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    for text in ("optim.lr", "0.75 (0.25 at 30)", "20 [19, 21.5]"):
        assert text in printed


def test_runs_of_one_name_are_told_apart_and_patterns_choose_metrics(tmp_path: Path) -> None:
    a, b = run(tmp_path / "x" / "mae", 1.0, 1.0), run(tmp_path / "y" / "mae", 1.0, 1.0)
    compare([str(a), str(b)], tmp_path / "out", None, [], ["*_by_sex/*"])
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(tree["runs"]) == ["x/mae", "y/mae"]
    assert list(tree["metrics"]) == ["val/masked_by_sex/F"]
    assert tree["config"] == {}


def test_an_mlflow_run_is_that_of_its_folder(tmp_path: Path) -> None:
    from g3n.config import read_yaml
    from g3n.engine.checkpoint import flat
    from g3n.tracking import Tracker, TrackingConfig

    folder = run(tmp_path / "a", 1e-7, 1.0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
    (folder / "metrics.jsonl").unlink()
    tracker = Tracker(folder, TrackingConfig(), flat(read_yaml(folder / "config.yaml")), 0, None)
    for line in lines:
        tracker.metrics(line["step"], {k: v for k, v in line.items() if k not in ("step", "time")})
    tracker.close(True)
    assert tracker.run_id
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    compare([str(folder), tracker.run_id], tmp_path / "out", uri, [], ["val/*", "train/*"])
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(tree["config"]) == {"git_sha"}  # the folder's was made up
    for found in tree["metrics"].values():
        (one, other) = found.values()
        assert one == other
    assert set(tree["metrics"]) == {"val/masked", "train/loss", "val/masked_by_sex/F"}
    with pytest.raises(G3nError, match=f"MLflow run '{'0' * 32}' cannot be read"):
        compare([str(folder), "0" * 32], tmp_path / "out", uri, [], [])


def test_figures_that_are_not_finite_are_left_out_of_the_lowest() -> None:
    assert last_and_best("val/x", [(1, float("nan")), (2, 3.0), (3, 2.0), (4, float("inf"))])["best_step"] == 3
    assert config_differences([]) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{a}"], "1 run given; name two or more"),
        (["{a}", "{a}"], "a run is given twice"),
        (["{a}", "nowhere"], "'nowhere' is no run folder; an MLflow run id needs --tracking-uri"),
        (["{a}", "nowhere", "--tracking-uri", "sqlite:///x.db"], "and no MLflow run id"),
        (["{a}", "{empty}"], "has no config.yaml and metrics.jsonl"),
        (
            ["{a}", "{b}", "--metric", "val/none"],
            "no metric matches val/none; there are: system/rank0/rss, train/loss, val/masked",
        ),
        (["{a}", "{b}", "--evaluations", "nowhere"], "--evaluations 'nowhere' is no folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    places = {name: str(run(tmp_path / name, 1.0, 1.0)) for name in ("a", "b")}
    (tmp_path / "empty").mkdir()
    line = [word.format(**places, empty=tmp_path / "empty") for word in words]
    done = CliRunner().invoke(app, ["compare", *line, "--output", str(tmp_path / "out")])
    assert isinstance(done.exception, G3nError)
    assert message in str(done.exception)
    assert not (tmp_path / "out").exists()
