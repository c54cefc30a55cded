"""Anatomy measured on volumes agrees with what the phantom drew."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from data_prep.phantom import make_phantom
from g3n.config import G3nError
from g3n.evaluate.anatomy import measure
from g3n.nifti import atlas_grid, read_volume, to_grid

GRID = atlas_grid((40, 48, 40), 4.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """[scans, 2] of (true, measured) ventricle volume by modality, subjects without tumor."""
    root: Path = tmp_path_factory.mktemp("phantom")
    make_phantom(root, 40, 4.0, seed=3, workers=2)
    with open(root / "truth.tsv") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if float(row["lesion_ml"]) == 0]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        volume = to_grid(*read_volume(root / row["path"]), GRID)
        pair = float(row["ventricle_ml"]), measure(volume, GRID, row["modality"]).ventricle_ml
        found.setdefault(row["modality"], []).append(pair)
    return {modality: np.array(pairs) for modality, pairs in found.items()}


@pytest.mark.parametrize("modality", ["T1", "T1c", "FLAIR"])
def test_ventricles_as_the_phantom_drew_them(measured: dict[str, np.ndarray], modality: str) -> None:
    true, found = measured[modality].T
    assert len(true) >= 10
    assert np.corrcoef(true, found)[0, 1] >= 0.99
    slope, intercept = np.polyfit(true, found, 1)
    assert 0.75 < slope < 1.1
    assert abs(intercept) < 5


def test_intensity_scale_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    volume = rng.uniform(1, 2, GRID.shape).astype(np.float32)
    assert measure(volume, GRID, "T1").ventricle_ml == pytest.approx(
        measure(7 * volume + 100, GRID, "T1").ventricle_ml, rel=1e-4
    )


def test_a_volume_that_is_not_there() -> None:
    volume = np.zeros(GRID.shape, np.float32)
    volume[:5] = 1
    with pytest.raises(G3nError, match="no brain around the atlas's ventricles"):
        measure(volume, GRID, "T1")
