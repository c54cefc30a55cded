"""What was asked for against what was made, on a generator whose obedience is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from g3n.cli import _guidance
from g3n.config import G3nError
from g3n.evaluate import guidance, utility
from g3n.evaluate.effects import age_effect, plan
from g3n.evaluate.generation import evaluate_generation
from g3n.evaluate.probes import Pooled, agreement, fit_probe
from g3n.models.conditioning import Variable, VariableSet
from tests import toy

ML = toy.VOXEL_ML
T1 = {"modality": "T1", "diagnosis": "HC"}


def people(n: int, seed: int, a_year: float = 2.0) -> list[Any]:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        about = {"modality": ("T1", "T2")[i % 2], "sex": ("F", "M")[i // 2 % 2]}
        about["diagnosis"] = ("HC", "HC", "AD", "glioma")[i // 4 % 4]
        age = float(rng.integers(30, 80))
        z = toy.law({**about, "age_years": age}, a_year) + 0.02 * rng.normal(size=toy.SHAPE)
        made.append((about, [(0, age, z.astype(np.float16))]))
    return made


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In the val split nobody's ventricles grow with age."""
    splits = {"train": people(96, 0), "val": people(32, 1, a_year=0.0)}
    return toy.write_latents(tmp_path_factory.mktemp("latents"), splits)


def test_effects_of_an_obedient_generator(tmp_path: Path) -> None:
    evaluate_generation(toy.obedient(), [25, 55, 85], tmp_path, T1, count=6, steps=1, guidance=1.0, batch=5)
    found = json.loads((tmp_path / "metrics.json").read_text())
    age = found["effects"]["age"]
    assert age["slope_ml_a_year"]["value"] == pytest.approx(2 * ML, abs=1e-3)
    assert age["slope_ml_a_year"]["low"] == pytest.approx(2 * ML, abs=2e-3)  # the same noises at each age
    assert age["monotone_share"]["value"] == 1
    assert age["ratio"]["value"] == pytest.approx(found["ventricle_ratio"], abs=1e-5)
    assert age["r"]["value"] == pytest.approx(found["age_r"], abs=1e-5)
    assert age["r"]["subjects"] == 6
    by_age = found["ventricle_ml_by_age"]
    assert by_age["85"] - by_age["25"] == pytest.approx(120 * ML, abs=1e-2)
    sex, diagnosis, lesion = (found["effects"][name] for name in ("sex", "diagnosis", "lesion"))
    assert sex["m_minus_f_ventricle_ml"]["value"] == pytest.approx(32 * ML, abs=0.03)
    assert sex["m_minus_f_brain_ml"]["value"] == pytest.approx(-32 * ML, abs=0.03)
    assert diagnosis["ad_minus_hc_ventricle_ml"]["value"] == pytest.approx(64 * ML, abs=0.03)
    assert lesion["level"] == "glioma"
    assert (lesion["share_right"]["value"], lesion["share_right"]["n"]) == (1, 12)
    assert lesion["lesion_ml"]["value"] > 5
    assert found["left_out"] == {"modality": "needs --latents", "probes": "needs --latents"}
    with open(tmp_path / "volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["sweep"], r["seed"]) for r in rows[:7]] == [("age_years", str(s)) for s in (0, 1, 2, 3, 4, 5, 0)]
    assert len(rows) == 6 * (3 + 2 + 3)


def test_a_generator_that_always_draws_a_lesion_is_half_right(tmp_path: Path) -> None:
    stubborn = toy.generator(lambda x, t, cond: x.new_tensor([2.0, 10.0, -10.0, 0.0]).expand_as(x))
    effects = evaluate_generation(stubborn, [30, 70], tmp_path, T1, count=4, steps=1)["effects"]
    asked, spared = (effects["lesion"][f"share_right_{k}"]["value"] for k in ("asked", "not_asked"))
    assert (asked, spared, effects["lesion"]["share_right"]["value"]) == (1, 0, 0.5)
    assert effects["age"]["slope_ml_a_year"]["value"] == pytest.approx(0, abs=1e-9)
    assert effects["age"]["monotone_share"]["value"] == 0
    assert effects["diagnosis"]["ad_minus_hc_ventricle_ml"]["value"] == 0


def test_age_effect_against_scipy() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"age_years": age, "seed": s, "ventricle_ml": 0.2 * age + rng.normal()}
        for age in (20, 50, 80)
        for s in range(40)
    ]
    line = stats.linregress([r["age_years"] for r in rows], [r["ventricle_ml"] for r in rows])
    found = age_effect(rows)
    assert found["slope_ml_a_year"]["value"] == pytest.approx(line.slope)
    assert found["r"]["value"] == pytest.approx(line.rvalue)
    half = (found["slope_ml_a_year"]["high"] - found["slope_ml_a_year"]["low"]) / 2
    assert half == pytest.approx(1.96 * line.stderr, rel=0.3)


def test_monotone_counts_every_step() -> None:
    table = {20: (1, 1, 1, 1), 50: (2, 2, 0, 1), 80: (3, 1, 2, 2)}  # only the first noise grows at both steps
    rows = [
        {"age_years": a, "seed": s, "ventricle_ml": float(ml)} for a, mls in table.items() for s, ml in enumerate(mls)
    ]
    assert age_effect(rows)["monotone_share"]["value"] == 0.25
    assert age_effect(rows)["ratio"]["value"] == 2.0


def test_what_the_table_lacks_is_left_out() -> None:
    table = {"modality": Variable(levels=("T1",)), "age_years": Variable(low=0, high=110)}
    sweeps, left_out = plan(VariableSet(table), [20, 80], {"modality": "T1"})
    assert set(sweeps) == {"age_years"}
    assert set(left_out) == {"sex", "diagnosis", "lesion", "modality"}
    both = {**table, "diagnosis": Variable(levels=("HC", "GBM"))}
    sweeps, left_out = plan(VariableSet(both), [20, 40, 80], {"modality": "T1"})
    assert sweeps["diagnosis"] == [{"modality": "T1", "age_years": 40.0, "diagnosis": d} for d in ("HC", "GBM")]
    assert set(left_out) == {"sex", "diagnosis", "modality"}


def test_probes_see_what_a_generator_does_not_listen_to(latents: str, tmp_path: Path) -> None:
    deaf = toy.obedient(sexes=False)
    found = evaluate_generation(
        deaf, [30, 70], tmp_path, T1, count=4, steps=1, guidance=1.0, latents=latents, utility=True
    )
    probes = found["probes"]
    assert set(probes) == {"modality", "sex", "diagnosis", "age_years"}
    assert probes["modality"]["generated"]["share_right"]["value"] == 1
    assert probes["modality"]["real"]["share_right"]["value"] == 1
    assert probes["sex"]["real"]["share_right"]["value"] == 1
    assert probes["sex"]["generated"]["share_right"]["value"] == pytest.approx(0.5, abs=0.25)
    assert probes["sex"]["generated"]["share_right"]["high"] < 0.9
    assert probes["sex"]["generated"]["share_right"]["n"] == 32
    assert found["effects"]["modality"]["generated"]["share_right"]["value"] == 1
    assert found["effects"]["modality"]["generated"]["share_right"]["n"] == 8
    synthetic = found["utility"]["train_on_synthetic"]
    assert synthetic["modality"]["synthetic"]["share_right"]["value"] == 1
    assert synthetic["modality"]["synthetic_minus_real"]["value"] == 0
    assert synthetic["sex"]["real"]["share_right"]["value"] == 1
    assert synthetic["sex"]["synthetic_minus_real"]["value"] == pytest.approx(
        synthetic["sex"]["synthetic"]["share_right"]["value"] - 1
    )
    assert found["utility"]["train_scans"] == 96
    assert found["utility"]["rare_group"]["level"] == "AD"
    assert found["utility"]["rare_group"]["synthetic_scans"] == 24


def pooled(values: np.ndarray, name: str, labels: list[Any], who: str = "p") -> Pooled:
    columns = np.column_stack([values, np.zeros(len(values))]).astype(np.float32)
    return Pooled(columns, tuple({name: label} for label in labels), tuple(f"{who}{i}" for i in range(len(values))))


def test_agreement_by_hand() -> None:
    train = pooled(np.array([0.0, 0.1, 0.9, 1.0]), "sex", ["F", "F", "M", "M"])
    probe = fit_probe(train, "sex")
    assert probe is not None
    asked = pooled(np.array([0.0, 0.0, 1.0, 1.0]), "sex", ["F", "M", "M", None])
    assert agreement(probe, asked, "sex")["share_right"]["value"] == pytest.approx(2 / 3)
    line = pooled(np.arange(20.0), "age_years", [30.0 + 2 * i for i in range(20)])
    scans = pooled(np.array([0.0, 0.1, 1.0, 1.1]), "modality", ["T1", "T1", "T1c", "T1c"])
    kinds = fit_probe(scans, "modality")
    assert kinds is not None
    mixed = agreement(kinds, pooled(np.array([0.0, 1.0]), "modality", ["T1c", "T1c"], "q"), "modality")
    assert mixed["share_right"]["value"] == 0.5
    assert mixed["share_right_t1_alike"]["value"] == 1.0
    ages = fit_probe(line, "age_years")
    assert ages is not None
    off = pooled(np.arange(20.0), "age_years", [33.0 + 2 * i for i in range(20)])
    found = agreement(ages, off, "age_years")
    assert found["r"]["value"] == pytest.approx(1)
    assert found["mae"]["value"] == pytest.approx(3, abs=0.1)
    assert fit_probe(pooled(np.arange(3.0), "sex", ["F", "F", "F"]), "sex") is None


def test_trained_on_made_up_people_with_swapped_sexes() -> None:
    x = np.array([0.0, 0.1, 0.9, 1.0])
    real, swapped = pooled(x, "sex", ["F", "F", "M", "M"]), pooled(x, "sex", ["M", "M", "F", "F"])
    found = utility.train_on_synthetic(real, swapped, real)["sex"]
    assert found["real"]["share_right"]["value"] == 1
    assert found["synthetic"]["share_right"]["value"] == 0
    assert found["synthetic_minus_real"]["value"] == -1


def test_made_up_people_of_a_rare_group_help_to_find_it() -> None:
    """Two overlapping groups, 200 against 4: alone the classifier hardly ever says the rare one."""
    rng = np.random.default_rng(0)

    def scans(common: int, rare: int, who: str) -> Pooled:
        values = np.concatenate([rng.normal(0, 1, common), rng.normal(1.5, 1, rare)])
        return pooled(values, "diagnosis", ["HC"] * common + ["AD"] * rare, who)

    asked: list[Any] = []

    def draw(variables: Any, subjects: Any) -> Pooled:
        asked.extend(v["diagnosis"] for v in variables)
        return pooled(rng.normal(1.5, 1, len(variables)), "diagnosis", [v["diagnosis"] for v in variables], "made")

    found = utility.rare_group(scans(200, 4, "a"), scans(100, 100, "b"), draw)
    assert asked == ["AD"] * 196
    assert (found["level"], found["train_scans"], found["synthetic_scans"]) == ("AD", 4, 196)
    assert found["recall"]["real"]["value"] < 0.3
    assert found["recall"]["real_and_synthetic"]["value"] == pytest.approx(stats.norm.cdf(0.75), abs=0.12)
    assert found["recall"]["difference"]["low"] > 0.3
    assert found["share_right"]["difference"]["value"] > 0.1


def test_guidance_is_that_of_the_train_split(latents: str, tmp_path: Path) -> None:
    """The generator learned half of the effect of age: guidance 2 restores the train split's; the val split has none."""
    half = toy.obedient(a_year=1.0)
    found = evaluate_generation(half, [30, 70], tmp_path, T1, count=3, steps=1, guidance="auto", latents=latents)
    choice = found["guidance_choice"]
    assert found["guidance"] == choice["chosen"] == 2.0
    assert choice["train_slope_ml_a_year"]["value"] == pytest.approx(2 * ML, rel=0.25)  # sexes are mixed
    slopes = [choice["slope_ml_a_year"][f"{g:g}"] for g in guidance.CANDIDATES]
    assert np.diff(slopes) == pytest.approx(ML * np.diff(guidance.CANDIDATES), abs=0.01)
    assert found["effects"]["age"]["slope_ml_a_year"]["value"] == pytest.approx(2 * ML, rel=0.02)


def test_mistakes(latents: str, tmp_path: Path) -> None:
    maker = toy.obedient()
    with pytest.raises(G3nError, match="need the run's latents"):
        evaluate_generation(maker, [30, 70], tmp_path, T1, guidance="auto")
    with pytest.raises(G3nError, match="at least 2 ages"):
        evaluate_generation(maker, [30, 30], tmp_path, T1)
    with pytest.raises(G3nError, match=r"training scans of .* give --guidance a number"):
        evaluate_generation(maker, [30, 70], tmp_path, {"modality": "T1", "sex": "F", "diagnosis": "glioma"},
                            guidance="auto", latents=latents)  # fmt: skip
    with pytest.raises(G3nError, match="age_years is 170"):
        evaluate_generation(maker, [30, 170], tmp_path, T1)
    assert not any(tmp_path.iterdir())
    assert (_guidance("auto"), _guidance("1.5")) == ("auto", 1.5)
    for wrong in ("strong", "-1", "nan", "inf"):
        with pytest.raises(G3nError, match="expected a number of at least 0, or auto"):
            _guidance(wrong)
