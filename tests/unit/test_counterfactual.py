"""Counterfactuals of a generator whose flow is known in closed form, and of a scan that goes to its noise and back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from g3n import cli
from g3n.config import G3nError
from g3n.counterfactual import Varied, read_varied, write_counterfactuals, write_edits
from g3n.generate import Generator
from g3n.models.conditioning import VariableSet
from g3n.nifti import BRAIN_CENTER_MM, read_volume
from tests import pixels

POINTS = pixels.world(pixels.GRID.shape, pixels.GRID.matrix)
DARK = torch.from_numpy(pixels.blob(POINTS, np.array([0.0, -15.0, 15.0]), 18)).float().reshape(-1, 1)
AGES = Varied("age_years", (30.0, 50.0, 70.0))
GIVEN = {"modality": "T1", "sex": "F"}


def ages(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """A flow that keeps its noise, a tenth of it, and darkens the middle by 0.04 z a year; null is 0 years."""
    left = 1 - 0.9 * t[:, None, None]
    return -0.9 * x / left - 0.04 * cond[:, 1].nan_to_num(0)[:, None, None] * DARK * left


def tangled(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """Not linear and not solvable by hand."""
    age = cond[:, 1].nan_to_num(0)[:, None, None] / 50
    return torch.sin(2 * x) * (1 - t[:, None, None]) + 0.5 * torch.cos(3 * x + age) - age * DARK


def scan_file(folder: Path) -> Path:
    """A ball whose intensities vary smoothly."""
    volume = (300 + POINTS[..., 0] + 30 * np.cos(POINTS[..., 1] / 15)) * pixels.ball(POINTS, BRAIN_CENTER_MM)
    nib.save(nib.Nifti1Image(volume.astype(np.float32), pixels.GRID.matrix), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def volume(folder: Path, name: str) -> np.ndarray:
    image = nib.load(folder / name)
    assert np.array_equal(image.affine, pixels.GRID.matrix)
    return np.asarray(image.dataobj)


def test_one_variable_changes_and_the_noise_stays(tmp_path: Path) -> None:
    result = write_counterfactuals(pixels.generator(ages), GIVEN, AGES, tmp_path / "out", 2, 5, 40, 1.0, batch=4)
    out = tmp_path / "out"
    assert result == json.loads(json.dumps(result))
    assert [(v["seed"], v["conditions"]["age_years"]) for v in result["volumes"]] == [
        (s, a) for s in (5, 6) for a in (30.0, 50.0, 70.0)
    ]
    brain = pixels.ball(POINTS, BRAIN_CENTER_MM, 58)
    # x(1) = 0.1 (x0 - 0.04 age DARK): d/dt of x / (1 - 0.9 t) is the rest of the velocity
    for i, years in ((1, 20), (2, 40), (4, 20), (5, 40)):
        found = volume(out, f"difference-{i:05d}.nii.gz")
        expected = -100 * 0.1 * 0.04 * years * DARK.reshape(pixels.GRID.shape).numpy() * brain
        assert np.allclose(found, expected, atol=0.05)
        first = volume(out, f"volume-{i // 3 * 3:05d}.nii.gz")
        assert np.allclose(volume(out, f"volume-{i:05d}.nii.gz") - first, found, atol=1e-4)
    assert not np.allclose(volume(out, "volume-00000.nii.gz"), volume(out, "volume-00003.nii.gz"))
    assert not (out / "difference-00000.nii.gz").exists()
    for label, years in (("30", 30.0), ("50", 50.0), ("70", 70.0)):
        ml = [v["ventricle_ml"] for v in result["volumes"] if v["conditions"]["age_years"] == years]
        assert result["by_value"][label]["ventricle_ml"]["value"] == pytest.approx(np.mean(ml))
        assert result["by_value"][label]["brain_ml"]["subjects"] == 2
    picture = matplotlib.image.imread(out / "montage.png")
    assert picture.shape[1] > 1.5 * picture.shape[0] > 400  # two seeds, five columns


def test_it_goes_on_where_it_stopped_and_refuses_another_recipe(tmp_path: Path) -> None:
    calls, out = [], tmp_path / "out"

    def counting(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        calls.append(len(x))
        return ages(x, t, cond)

    made = pixels.generator(counting)
    write_counterfactuals(made, GIVEN, AGES, out, 2, steps=1, guidance=1.0, sampler="euler")
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    for name in ("volume-00004.nii.gz", "difference-00001.nii.gz", "counterfactual.json"):
        (out / name).unlink()
    calls.clear()
    write_counterfactuals(made, GIVEN, AGES, out, 2, steps=1, guidance=1.0, sampler="euler")
    assert calls == [1]
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    with pytest.raises(G3nError, match="holds something else"):
        write_counterfactuals(made, GIVEN, AGES, out, 3, steps=1, guidance=1.0, sampler="euler")
    with pytest.raises(G3nError, match="holds something else"):
        write_edits(made, scan_file(tmp_path), {**GIVEN, "age_years": 40}, AGES, out)


def test_an_edit_under_its_own_variables_is_the_tokenizers_reconstruction(tmp_path: Path) -> None:
    own: dict[str, Any] = {**GIVEN, "age_years": 50.0}
    result = write_edits(pixels.generator(tangled), scan_file(tmp_path), own, AGES, tmp_path / "out", steps=20)
    out = tmp_path / "out"
    assert result["reconstruction"]["rms_z"] < 1e-5
    assert result["reconstruction"]["psnr_db"] > 90
    plain, same = volume(out, "tokenizer.nii.gz"), volume(out, "volume-00000.nii.gz")
    assert np.abs(same - plain).max() < 0.01
    inside = plain != 0
    assert np.allclose(plain[inside], volume(out, "scan.nii.gz")[inside], atol=0.01)  # a tokenizer without loss
    assert np.abs(volume(out, "difference-00002.nii.gz")).max() < 0.01  # 50 years are its own
    younger, older = (volume(out, f"difference-{i:05d}.nii.gz") for i in (1, 3))
    middle = DARK.reshape(pixels.GRID.shape).numpy() > 0.8
    assert younger[middle].min() > 5
    assert older[middle].max() < -5
    assert list(result["by_value"]) == ["own 50", "30", "50", "70"]
    assert "scan.nii.gz" not in (out / "recipe.json").read_text()
    # a guidance other than 1 does not give the scan back, and the figure says so
    strong = write_edits(pixels.generator(tangled), tmp_path / "scan.nii.gz", own, AGES, tmp_path / "strong", 20, 3.0)
    assert strong["reconstruction"]["rms_z"] > 0.1


def test_an_edit_changes_what_the_flow_says(tmp_path: Path) -> None:
    """The closed form of ``ages``: the noise is that of the scan, so the change is that of drawn volumes."""
    own = {**GIVEN, "age_years": 60.0}
    write_edits(pixels.generator(ages), scan_file(tmp_path), own, Varied("age_years", (80.0,)), tmp_path / "out", 60)
    std = volume(tmp_path / "out", "scan.nii.gz")
    std = float(std[std != 0].std())
    brain = volume(tmp_path / "out", "tokenizer.nii.gz") != 0
    expected = -std * 0.1 * 0.04 * 20 * DARK.reshape(pixels.GRID.shape).numpy() * brain
    assert np.allclose(volume(tmp_path / "out", "difference-00001.nii.gz"), expected, atol=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("age_years", "is not name=value,value"),
        ("age_years=30,,50", "is not name=value,value"),
        ("agee=30,50", "unknown variable 'agee'; did you mean 'age_years'"),
        ("age_years=30,170", "age_years is 170; allowed range is 0 to 110"),
        ("sex=F,X", "sex is 'X'"),
        ("age_years=30,30.0", "gives a value twice"),
    ],
)
def test_what_cannot_vary(text: str, message: str) -> None:
    with pytest.raises(G3nError, match=message):
        read_varied(text, VariableSet(pixels.TABLE))


def test_what_can_vary() -> None:
    assert read_varied("age_years=30, 50", VariableSet(pixels.TABLE)) == Varied("age_years", (30.0, 50.0))
    assert read_varied("sex=F,M", VariableSet(pixels.TABLE)) == Varied("sex", ("F", "M"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "age_years=30"], "error: --vary age_years has one value"),
        (["--vary", "age_years=30,50", "--age", "40"], "error: variable 'age_years' is varied and also given"),
        (["--vary", "age_years=30", "--baseline", "{}"], "error: an edit of 'age_years' starts from the scan's own"),
        (
            ["--vary", "age_years=30", "--age", "40", "--baseline", "{}", "--seeds", "2"],
            "error: a scan has its own noise",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: Generator = pixels.generator(ages)
    monkeypatch.setattr("g3n.generate.open_generator", lambda run, device: made)
    scan = scan_file(tmp_path)
    line = ["g3n", "counterfactual", "--run", "x", "--output", f"{tmp_path}/out", *(w.format(scan) for w in words)]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: Generator = pixels.generator(ages)
    monkeypatch.setattr("g3n.generate.open_generator", lambda run, device: made)
    words = ["--run", "x", "--vary", "sex=F,M", "--set", "age_years=40", "--steps", "2", "--output", f"{tmp_path}/out"]
    monkeypatch.setattr("sys.argv", ["g3n", "counterfactual", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    record = json.loads((tmp_path / "out/counterfactual.json").read_text())
    assert (record["guidance"], record["varied"], record["values"]) == (2.0, "sex", ["F", "M"])
    assert record["by_value"] == {"F": {}, "M": {}}  # no modality: nothing can be measured
    assert not volume(tmp_path / "out", "difference-00001.nii.gz").any()  # this flow does not know sex
    assert math.isfinite(read_volume(tmp_path / "out/volume-00001.nii.gz")[0].sum())
