"""The ablation's plan, its going on, and its figures. Trainings are stood in for by the two files that are read of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks import ablation
from g3n.cli import app
from g3n.config import G3nError
from g3n.train import load_config

WORDS = ["--tokenizer", "t", "--latents", "l", "--variants", "wide_head,multistep", "--seeds", "0,1,2"]
LOSSES = {"baseline": 1.0, "wide_head": 0.9}


def value(words: Sequence[str], key: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))


class Machine:
    """Stands for ``execute``: writes what a training and an evaluation leave, and remembers what it was asked."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.done: list[str] = []
        self.stop_after = stop_after

    def __call__(self, words: Sequence[str], log: Path) -> None:
        if len(self.done) >= self.stop_after:
            raise G3nError("stopped")
        if words[0] == "g3n/train.py":
            name, seed = value(words, "name"), int(value(words, "seed"))
            folder = Path(value(words, "runs")) / name
            folder.mkdir(parents=True)
            losses = [9.0, LOSSES[name.rpartition("-")[0]] + 0.1 * seed]
            rows: list[dict[str, float]] = [{"train/loss": 1.0}, *({"val/velocity": loss} for loss in losses)]
            (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        else:
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True)
            name = folder.name
            ratio = None if name == "multistep-1" else 3.0 + len(name)
            metrics = {"ventricle_ratio": ratio, "age_r": 0.5, "ventricle_ml_by_age": {"25": 10.0, "85": 40.0}}
            (folder / "metrics.json").write_text(json.dumps(metrics))
        self.done.append(folder.name if words[0] == "g3n/train.py" else f"evaluate {folder.name}")


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_is_one_that_training_and_sampling_know(name: str) -> None:
    variant = ablation.VARIANTS[name]
    config = load_config(ablation.ROOT / "configs/tiny/dit.yaml", variant.train)
    assert (config.model == load_config(ablation.ROOT / "configs/tiny/dit.yaml").model) is (not variant.train)
    words = ["evaluate", "generation", "--run", "nothing", "--output", "nowhere", *variant.sample]
    done = CliRunner().invoke(app, words)
    assert "'nothing'" in str(done.exception)  # options were understood; there is no such run


def test_the_plan_trains_each_training_once_and_the_baseline_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    monkeypatch.setattr(ablation, "execute", machine)
    assert ablation.main([*WORDS, "--output", str(tmp_path)]) == 0
    trained = [name for name in machine.done if not name.startswith("evaluate")]
    assert set(trained) == {f"{name}-{seed}" for name in ("baseline", "wide_head") for seed in (0, 1, 2)}
    measured = {name.removeprefix("evaluate ") for name in machine.done if name.startswith("evaluate")}
    assert measured == {f"{n}-{seed}" for n in ("baseline", "wide_head", "multistep") for seed in (0, 1, 2)}


def test_variants_of_one_seed_draw_from_the_same_noises_and_seeds_from_different_ones(tmp_path: Path) -> None:
    args = ablation.parse([*WORDS, "--output", str(tmp_path), "--count", "4"])
    seeds = {(j.variant, j.seed): j.evaluate[j.evaluate.index("--seed") + 1] for j in ablation.plan(args)}
    assert {seeds[name, 2] for name in ("baseline", "wide_head", "multistep")} == {"8"}
    assert len({seeds["baseline", seed] for seed in (0, 1, 2)}) == 3
    multistep = next(j for j in ablation.plan(args) if j.variant == "multistep")
    assert multistep.run.name == "baseline-0"
    assert multistep.evaluate[-4:] == ("--sampler", "multistep", "--steps", "49")


def test_figures_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses 1, 1.1, 1.2 and 0.9, 1, 1.1: means over seeds, the change -0.1 under each seed, a ratio that is missing left out."""
    monkeypatch.setattr(ablation, "execute", Machine())
    assert ablation.main([*WORDS, "--output", str(tmp_path)]) == 0
    with open(tmp_path / "ablation.csv") as file:
        rows = {(r["variant"], r["figure"]): r for r in csv.DictReader(file)}
    wide = rows["wide_head", "val_velocity"]
    assert float(wide["mean"]) == pytest.approx(1.0)
    assert [float(wide[f"change_{end}"]) for end in ("mean", "low", "high")] == pytest.approx([-0.1] * 3)
    assert 0.9 <= float(wide["low"]) < 1.0 < float(wide["high"]) <= 1.1
    assert float(rows["multistep", "val_velocity"]["change_mean"]) == 0
    ratio = rows["multistep", "ventricle_ratio"]
    assert (ratio["seeds"], float(ratio["mean"])) == ("2", 14.0)
    assert float(ratio["change_mean"]) == len("multistep") - len("baseline")
    assert np.isnan(float(rows["baseline", "age_r"]["change_mean"]))
    with open(tmp_path / "runs.csv") as file:
        assert len(list(csv.DictReader(file))) == 9


def test_it_goes_on_where_it_stopped_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Machine(stop_after=6)  # three baselines, trained and measured
    monkeypatch.setattr(ablation, "execute", first)
    assert ablation.main([*WORDS, "--output", str(tmp_path)]) == 2
    second = Machine()
    monkeypatch.setattr(ablation, "execute", second)
    assert ablation.main([*WORDS, "--output", str(tmp_path)]) == 0
    assert not {*first.done} & {*second.done}
    third = Machine()
    monkeypatch.setattr(ablation, "execute", third)
    assert ablation.main([*WORDS, "--output", str(tmp_path), "--seeds", "0,1,2,3"]) == 0  # more seeds are welcome
    assert {name.removeprefix("evaluate ")[-1] for name in third.done} == {"3"}
    assert ablation.main([*WORDS, "--output", str(tmp_path), "trainer.steps=5"]) == 2
    assert "holds runs of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "wide_heads"], "did you mean 'wide_head'?"),
        (["--seeds", "0,0"], "must be different ones"),
        (["--seeds", "a"], "are not whole numbers"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert ablation.main([*WORDS, "--output", str(tmp_path / "new"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_failed_command_is_named_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match=r"ended with 3 \(the reason\); see '.*log'"):
        ablation.execute(["-c", "import sys; print('the reason'); sys.exit(3)"], tmp_path / "logs/log")
