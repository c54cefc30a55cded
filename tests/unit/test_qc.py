"""The quality page: outliers first, left is left, nothing from the data is run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as picture

from data_prep.manifest import Scan, write_manifest
from data_prep.preprocess import volume_path
from data_prep.qc import NUMBERS, outlier_scores, write_page
from data_prep.recipe import Recipe
from g3n.config import G3nError
from g3n.nifti import write_volume

RECIPE = Recipe((40, 48, 40), 4.0)


def make(folder: Path, count: int, cohort: str = "X") -> list[Scan]:
    """Derivatives as preprocess writes them; the last scan overlaps the atlas badly."""
    rng = np.random.default_rng(0)
    scans = []
    for i in range(count):
        scan = Scan(f"{i:016x}", "01", "T1", "", 40.0, "F", "HC", cohort, 3.0, 0.0, "train")
        scan = replace(scan, path=volume_path(scan))
        volume = np.zeros(RECIPE.shape, np.float32)
        volume[10:30, 12:36, 10:30] = 100
        volume[26:30, 12:16, 26:30] = 900  # to the left, in front, above
        write_volume(folder / scan.path, volume, RECIPE.grid.matrix)
        quality = {name: float(rng.normal(0.95, 0.01)) for name in NUMBERS}
        if i == count - 1:
            quality["dice_atlas"] = 0.5
        about = {"align": "affine", "strip": "deepbet", "flags": [], "quality": quality}
        (folder / scan.path.replace(".nii.gz", ".json")).write_text(json.dumps(about))
        scans.append(scan)
    write_manifest(folder / "manifest.tsv", Path(), scans, {})
    (folder / "recipe.json").write_text(json.dumps(RECIPE.describe()))
    reason = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    (folder / "failures.tsv").write_text(f"subject\tsession\tmodality\trun\treason\nabc\t01\tT1\t1\t{reason}\n")
    return scans


def data_of(page: Path) -> dict:  # type: ignore[type-arg]
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    return dict(json.loads(found[1]))


def test_outliers_come_first_and_nothing_is_run(tmp_path: Path) -> None:
    scans = make(tmp_path / "d", 6)
    assert write_page(tmp_path / "d", tmp_path / "qc", workers=1) == 6
    data = data_of(tmp_path / "qc/index.html")
    assert data["rows"][0]["subject"] == scans[-1].subject
    assert data["rows"][0]["z"] > 10
    text = (tmp_path / "qc/index.html").read_text()
    assert text.count("<script") == 2
    assert "<img src=x" not in text
    assert "innerHTML" not in text
    assert data["failures"][0]["reason"].startswith("</script>")
    assert str(tmp_path) not in text


def test_left_is_on_the_right_and_up_is_up(tmp_path: Path) -> None:
    [scan] = make(tmp_path / "d", 1)
    volume = np.zeros(RECIPE.shape, np.float32)
    volume[4:36, 4:44, 4:36] = 100
    volume[30:36, :, :] = 900  # the patient's left
    volume[:, :, 32:36] = 500  # above
    write_volume(tmp_path / "d" / scan.path, volume, RECIPE.grid.matrix)
    write_page(tmp_path / "d", tmp_path / "qc", workers=1)
    shown = picture.imread(tmp_path / "qc/thumbs" / f"{Path(scan.path).name.removesuffix('.nii.gz')}.png")
    assert shown.shape[:2] == (128, 384)
    axial, coronal, sagittal = (shown[:, 128 * n : 128 * (n + 1), 2] for n in range(3))
    assert axial[:, 64:].mean() > 2 * axial[:, :64].mean()
    assert coronal[:, 64:].mean() > 1.5 * coronal[:, :64].mean()
    assert sagittal[:64].mean() > 1.2 * sagittal[64:].mean()


def test_again_draws_only_what_is_new(tmp_path: Path) -> None:
    scans = make(tmp_path / "d", 3)
    write_page(tmp_path / "d", tmp_path / "qc", workers=1)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "qc/thumbs").iterdir()}
    source = tmp_path / "d" / scans[1].path
    source.write_bytes(source.read_bytes())
    write_page(tmp_path / "d", tmp_path / "qc", workers=1)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "qc/thumbs").iterdir()}
    assert [name for name in before if after[name] != before[name]] == [f"{Path(scans[1].path).name[:-7]}.png"]


def test_scores_are_within_a_modality() -> None:
    t1 = [{"modality": "T1", "q": [1.0 + 0.01 * i, *[0.5] * 7]} for i in range(9)]
    t2 = [{"modality": "T2", "q": [5.0 + 0.01 * i, *[0.5] * 7]} for i in range(9)]
    assert max(outlier_scores([*t1, *t2])) < 3
    assert outlier_scores([*t1, {"modality": "T1", "q": [5.0, *[0.5] * 7]}])[-1] > 50


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="does not exist"):
        write_page(tmp_path, tmp_path / "qc")
