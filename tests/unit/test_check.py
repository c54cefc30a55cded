"""check: each thing that would spoil a training is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep.check import Problem, check_all
from data_prep.cli import app
from data_prep.manifest import Scan, write_manifest
from data_prep.preprocess import preprocess_all
from data_prep.recipe import Recipe
from g3n.config import G3nError
from g3n.nifti import write_volume

AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])


def scan(subject: str, path: str, **more: object) -> Scan:
    plain = Scan(subject, "1", "T1", path, 40.0, "F", "HC", "X", 3.0, 0.0, "train")
    return replace(plain, **more)  # type: ignore[arg-type]


def volume(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    inner = rng.integers(50, 900, (22, 26, 22)).astype(np.int16)
    return np.pad(inner, 3)


def problems(root: Path, *manifests: Sequence[Scan]) -> list[tuple[bool, str, str]]:
    """fatal, kind and text of each problem; each list of scans becomes a manifest."""
    paths = []
    for i, scans in enumerate(manifests):
        paths.append(root / f"m{i}.tsv")
        write_manifest(paths[-1], root, list(scans), {})
    return [(p.fatal, p.kind, f"{p.where} {p.what}") for p in check_all(paths, workers=1)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(6):
        write_volume(tmp_path / f"{i}.nii.gz", volume(i), AFFINE)
    return tmp_path


def test_good_scans_have_no_problem(root: Path) -> None:
    assert problems(root, [scan("a", "0.nii.gz"), scan("b", "1.nii.gz")]) == []


def test_what_a_file_says_of_itself(root: Path) -> None:
    nan = volume(7).astype(np.float32)
    nan[10, 10, 10] = np.nan
    nib.save(nib.Nifti1Image(nan, AFFINE), root / "nan.nii.gz")
    (root / "cut.nii.gz").write_bytes((root / "1.nii.gz").read_bytes()[:900])
    write_volume(root / "lost.nii.gz", volume(8)[:, :, :20], np.diag([1.0, 1, 1, 1]))
    write_volume(root / "thick.nii.gz", volume(9)[:, :, :12], np.diag([5.0, 5, 9, 1]))
    unknown = nib.Nifti1Image(volume(10), None)
    unknown.header.set_zooms((5, 5, 5))
    nib.save(unknown, root / "unknown.nii.gz")
    names = ("nan", "cut", "lost", "thick", "unknown", "absent")
    found = problems(root, [scan(name, f"{name}.nii.gz") for name in names])
    assert [(fatal, kind) for fatal, kind, _ in found] == [
        (True, "unreadable"), (True, "unreadable"), (True, "spacing"), (True, "unreadable"),
        (False, "spacing"), (False, "orientation"),
    ]  # fmt: skip
    for (_, _, text), words in zip(
        found,
        ("nan.nii.gz", "cut.nii.gz' is truncated", "20 mm: its spacing", "absent.nii.gz", "9 mm is unusual", "unknown"),
        strict=True,
    ):
        assert words in text


def test_a_planned_spacing_is_believed(root: Path) -> None:
    write_volume(root / "lost.nii.gz", volume(8)[:, :, :20], np.diag([1.0, 1, 1, 1]))
    assert problems(root, [scan("a", "lost.nii.gz", axes="0,1,2", spacing_mm="5,5,5")]) == []


def test_the_same_voxels_twice(root: Path) -> None:
    image = nib.Nifti1Image(volume(0).astype(np.float32), AFFINE)
    image.header["descrip"] = b"another header"
    nib.save(image, root / "copy.nii.gz")
    [(fatal, kind, text)] = problems(root, [scan("a", "0.nii.gz"), scan("b", "copy.nii.gz")])
    assert (fatal, kind) == (True, "duplicate")
    assert "another person's" in text
    [(_, _, text)] = problems(root, [scan("a", "0.nii.gz"), scan("a", "copy.nii.gz", session="2")])
    assert "the same person's" in text


def test_a_person_in_two_splits_of_two_manifests(root: Path) -> None:
    one = [scan("a", "0.nii.gz", group="nki:1", cohort="nki")]
    two = [scan("b", "1.nii.gz", group="nki:1", cohort="nki2", split="val")]
    [(fatal, kind, text)] = problems(root, one, two)
    assert (fatal, kind) == (True, "split")
    assert "'nki:1' is in val here and in train" in text
    same_label = [scan("a", "1.nii.gz", cohort="other", split="val")]
    assert problems(root, [scan("a", "0.nii.gz")], same_label) == []


def test_rows_that_the_manifest_reader_refuses_are_all_listed(root: Path) -> None:
    bad = [scan("a", "0.nii.gz"), scan("b", "1.nii.gz", modality="T9"), scan("c", "2.nii.gz", field_strength_t=None)]
    write_manifest(root / "m.tsv", root, [*bad, scan("c", "3.nii.gz", session="2", split="val")], {})
    with pytest.raises(G3nError, match="line 3"):
        preprocess_all(root / "m.tsv", root / "d", Recipe((10, 12, 10), 16.0))
    found = check_all([root / "m.tsv"], workers=1)
    assert [p.fatal for p in found] == [True, True, False]
    assert "line 3: modality is 'T9'" in found[0].what
    assert "line 5: subject 'c' is in two splits" in found[1].what
    assert found[2] == Problem(False, "missing", str(root / "m.tsv"), "field_strength_t of 1 of 2 scans")


def test_values_that_cannot_be(root: Path) -> None:
    found = problems(
        root,
        [
            scan("a", "0.nii.gz", age_years=131.0),
            scan("b", "1.nii.gz", days_from_baseline=-40.0),
            scan("c", "2.nii.gz", field_strength_t=30.0),
            scan("d", "3.nii.gz", age_years=50.0),
            scan("d", "4.nii.gz", session="2", age_years=71.0, days_from_baseline=365.0, sex="M"),
        ],
    )
    assert all(fatal for fatal, _, _ in found)
    assert sorted(kind for _, kind, _ in found) == ["age", "age", "days", "field", "sex"]
    assert any("ages 50, 71 do not go with days 0, 365" in text for _, _, text in found)


def test_derivatives_must_lie_on_their_grid(root: Path) -> None:
    write_manifest(root / "m.tsv", root, [scan(f"s{i}", f"{i}.nii.gz") for i in range(3)], {})
    recipe = Recipe((28, 32, 28), 6.0)
    preprocess_all(root / "m.tsv", root / "d", recipe, workers=1)
    assert [p.kind for p in check_all([root / "d/manifest.tsv"], workers=1) if p.fatal] == []
    first, second, _ = sorted((root / "d").rglob("*.nii.gz"))
    turned = recipe.grid.matrix @ np.diag([-1, 1, 1, 1])
    write_volume(first, np.asarray(nib.load(first).dataobj), turned)
    write_volume(second, np.pad(volume(5), 2), recipe.grid.matrix)
    fatal = [p for p in check_all([root / "d/manifest.tsv"], workers=1) if p.fatal]
    assert sorted(p.kind for p in fatal) == ["grid", "orientation"]


def test_exit_codes_and_table(root: Path) -> None:
    write_manifest(root / "m.tsv", root, [scan("a", "0.nii.gz"), scan("b", "1.nii.gz")], {})
    done = CliRunner().invoke(app, ["check", str(root / "m.tsv")])
    assert (done.exit_code, done.stdout.strip()) == (0, "0 fatal, 0 to know of")
    write_manifest(root / "m.tsv", root, [scan("a", "0.nii.gz"), scan("b", "0.nii.gz")], {})
    done = CliRunner().invoke(app, ["check", str(root / "m.tsv")])
    assert done.exit_code == 1
    assert "duplicate" in done.stdout
    assert "1 fatal" in done.stdout
