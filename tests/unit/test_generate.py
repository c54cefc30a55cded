"""Sampling from an untrained generator: sweeps, guidance and its interval, the run's own time shift, what is written."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from g3n import outputs
from g3n.cli import app, interval_of
from g3n.config import G3nError, build
from g3n.evaluate import generation
from g3n.evaluate.anatomy import AnatomyML
from g3n.evaluate.report import claim
from g3n.generate import Generator, open_generator, sample, sample_latents
from g3n.latent import LatentSpace
from g3n.models.dit import DiT, DiTConfig
from g3n.outputs import read_sweep, swept
from tests import shards
from tests.unit.test_encode import save_run, scan, tokenizer_run

NET: dict[str, Any] = {"tokens": [2, 3, 4], "channels": 3, "width": 12, "depth": 1, "heads": 2, "mlp": 24}
NET["variables"] = {
    "modality": {"levels": ["T1"]},
    "age_years": {"low": 0, "high": 110},
    "sex": {"levels": ["F", "M"]},
    "diagnosis": {"levels": ["HC", "AD"]},
}


def dit_run(root: Path, name: str, tokenizer: Path, **model: Any) -> Path:
    """A run whose every variable acts: weights of adaLN-Zero would hide them."""
    torch.manual_seed(0)
    net = DiT(build(DiTConfig, NET))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    artifact = {
        "tokenizer": LatentSpace.open(tokenizer).tokenizer_fingerprint,
        "grid": {"shape": list(shards.SHAPE), "affine": shards.AFFINE},
    }
    save_run(root / name, "dit", {"tokenizer": str(tokenizer), "net": NET, **model}, net, artifact)
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    volumes = shards.write(root / "shards", "volume", train=[[scan(1, 1, "T1")]])
    tokenizer = tokenizer_run(root, volumes)
    dit_run(root, "dit", tokenizer)
    dit_run(root, "shifted", tokenizer, time_shift=3.0)
    return root


def g3n(*words: str) -> None:
    """A ``g3n`` command in this process; its error is raised here."""
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None:
        raise done.exception


class Counting(nn.Module):
    """The model, and at which times it was asked under variables and under none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.asked: Counter[tuple[str, float]] = Counter()

    def forward(self, x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor) -> Tensor:
        self.asked["null" if bool(cond_BV.isnan().all()) else "given", round(float(t_B[0]), 3)] += 1
        return self.model(x_BNC, t_B, cond_BV)

    def times(self, which: str) -> list[float]:
        return sorted(t for name, t in self.asked.elements() if name == which)


def counted(generator: Generator) -> tuple[Generator, Counting]:
    model = Counting(generator.model)
    return dataclasses.replace(generator, model=model), model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("age_years=20:90:10", ("age_years", [20, 30, 40, 50, 60, 70, 80, 90])),
        ("age_years=20:90:30", ("age_years", [20, 50, 80])),
        ("x=0:0.3:0.1", ("x", [0, 0.1, 0.2, 0.3])),
        ("age_years=70:70:5", ("age_years", [70])),
        ("diagnosis=HC,AD", ("diagnosis", ["HC", "AD"])),
        ("sex=F, n/a", ("sex", ["F", None])),
    ],
)
def test_values_of_a_sweep(text: str, expected: tuple[str, list[Any]]) -> None:
    assert read_sweep(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age_years", "is not name=start:stop:step or name=value,value"),
        ("=1,2", "is not name="),
        ("sex=F,,M", "is not name="),
        ("age_years=20:90", "of three numbers, such as age_years=20:90:10"),
        ("age_years=a:b:c", "of three numbers"),
        ("age_years=90:20:10", "needs start <= stop and a step > 0"),
        ("age_years=20:90:0", "a step > 0"),
        ("age_years=nan:90:1", "needs start <= stop"),
        ("age_years=0:1:1e-320", "more than 1000 values"),
    ],
)
def test_impossible_sweeps(text: str, message: str) -> None:
    with pytest.raises(G3nError, match=message):
        read_sweep(text)


def test_a_sweep_changes_its_variable_under_each_seed() -> None:
    made = swept([{"sex": "F"}], ("age_years", [20.0, 30.0]), count=2)
    assert made == [{"sex": "F", "age_years": age} for age in (20.0, 30.0, 20.0, 30.0)]
    with pytest.raises(G3nError, match="'age_years' is given and swept"):
        swept([{"age_years": 20}], ("age_years", [20.0]), 1)


def test_sweep_of_an_age(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seeds under each age, each volume that of its own conditions and seed alone, columns in sweep order."""
    columns: list[str] = []
    monkeypatch.setattr(outputs, "write_montage", lambda _, shown: columns.extend(label for label, _ in shown))
    g3n("sample", "--run", f"{root}/dit", "--sex", "F", "--sweep", "age_years=20:100:40", "--count", "2", "--seed", "7",
        "--steps", "2", "--output", f"{root}/sweep", "--batch", "4", "--device", "cpu")  # fmt: skip
    made = json.loads((root / "sweep/samples.json").read_text())["volumes"]
    assert [(m["seed"], m["conditions"]["age_years"]) for m in made] == [(s, a) for s in (7, 8) for a in (20, 60, 100)]
    assert columns == [f"F {age}" for age in (20, 60, 100)] * 2
    alone = next(sample(open_generator(root / "dit", "cpu"), [{"sex": "F", "age_years": 60}], [8], steps=2))
    volume = outputs._back(root / "sweep" / made[4]["file"], outputs.BRAIN_MEAN, outputs.BRAIN_STD)
    assert np.allclose(volume, alone, atol=1e-3)
    others = [outputs.read_volume(root / "sweep" / m["file"])[0] for m in made]
    assert all(not np.allclose(a, b, atol=1.0) for i, a in enumerate(others) for b in others[:i])


def test_sweep_of_a_class_with_null(root: Path) -> None:
    g3n("sample", "--run", f"{root}/dit", "--sweep", "diagnosis=HC,AD,n/a", "--steps", "1", "--output",
        f"{root}/classes", "--device", "cpu")  # fmt: skip
    made = json.loads((root / "classes/samples.json").read_text())["volumes"]
    assert [(m["seed"], m["conditions"]) for m in made] == [(0, {"diagnosis": d}) for d in ("HC", "AD", None)]
    assert (root / "classes/montage.png").stat().st_size > 1000


def test_a_long_sweep_shows_its_ends_and_some_between(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[str] = []
    monkeypatch.setattr(outputs, "write_montage", lambda _, shown: columns.extend(label for label, _ in shown))
    ages = [{"age_years": float(age)} for age in range(40)]
    outputs.write_samples(open_generator(root / "dit", "cpu"), ages, root / "long", steps=1, batch=40, alike=40)
    assert len(columns) == 2 * outputs.SHOWN
    assert (columns[0], columns[-1]) == ("0", "39")
    assert columns == sorted(columns, key=float)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sweep", "age_years=20:200:10"), "age_years is 120; allowed range is 0 to 110"),
        (("--sweep", "diagnosis=HC,PD"), "diagnosis is 'PD'; known: AD, HC"),
        (("--sweep", "agee=1,2"), "unknown variable 'agee'; did you mean 'age_years'"),
        (("--sweep", "age_years=1,2", "--age", "3"), "variable 'age_years' is given and swept"),
        (("--guidance-interval", "0.9,0.2"), "must be low,high with 0 <= low <= high <= 1"),
        (("--guidance-interval", "0.2"), "is not low,high such as 0.2,0.9"),
        (("--shift", "0"), "--shift 0 must be above 0"),
    ],
)
def test_impossible_options_write_nothing(root: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(G3nError, match=message):
        g3n("sample", "--run", f"{root}/dit", "--output", f"{root}/refused", "--device", "cpu", *words)
    assert not (root / "refused").exists()


def test_the_null_velocity_is_asked_for_inside_the_interval_only(root: Path) -> None:
    generator, model = counted(open_generator(root / "dit", "cpu"))
    options: dict[str, Any] = {"steps": 10, "guidance": 3.0, "sampler": "euler", "interval": interval_of("0.2,0.5")}
    inside = next(sample(generator, [{"age_years": 70}], [0], **options))
    assert model.times("null") == [0.2, 0.3, 0.4, 0.5]
    assert model.times("given") == [i / 10 for i in range(10)]
    everywhere = next(sample(generator, [{"age_years": 70}], [0], **{**options, "interval": (0.0, 1.0)}))
    nowhere = next(sample(generator, [{"age_years": 70}], [0], **{**options, "interval": (0.95, 1.0)}))
    unguided = next(sample(generator, [{"age_years": 70}], [0], **{**options, "guidance": 1.0}))
    assert np.array_equal(nowhere, unguided)
    assert not np.allclose(inside, everywhere)
    assert not np.allclose(inside, nowhere)


def test_steps_follow_the_shift_of_training_or_the_given_one(root: Path) -> None:
    generator, model = counted(open_generator(root / "shifted", "cpu"))
    next(sample(generator, [{"sex": "F"}], [0], steps=4, guidance=1.0, sampler="euler"))
    assert model.times("given") == [0.0, 0.1, 0.25, 0.5]  # t / (t + 3 (1 - t))
    model.asked.clear()
    next(sample(generator, [{"sex": "F"}], [0], steps=4, guidance=1.0, sampler="euler", shift=1.0))
    assert model.times("given") == [0.0, 0.25, 0.5, 0.75]


def test_the_options_stand_in_the_json(root: Path) -> None:
    g3n("sample", "--run", f"{root}/shifted", "--sex", "M", "--guidance-interval", "0.2,0.9", "--sampler", "multistep",
        "--steps", "3", "--output", f"{root}/options", "--device", "cpu")  # fmt: skip
    record = json.loads((root / "options/samples.json").read_text())
    assert (record["guidance_interval"], record["sampler"], record["shift"]) == ([0.2, 0.9], "multistep", 3.0)
    assert not math.isnan(outputs.read_volume(root / "options/volume-00000.nii.gz")[0].sum())


def test_an_evaluation_samples_as_it_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the options are reaches the sampler and the metrics alike."""
    asked: dict[str, Any] = {}

    def watched(*arguments: Any) -> Iterator[Tensor]:
        asked.update(inspect.signature(sample_latents).bind(*arguments).arguments)
        return sample_latents(*arguments)

    def sizes(volume: np.ndarray, *_: Any) -> AnatomyML:
        return AnatomyML(float(volume.std()), 2.0, 0.0)

    monkeypatch.setattr(generation, "sample_latents", watched)
    monkeypatch.setattr(generation, "measure", sizes)
    g3n("evaluate", "generation", "--run", f"{root}/shifted", "--modality", "T1", "--ages", "30,80", "--count", "1",
        "--steps", "2", "--guidance-interval", "0.2,0.9", "--shift", "2", "--sampler", "multistep", "--output",
        f"{root}/evaluation", "--device", "cpu")  # fmt: skip
    found = json.loads((root / "evaluation/metrics.json").read_text())
    assert (found["guidance_interval"], found["shift"], found["sampler"]) == ([0.2, 0.9], 2.0, "multistep")
    assert (asked["interval"], asked["shift"], asked["sampler"]) == ((0.2, 0.9), 2.0, "multistep")


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    recipe = {"guidance": 1.23456789, "ages": (30.0, 80.0)}  # more digits than a JSON of ours keeps
    assert claim(tmp_path / "out", recipe) is False
    assert claim(tmp_path / "out", recipe) is True
    with pytest.raises(G3nError, match="holds something else"):
        claim(tmp_path / "out", {**recipe, "guidance": 2.0})
