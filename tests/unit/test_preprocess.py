"""preprocess: scans land on the atlas, bad ones are listed with a reason, nothing is done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.manifest import Scan, read_manifest, write_manifest
from data_prep.preprocess import preprocess_all, pseudonymize
from data_prep.recipe import Recipe, parse_shape
from g3n.config import G3nError
from g3n.names import read_key
from g3n.nifti import read_volume

RECIPE = Recipe((20, 24, 20), 8.0)
CENTER = np.array([0.0, -22.1, 9.5])  # of mass of the atlas brain


def brain(spacing: float = 4.0, center: np.ndarray = CENTER) -> tuple[np.ndarray, np.ndarray]:
    """An ellipsoid of a brain's size with a bright spot to the left, in front and above; RAS."""
    n = np.ceil(np.array([150, 190, 150]) / spacing).astype(int)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = center - spacing * (n - 1) / 2
    index = np.indices(n).reshape(3, -1).T
    world = (index * spacing + affine[:3, 3]).reshape(*n, 3) - center
    volume = np.where((world**2 / np.array([65, 82, 62]) ** 2).sum(-1) < 1, 100.0, 0.0)
    volume[((world - [-30, 40, 25]) ** 2).sum(-1) < 15**2] = 300.0
    return volume.astype(np.float32), affine


def make_manifest(root: Path, images: dict[str, tuple[np.ndarray, np.ndarray] | bytes]) -> Path:
    scans = []
    for name, image in images.items():
        path = root / f"sub-{name}/anat/sub-{name}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            nib.save(nib.Nifti1Image(*image), path)
        where = path.relative_to(root).as_posix()
        scans.append(Scan(name, "01", "T1", where, 40.0, "F", "HC", "X", 3.0, 0.0, "train"))
    write_manifest(root.parent / "manifest.tsv", root, scans, {})
    return root.parent / "manifest.tsv"


def volumes(manifest: Path, output: Path) -> dict[str, Path]:
    """Where the volume of each subject (by its own label) lies."""
    scans = read_manifest(manifest).scans
    named = pseudonymize(scans, read_key(manifest.parent / "subjects.key", output))
    return {raw.subject: output / new.path for raw, new in zip(scans, named, strict=True)}


def spot(path: Path) -> np.ndarray:
    volume, affine = read_volume(path)
    return affine[:3, :3] @ np.argwhere(volume > 200).mean(0) + affine[:3, 3]


def test_orientation_does_not_matter(tmp_path: Path) -> None:
    """The same brain in four orientations, oblique axes and another voxel size gives the same volume on the atlas."""
    volume, affine = brain()
    images: dict = {}
    for axes in ("RAS", "LPS", "PSR", "AIL"):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(axes)
        )
        image = nib.Nifti1Image(volume, affine).as_reoriented(turn)
        images[axes] = (np.asarray(image.dataobj), image.affine)
    images["fine"] = brain(2.0)
    manifest = make_manifest(tmp_path / "raw", images)
    outcomes = preprocess_all(manifest, tmp_path / "out", RECIPE, workers=1)
    assert [o.reason for o in outcomes] == [None] * 5
    assert {o.align for o in outcomes} == {"header"}
    paths = volumes(manifest, tmp_path / "out")
    assert {p.resolve() for p in paths.values()} == {p.resolve() for p in (tmp_path / "out").rglob("*.nii.gz")}
    results = {name: read_volume(path) for name, path in paths.items()}
    for name, (found, found_affine) in results.items():
        assert found.shape == (20, 24, 20)
        assert nib.aff2axcodes(found_affine) == ("L", "P", "S")
        np.testing.assert_allclose(found_affine, RECIPE.grid.matrix)
        np.testing.assert_allclose(found, results["RAS"][0], atol=1 if name != "fine" else 130)
        np.testing.assert_allclose(spot(paths[name]), CENTER + [-30, 40, 25], atol=4)
        assert (found > 0).sum() * 0.512 == pytest.approx((volume > 0).sum() * 0.064, rel=0.05)


def test_a_header_far_off_is_centered(tmp_path: Path) -> None:
    """Files on the SRI24 grid have their origin in a corner; header alignment alone would lose the brain."""
    images = {"far": brain(center=np.array([-118.0, 100.0, 77.0])), "near": brain(center=CENTER + [0, 12, 0])}
    manifest = make_manifest(tmp_path / "raw", images)
    outcomes = preprocess_all(manifest, tmp_path / "out", RECIPE, workers=1)
    assert [o.align for o in outcomes] == ["center", "header"]
    far, near = volumes(manifest, tmp_path / "out").values()
    np.testing.assert_allclose(spot(far), CENTER + [-30, 40, 25], atol=5)
    np.testing.assert_allclose(spot(near), CENTER + [-30, 52, 25], atol=5)
    assert json.loads(far.with_name(far.name.replace(".nii.gz", ".json")).read_text())["align"] == "center"
    outcomes = preprocess_all(manifest, tmp_path / "c", Recipe((20, 24, 20), 8.0, align="center"), workers=1)
    near = volumes(manifest, tmp_path / "c")["near"]
    np.testing.assert_allclose(spot(near), CENTER + [-30, 40, 25], atol=5)


def bad_images() -> dict:
    volume, affine = brain(8.0)
    whole = nib.Nifti1Image(volume, affine).to_bytes()
    nan = volume.copy()
    nan[5, 5, 5] = np.nan
    corner = np.zeros_like(volume)
    corner[0, 0, 0] = 1
    return {
        "good": (volume, affine),
        "squeezed": (volume[..., None], affine),
        "negative": (volume - 5, affine),
        "halved": whole[: len(whole) // 2],
        "fourD": (np.stack([volume, volume], -1), affine),
        "empty": (volume * 0, affine),
        "below": (-volume, affine),
        "nan": (nan, affine),
        "text": b"not an image",
        "speck": (corner, affine),
    }


def test_bad_scans_are_listed_and_the_rest_is_done(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "raw", bad_images())
    outcomes = preprocess_all(manifest, tmp_path / "out", RECIPE, workers=2)
    assert sum(o.reason is None for o in outcomes) == 3
    rows = [line.split("\t") for line in (tmp_path / "out" / "failures.tsv").read_text().splitlines()]
    label_of = {path.parent.parent.parent.name[4:]: name for name, path in volumes(manifest, tmp_path / "out").items()}
    reasons = {label_of[row[0]]: row[-1] for row in rows[1:]}
    words = {
        "halved": "truncated",
        "fourD": "4-D",
        "empty": "all zero",
        "below": "no positive voxel",
        "nan": "1 NaN",
        "text": "not a NIfTI",
        "speck": "covered|one value",
    }
    assert set(reasons) == set(words)
    for name, word in words.items():
        assert any(w in reasons[name] for w in word.split("|")), reasons[name]
    done = read_manifest(tmp_path / "out" / "manifest.tsv").scans
    assert {label_of[s.subject] for s in done} == {"good", "squeezed", "negative"}
    negative, _ = read_volume(volumes(manifest, tmp_path / "out")["negative"])
    assert negative.min() == 0
    leftovers = [p.name for p in (tmp_path / "out").rglob("*") if p.name.startswith(".")]
    assert not leftovers


def test_again_does_only_what_is_missing(tmp_path: Path) -> None:
    manifest = make_manifest(tmp_path / "raw", {"a": brain(8.0), "b": brain(8.0), "c": brain(8.0)})
    preprocess_all(manifest, tmp_path / "out", RECIPE, workers=1)
    paths = list(volumes(manifest, tmp_path / "out").values())
    before = [p.stat().st_mtime_ns for p in paths]
    content = [p.read_bytes() for p in paths]
    paths[0].write_bytes(content[0][:100])  # cut off
    volume, affine = brain(8.0)
    source = tmp_path / "raw" / "sub-b/anat/sub-b_T1w.nii.gz"
    nib.save(nib.Nifti1Image(volume * 2, affine), source)  # changed since
    preprocess_all(manifest, tmp_path / "out", RECIPE, workers=1)
    after = [p.stat().st_mtime_ns for p in paths]
    assert after[2] == before[2]
    assert paths[0].read_bytes() == content[0]
    assert read_volume(paths[1])[0].max() == pytest.approx(2 * read_volume(paths[0])[0].max())
    for other in (Recipe((20, 24, 20), 7.0), Recipe((20, 24, 20), 8.0, align="center")):
        with pytest.raises(G3nError, match="another recipe"):
            preprocess_all(manifest, tmp_path / "out", other, workers=1)
    with pytest.raises(G3nError, match="raw scans"):
        preprocess_all(manifest, tmp_path / "raw", RECIPE, workers=1)


def test_exit_codes(tmp_path: Path) -> None:
    def run(manifest: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data_prep", "preprocess", str(manifest), "--output", str(tmp_path / out)]
        command += ["--spacing-mm", "8", "--shape", "20,24,20", *more]
        environment = {**os.environ, "COLUMNS": "200"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    (tmp_path / "x").mkdir()
    every = run(make_manifest(tmp_path / "x" / "raw", {"empty": (np.zeros((4, 4, 4)), np.eye(4)), "text": b"no"}), "a")
    assert every.returncode == 1
    assert "2 failed" in every.stdout
    wrong = run(tmp_path / "none.tsv", "b")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert not (tmp_path / "b").exists()


def test_parse_shape() -> None:
    assert parse_shape("40,48,40") == (40, 48, 40)
    for text in ("40", "a,b,c", "1,2,3,4"):
        with pytest.raises(G3nError, match="three whole numbers"):
            parse_shape(text)
