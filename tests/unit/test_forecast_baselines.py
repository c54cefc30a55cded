"""The forecaster and its baselines on people whose ventricles grow by a known rule."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from g3n.evaluate import forecasting
from g3n.evaluate.baselines import Pairs, mean_change, regression
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from tests import toy

NAMES = list(toy.TABLE)


def pairs(n: int, seed: int) -> Pairs:
    """Changes that are linear in the baseline's first number, the years and the age."""
    rng = np.random.default_rng(seed)
    baseline = np.zeros((n, *toy.SHAPE), np.float32)
    baseline[:, :, 0] = rng.normal(size=(n, 1))
    years, age = rng.uniform(1, 5, n), rng.uniform(20, 80, n)
    change = 0.5 * years + 0.25 * baseline[:, 0, 0] + 0.01 * age
    target = baseline.copy()
    target[:, :, 0] += change[:, None].astype(np.float32)
    return Pairs(baseline, target, years, age, tuple("T1" for _ in range(n)))


def test_regression_is_the_linear_predictor() -> None:
    """Against scikit-learn's least squares on the numbers that the rule uses."""
    train, new = pairs(400, 0), pairs(20, 1)
    made = regression(train)(new)
    assert np.abs(made - new.target_PNC).max() < 0.02
    by_hand = [np.column_stack([p.baseline_PNC[:, 0, 0], p.elapsed_years_P, p.age_years_P]) for p in (train, new)]
    oracle = LinearRegression().fit(by_hand[0], train.target_PNC[:, 0, 0]).predict(by_hand[1])
    assert np.abs(made[:, 0, 0] - oracle).max() < 0.02
    unknown = Pairs(new.baseline_PNC, new.target_PNC, new.elapsed_years_P, np.full(20, np.nan), new.modality)
    assert np.isfinite(regression(train)(unknown)).all()


def test_mean_change_is_by_modality_and_year() -> None:
    baseline = np.zeros((4, *toy.SHAPE), np.float32)
    target = baseline.copy()
    target[:, :, 0] = np.array([1.0, 3.0, 10.0, 30.0])[:, None]
    years = np.array([1.0, 3.0, 1.0, 3.0])
    train = Pairs(baseline, target, years, np.full(4, np.nan), ("T1", "T1", "T2", "T2"))
    new = Pairs(baseline[:3], target[:3], np.array([2.0, 2.0, 2.0]), np.full(3, np.nan), ("T1", "T2", "FLAIR"))
    assert mean_change(train)(new)[:, 0, 0] == pytest.approx([2, 20, 2 * 44 / 8])
    assert mean_change(train)(new)[:, 0, 1] == pytest.approx([0, 0, 0])


def people(n: int, seed: int) -> list[Any]:
    """Ventricles of 192 to 320 voxels that grow by 16 a year and a quarter of what they have above 256."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        first, years, age = 4 * int(rng.integers(48, 81)), int(rng.choice([4, 8])), float(rng.integers(40, 70))
        last = first + 16 * years + (first - 256) // 4
        visits = [(0, age, toy.latent(first)), (365.25 * years, age + years, toy.latent(last))]
        made.append(({"modality": "T1", "sex": "F", "diagnosis": "HC"}, visits))
    return made


def forecaster(off_voxels: float, a_year: float = 16) -> Any:
    """One that knows the rule but is ``off_voxels`` too large."""

    def model(x: torch.Tensor, t: torch.Tensor, cond_BV: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        change = torch.zeros_like(x)
        first = source[:, 0, 0] * 128
        more = (
            a_year * cond_BV[:, NAMES.index("elapsed_years")].nan_to_num() + torch.floor((first - 256) / 4) + off_voxels
        )
        change[:, :, 0] = more[:, None] / 128
        return change

    return toy.generator(model, start_noise=0.0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    undated = ({"modality": "T1"}, [(0, 50.0, toy.latent(256)), (None, 55.0, toy.latent(256))])
    splits = {"train": people(40, 0), "val": [*people(6, 1), undated]}
    return toy.write_latents(tmp_path_factory.mktemp("latents"), splits)


def test_every_figure_of_a_forecaster_that_is_8_voxels_off(latents: str, tmp_path: Path) -> None:
    forecasting.evaluate_forecasting(forecaster(8), latents, tmp_path, steps=2)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["pairs"], found["train_pairs"], found["pairs_without_dates"]) == (6, 40, 1)
    with open(tmp_path / "pairs.csv") as file:
        rows = list(csv.DictReader(file))
    ours, methods = found["methods"]["ours"], found["methods"]
    off_ml = 8 * toy.VOXEL_ML
    assert ours["ventricle_error_ml"]["value"] == pytest.approx(off_ml, abs=1e-3)
    assert ours["ventricle_error_ml"]["low"] == pytest.approx(ours["ventricle_error_ml"]["high"], abs=1e-3)
    assert ours["ventricle_error_ml"]["subjects"] == 6
    brain = (toy.draw(0, 0, 0) != 0).sum()
    assert ours["mae"]["value"] == pytest.approx(8 * 0.8 / brain, rel=1e-3)  # 8 voxels are 0.2 instead of 1
    assert ours["psnr_db"]["value"] == pytest.approx(10 * np.log10(brain / 8), rel=1e-3)  # range 0.8
    true = [16 * float(r["elapsed_years"]) for r in rows]
    assert methods["no_change"]["ventricle_error_ml"]["value"] > 0.6 * np.mean(true) * toy.VOXEL_ML
    order = [methods[m]["ventricle_error_ml"]["value"] for m in ("regression", "mean_change", "no_change")]
    assert order == sorted(order)
    assert order[0] < 2 * toy.VOXEL_ML  # the rule is linear
    less = found["ours_minus"]["no_change"]["ventricle_error_ml"]
    pair = [float(r["ventricle_error_ml"]) - float(r["no_change_ventricle_error_ml"]) for r in rows]
    assert less["value"] == pytest.approx(np.mean(pair), abs=1e-4)
    assert less["high"] < 0  # better, for sure
    assert found["ours_minus"]["regression"]["ventricle_error_ml"]["low"] > 0  # and worse than the regression
    assert found["ours_minus"]["no_change"]["ssim"]["low"] > 0
    assert found["no_change_ventricle_error_ml"] == methods["no_change"]["ventricle_error_ml"]["value"]
    assert (tmp_path / "forecast.png").stat().st_size > 3000


@pytest.mark.parametrize(("a_year", "share"), [(16.0, 1.0), (-1.0, 0.0)])
def test_growth_by_the_years_asked_for(latents: str, tmp_path: Path, a_year: float, share: float) -> None:
    forecasting.evaluate_forecasting(forecaster(0, a_year), latents, tmp_path, steps=1)
    growth = json.loads((tmp_path / "metrics.json").read_text())["growth"]
    assert growth["years"] == [0, 1, 2, 5, 10]
    assert growth["monotone_share"]["value"] == share
    change = {year: part["value"] for year, part in growth["change_ml"].items()}
    assert change["10"] - change["0"] == pytest.approx(10 * a_year * toy.VOXEL_ML, abs=1e-3)
    with open(tmp_path / "growth.csv") as file:
        at_0 = [float(r["change_ml"]) for r in csv.DictReader(file) if float(r["elapsed_years"]) == 0]
    assert growth["absolute_change_at_0_ml"]["value"] == pytest.approx(np.mean(np.abs(at_0)), abs=1e-4)
    assert 0 < growth["absolute_change_at_0_ml"]["value"] <= 16 * toy.VOXEL_ML


def test_the_age_moves_along_with_the_years(latents: str, tmp_path: Path) -> None:
    seen = []
    real = forecaster(0)

    def model(x: torch.Tensor, t: torch.Tensor, cond_BV: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        seen.append(cond_BV)
        return real.model(x, t, cond_BV, source)

    forecasting.evaluate_forecasting(toy.generator(model, start_noise=0.0), latents, tmp_path, steps=1)
    age, elapsed = (torch.cat(seen)[:, NAMES.index(name)] for name in ("age_years", "elapsed_years"))
    starts = (age - elapsed)[elapsed.isfinite()]
    assert {0.0, 1.0, 2.0, 5.0, 10.0} <= set(elapsed.tolist())
    assert all(40 <= start < 70 for start in starts.tolist())
    assert len(set(starts.tolist())) <= 6  # one for each person


def test_too_few_train_pairs_leave_the_learned_baselines_out(tmp_path: Path) -> None:
    latents = toy.write_latents(tmp_path / "l", {"train": people(2, 0), "val": people(3, 1)})
    found = forecasting.evaluate_forecasting(forecaster(0), latents, tmp_path / "out", steps=1)
    assert set(found["methods"]) == {"ours", "one_draw", "no_change"}
    assert "fewer than 3" in next(iter(found["left_out"].values()))


def test_ours_is_the_mean_of_draws_from_different_noises(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = toy.generator(forecaster(0).model, start_noise=1.0)
    index = load_index(latents)
    batch = next(iter(eval_batches(index, None, "pair", "val", 4, 0, 1, 0)))
    drawn = []
    real = forecasting.solve

    def solve(*words: Any) -> torch.Tensor:
        drawn.append(real(*words))
        return drawn[-1]

    monkeypatch.setattr(forecasting, "solve", solve)
    made = forecasting.predict(generator, batch, {}, steps=1, draws=3)
    volumes = [generator.space.decode(z).cpu() for z in drawn]
    assert len(volumes) == 3
    assert not torch.equal(volumes[0], volumes[1])
    assert torch.equal(made["one_draw"], volumes[0])
    assert torch.allclose(made["ours"], sum(volumes) / 3)
    again = forecasting.predict(generator, batch, {}, steps=1, draws=1)
    assert torch.equal(again["ours"], volumes[0])
