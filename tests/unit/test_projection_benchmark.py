"""The projection benchmark without its trainings: which cells, what a probe finds, what is written."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from benchmarks import projection
from benchmarks.projection import Cell, Scans
from g3n.config import G3nError, build
from g3n.evaluate.intervals import Interval
from g3n.evaluate.report import write_json
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.index import load_index
from g3n.train import load_config
from tests import nano
from tests.unit.test_decoder_start import NET
from tests.unit.test_encode import save_run


def test_cells_are_planned_seed_by_seed_and_full_once() -> None:
    cells = projection.plan(["learned", "pca"], ["8", "full"], 48, [0, 1])
    names = ["learned-8", "pca-8", "identity-48"]
    assert [cell.name for cell in cells] == [f"{name}-seed{seed}" for seed in (0, 1) for name in names]
    for width in ("0", "49", "half"):
        with pytest.raises(G3nError, match=f"'{width}', expected 1 to 48"):
            projection.plan(["pca"], [width], 48, [0])


@pytest.mark.parametrize("kind", [*projection.KINDS, "identity"])
def test_settings_are_a_valid_configuration(kind: str) -> None:
    config = load_config(projection.ROOT / "configs/tiny/decoder.yaml", Cell(kind, 16, 3).settings)
    assert (config.seed, config.model.net.latent_channels) == (3, 16)
    assert config.model.projection == {"learned": "regression", "pooled": "regression"}.get(kind, kind)
    assert config.model.projection_trained == (kind in ("learned", "pooled", "random"))
    assert config.model.pooled_channels == (3 if kind == "pooled" else 0)


def scans(n_subjects: int = 60, visits: int = 3, seed: int = 0) -> Scans:
    """Features 0 and 1 tell age and sex; the rest tell who it is, which must not help: anything can be learned by heart from them."""
    rng = np.random.default_rng(seed)
    subjects = np.repeat(np.arange(n_subjects), visits)
    age, sex = rng.uniform(20, 80, n_subjects)[subjects], rng.integers(2, size=n_subjects)[subjects]
    features = rng.standard_normal((len(subjects), 2 + n_subjects))
    features[:, 0] = age / 20 + 0.1 * features[:, 0]
    features[:, 1] = 2 * sex + 0.5 * features[:, 1]
    features[:, 2:] = rng.standard_normal((n_subjects, n_subjects))[subjects]
    variables = {"age_years": age, "sex": np.array(["F", "M"])[sex]}
    variables["diagnosis"] = np.where(subjects < 3, "AD", "HC")  # too few to probe
    variables["noise"] = rng.standard_normal(n_subjects)[subjects]
    variables["age_years"] = np.where(subjects == 5, np.nan, age)
    return Scans(features, subjects.astype(str), variables)


def test_probes_find_what_is_there_and_nothing_else() -> None:
    found = projection.probes(scans().features[:, :2], scans())
    assert sorted(found) == ["age_years", "noise", "sex"]
    assert found["age_years"].value > 0.97
    assert (found["age_years"].n, found["age_years"].subjects) == (177, 59)
    assert found["sex"].value > 0.9
    assert found["sex"].low < found["sex"].value < found["sex"].high
    without = projection.probes(scans().features[:, 2:], scans())
    # subjects of the held-out fold were never seen, and no fold inside chose a weak penalty by knowing them
    assert -0.3 < without["noise"].value < 0.05
    assert -0.3 < without["age_years"].value < 0.05
    assert abs(without["sex"].value - 0.5) < 0.2


def test_balanced_accuracy_is_scikit_learns() -> None:
    truth, guess = np.array(["a", "a", "a", "b", "c", "c"]), np.array(["a", "b", "a", "b", "a", "c"])
    assert projection.balanced_accuracy(truth, guess) == pytest.approx(balanced_accuracy_score(truth, guess))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("benchmark")
    nano.shards(root / "shards", train=18, val=2)
    torch.manual_seed(0)
    about = {"shards": load_index(str(root / "shards")).fingerprint}
    save_run(root / "mae", "mae", {"net": NET}, MAE(build(MAEConfig, NET)), about)
    return root


def line(root: Path, output: Path, *more: str) -> list[str]:
    inputs = [
        "--encoder",
        str(root / "mae"),
        "--shards",
        str(root / "shards"),
        "--output",
        str(output),
        "--device",
        "cpu",
    ]
    return [*more, *inputs, "--widths", "4", "full", "--kinds", "pca", "--seeds", "0", "1"]


def test_scans_are_the_shards_own(root: Path) -> None:
    """Each scan once, under its subject, with features that are the mean of its tokens."""
    index = load_index(str(root / "shards"))
    found = projection.pooled_scans(str(root / "mae"), index, 3, "cpu")
    assert found.features.shape == (40, 48)
    assert all((found.subjects == s).sum() == 2 for s in np.unique(found.subjects))
    again = projection.pooled_scans(str(root / "mae"), index, 8, "cpu")
    assert np.allclose(found.features, again.features, atol=1e-5)
    assert set(found.variables["sex"]) == {"F", "M"}
    sex_of = {int(s, 16): v for s, v in zip(found.subjects, found.variables["sex"], strict=True)}
    assert all(sex == "FM"[subject % 2] for subject, sex in sex_of.items())


def test_it_goes_on_where_it_stopped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings are left out: a cell's rows appear, the second call does the rest, another plan is refused."""
    done: list[str] = []

    def finish(cell: Cell, args: object, scans: Scans, full: dict[str, Interval]) -> None:
        if len(done) == 3:
            raise G3nError("stopped")
        done.append(cell.name)
        psnr = Interval(20.0 + cell.width, 1.0, 2.0, 4, 2)
        probe = dataclasses.replace(psnr, value=0.6)
        rows = [projection.row(cell, "psnr_db", psnr), projection.row(cell, "probe sex", probe, 0.8)]
        write_json(tmp_path / "cells" / f"{cell.name}.json", rows)

    monkeypatch.setattr(projection, "finish", finish)
    assert projection.main(line(root, tmp_path)) == 2
    assert "error: stopped" in capsys.readouterr().err
    assert done == ["pca-4-seed0", "identity-48-seed0", "pca-4-seed1"]
    monkeypatch.setattr(projection, "finish", lambda cell, *rest: done.pop() and finish(cell, *rest))
    assert projection.main(line(root, tmp_path)) == 0
    assert done[-1] == "identity-48-seed1"
    table = pd.read_csv(tmp_path / "projection.csv")
    assert len(table) == 8
    probes = table[table["what"] == "probe sex"]
    assert np.allclose(probes["relative_loss"], 0.25)
    assert math.isnan(table[table["what"] == "psnr_db"]["relative_loss"].iloc[0])
    assert (tmp_path / "projection.png").read_bytes()[:4] == b"\x89PNG"
    assert projection.main(line(root, tmp_path, "trainer.steps=7")) == 2
    assert "holds results of another overrides" in capsys.readouterr().err


def test_rows_of_a_reconstruction_rest_on_subjects(tmp_path: Path) -> None:
    keys = ["sub-0a_ses-01_T1", "sub-0a_ses-02_T1", "sub-0b_ses-01_T1", "sub-0c_ses-01_T1"]
    table = pd.DataFrame({"key": keys, "psnr_db": [20.0, 22, 24, 26], "ssim": [0.5] * 4, "mae": [0.1] * 4})
    table.to_csv(tmp_path / "volumes.csv", index=False)
    rows = projection.reconstruction_rows(Cell("pca", 8, 0), tmp_path / "volumes.csv")
    assert [(r["what"], r["value"], r["scans"], r["subjects"]) for r in rows] == [
        ("psnr_db", 23.0, 4, 3),
        ("ssim", 0.5, 4, 3),
        ("mae", pytest.approx(0.1), 4, 3),
    ]
    assert json.dumps(rows)
