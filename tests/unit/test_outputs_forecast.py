"""Forecasts on disk: at the scan's own voxels, with mean and spread over draws."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from g3n import cli
from g3n.config import G3nError
from g3n.nifti import BRAIN_CENTER_MM, atlas_grid, read_volume
from g3n.outputs import write_forecasts
from tests import pixels

CENTER = np.array(BRAIN_CENTER_MM)
LESION = CENTER + (22.0, -12.0, 15.0)
FINE = atlas_grid((40, 48, 40), 4)


def grows(grid=FINE):
    """A forecaster that adds 2 z at LESION each year."""
    where = torch.from_numpy(pixels.blob(pixels.world(grid.shape, grid.matrix), LESION)).float().reshape(-1, 1)

    def model(x: Tensor, t: Tensor, cond: Tensor, source: Tensor) -> Tensor:
        return 2 * cond[:, 3].nan_to_num(0)[:, None, None] * where

    return model


def save_scan(path: Path, affine: np.ndarray, shape: tuple[int, int, int], center: np.ndarray) -> None:
    points = pixels.world(shape, affine)
    volume = (300 + points[..., 0] - center[0]) * pixels.ball(points, tuple(center))
    nib.save(nib.Nifti1Image(volume.astype(np.float32), affine), path)


def affine_of(degrees: tuple[float, float, float], spacing: tuple[float, float, float], flips, shape, center):
    """Rotated, anisotropic and flipped, with ``center`` in the middle of the box."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix() @ np.diag(
        np.multiply(spacing, flips)
    )
    affine[:3, 3] = center - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


@pytest.mark.parametrize(
    ("degrees", "spacing", "shape", "flips", "shift"),
    [
        ((0, 0, 0), (3, 3, 3), (50, 50, 50), (1, 1, 1), (0, 0, 0)),
        ((12, -8, 25), (2, 3, 5), (72, 50, 30), (-1, 1, 1), (0, 0, 0)),
        ((90, 0, 5), (6, 2.5, 3), (26, 60, 50), (1, -1, 1), (1, 3, -2)),
        ((-20, 10, 40), (2, 4, 3), (72, 38, 50), (1, 1, -1), (70, -90, 110)),  # centered: more than 30 mm off
    ],
)
def test_the_forecast_overlays_the_scan(tmp_path, degrees, spacing, shape, flips, shift) -> None:
    center = CENTER + shift
    affine = affine_of(degrees, spacing, flips, shape, center)
    save_scan(tmp_path / "scan.nii.gz", affine, shape, center)
    made = write_forecasts(
        pixels.generator(grows(), 0.0, FINE), tmp_path / "scan.nii.gz", {"age_years": 60.0}, [60.0, 63.0],
        tmp_path / "out", steps=1,
    )  # fmt: skip
    before, after = (nib.load(tmp_path / "out" / record["native"]) for record in made)
    assert before.shape == shape
    assert np.allclose(after.affine, affine, atol=1e-4)
    scan = read_volume(tmp_path / "scan.nii.gz")[0]
    inside = pixels.ball(pixels.world(shape, affine), tuple(center), 45)
    assert np.abs(before.get_fdata() - scan)[inside].max() < 3  # 0 years: the scan itself, of 235 to 365
    change = after.get_fdata() - before.get_fdata()
    points = pixels.world(shape, affine)
    found = (change[..., None] * points).sum((0, 1, 2)) / change.sum()
    centered = np.linalg.norm(shift) > 30
    expected = LESION + shift if centered else LESION  # centering puts the scan's center on the atlas's
    assert np.linalg.norm(found - expected) < 1.0
    ideal = 2 * 3 * scan[scan != 0].std() * pixels.blob(points, expected)
    assert np.corrcoef(change[inside], ideal[inside])[0, 1] > 0.99
    assert change[inside].max() == pytest.approx(ideal[inside].max(), rel=0.15)
    assert (after.get_fdata()[~pixels.ball(points, tuple(center), 75)] == 0).all()


def test_mean_and_spread_over_draws(tmp_path: Path) -> None:
    save_scan(tmp_path / "scan.nii.gz", np.array(pixels.GRID.matrix), pixels.GRID.shape, CENTER)

    def call(folder: str, draws: int, targets: list[float]) -> None:
        write_forecasts(
            pixels.generator(lambda x, t, cond, source: torch.zeros_like(x), 0.5), tmp_path / "scan.nii.gz",
            {"age_years": 60.0, "modality": "T1"}, targets, tmp_path / folder, draws=draws, steps=1,
        )  # fmt: skip

    call("out", 4, [62.0])
    record = json.loads((tmp_path / "out/forecast.json").read_text())
    volumes = np.stack([read_volume(tmp_path / "out" / v["file"])[0] for v in record["volumes"]])
    assert len(volumes) == 4
    mean, spread = (read_volume(tmp_path / "out" / f"{what}.nii.gz")[0] for what in ("mean", "spread"))
    assert np.allclose(mean, volumes.mean(0), atol=1e-3)
    assert np.allclose(spread, volumes.std(0, ddof=1), atol=1e-3)
    std = read_volume(tmp_path / "out/baseline.nii.gz")[0]
    std = float(std[std != 0].std())
    inside = mean > 0
    assert float(np.sqrt((spread[inside] ** 2).mean())) == pytest.approx(
        0.5 * std, rel=0.03
    )  # the noise it starts with
    target = record["targets"][0]
    ml = [v["ventricle_ml"] for v in record["volumes"]]
    assert target["ventricle_ml_mean"] == pytest.approx(np.mean(ml), abs=1e-5)
    assert target["ventricle_ml_spread"] == pytest.approx(np.std(ml, ddof=1), abs=1e-5)
    # the scan's grid is the model's here, so the native files hold the same numbers
    for what in ("mean", "spread"):
        native, affine = read_volume(tmp_path / "out" / target[f"{what}_native"])
        assert np.allclose(native, mean if what == "mean" else spread, atol=0.02)
        assert np.allclose(affine, pixels.GRID.matrix)

    call("two", 2, [61.0, 62.0])
    record = json.loads((tmp_path / "two/forecast.json").read_text())
    assert [t["mean"] for t in record["targets"]] == ["mean-00.nii.gz", "mean-01.nii.gz"]
    call("one", 1, [61.0])
    record = json.loads((tmp_path / "one/forecast.json").read_text())
    assert "ventricle_ml_spread" not in record["targets"][0]
    assert not (tmp_path / "one/mean.nii.gz").exists()


def test_a_forecast_goes_on_and_refuses_another_recipe(tmp_path: Path) -> None:
    save_scan(tmp_path / "scan.nii.gz", np.array(pixels.GRID.matrix), pixels.GRID.shape, CENTER)
    calls = []

    def model(x: Tensor, t: Tensor, cond: Tensor, source: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.zeros_like(x)

    def call(seed: int = 0) -> None:
        write_forecasts(
            pixels.generator(model, 0.5), tmp_path / "scan.nii.gz", {"age_years": 60.0}, [62.0], tmp_path / "out", 3,
            seed, steps=1, sampler="euler",
        )  # fmt: skip

    call()
    first = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    for name in ("volume-00001.nii.gz", "mean.nii.gz", "forecast.json"):
        (tmp_path / "out" / name).unlink()
    calls.clear()
    call()
    assert calls == [1]  # the lost one alone
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == first
    with pytest.raises(G3nError, match="holds something else"):
        call(seed=1)


def test_earlier_scans_are_read_with_their_years(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This model adds what it is told of the past: each scan's latent times the decades since."""
    names = {60.0: "a", 57.5: "b", 50.0: "c"}
    for i, name in enumerate(names.values()):
        points = pixels.world(pixels.GRID.shape, pixels.GRID.matrix)
        volume = (300 + points[..., i]) * pixels.ball(points)
        nib.save(nib.Nifti1Image(volume.astype(np.float32), pixels.GRID.matrix), tmp_path / f"{name}.nii.gz")

    def model(x: Tensor, t: Tensor, cond: Tensor, source: Tensor) -> Tensor:
        first, second = source[..., 1:4], source[..., 4:7]
        return first[..., :1] * first[..., 1:2] + 10 * second[..., :1] * second[..., 1:2]

    made = dataclasses.replace(pixels.generator(model, 0.0), history=3)
    monkeypatch.setattr("g3n.generate.open_forecaster", lambda run, device: made)

    def call(output: str, ages: tuple[float, ...]) -> int:
        words = [w for age in ages for w in ("--baseline", f"{tmp_path}/{names[age]}.nii.gz", "--age", str(age))]
        line = ["g3n", "forecast", "--run", "x", *words, "--target-age", "65", "--output", f"{tmp_path}/{output}"]
        monkeypatch.setattr("sys.argv", [*line, "--steps", "1"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    assert call("out", (50.0, 60.0, 57.5)) == 0  # in any order
    record = json.loads((tmp_path / "out/forecast.json").read_text())
    assert [scan["years_before"] for scan in record["earlier"]] == [2.5, 10.0]
    assert record["variables"]["age_years"] == 60.0
    baseline, earlier, oldest = (read_volume(tmp_path / f"{name}.nii.gz")[0] for name in "abc")
    found = read_volume(tmp_path / "out/volume-00000.nii.gz")[0]
    brain = found != 0
    zs = [(v - v[v != 0].mean()) / v[v != 0].std() for v in (earlier, oldest)]
    std = baseline[baseline != 0].std()
    expected = np.maximum(baseline + std * (0.25 * zs[0] + 10 * 1.0 * zs[1]), 1e-3 * std)
    assert np.allclose(found[brain], expected[brain], rtol=1e-3, atol=0.1)
    assert call("alone", (60.0,)) == 0
    assert "earlier" not in json.loads((tmp_path / "alone/forecast.json").read_text())
    monkeypatch.setattr("g3n.generate.open_forecaster", lambda run, device: dataclasses.replace(made, history=2))
    assert call("many", (50.0, 60.0, 57.5)) == 2
    assert not (tmp_path / "many").exists()
