"""The phantom: the same files by seed, true volumes that follow the stated law, images that show them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.anatomy import Template, box_grid, load_template, make
from data_prep.painting import CONTRASTS, Scanner, paint
from data_prep.phantom import draw_subject, make_phantom, reorient, ventricle_law_ml
from g3n.config import G3nError
from g3n.nifti import atlas_grid, to_grid

pytest.importorskip("nilearn")
QUIET = Scanner(contrast=1.0, bias=0.0, noise=0.0)


@pytest.fixture(scope="module")
def template() -> Template:
    return load_template(box_grid(4.0))


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "bids"
    make_phantom(folder, 6, 8.0, 0, workers=1)
    return folder


def test_same_seed_same_files_whatever_the_workers_and_interruptions(cohort: Path, tmp_path: Path) -> None:
    make_phantom(tmp_path / "b", 6, 8.0, 0, workers=2)
    whole = digest(cohort)
    assert digest(tmp_path / "b") == whole
    victim = next((tmp_path / "b").glob("sub-P00002/ses-01/anat/*.nii.gz"))
    victim.unlink()  # as if stopped there
    (tmp_path / "b" / "truth.tsv").unlink()
    make_phantom(tmp_path / "b", 6, 8.0, 0, workers=1)
    assert digest(tmp_path / "b") == whole
    with pytest.raises(G3nError, match="another phantom"):
        make_phantom(tmp_path / "b", 6, 8.0, 1, workers=1)


def test_bids_layout_and_truth(cohort: Path) -> None:
    with open(cohort / "truth.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    images = {str(p.relative_to(cohort)) for p in cohort.glob("sub-*/ses-*/anat/*.nii.gz")}
    assert {row["path"] for row in rows} == images
    for row in rows:
        image = nib.load(cohort / row["path"])
        sidecar = json.loads((cohort / row["path"].replace(".nii.gz", ".json")).read_text())
        assert sidecar["MagneticFieldStrength"] in (1.5, 3.0)
        assert image.get_data_dtype() == np.int16
        assert ("ce-gadolinium" in row["path"]) == (row["modality"] == "T1c")
        # its own field of view, yet every voxel meets one of the atlas grid's: nothing is blurred on the way
        data = np.asarray(image.dataobj, np.float32)
        on_atlas = to_grid(data, image.affine, atlas_grid((20, 24, 20), 8.0))
        assert sorted(on_atlas[on_atlas > 0].round()) == sorted(data[data > 0])
    with open(cohort / "participants.tsv") as file:
        assert next(csv.reader(file, delimiter="\t")) == ["participant_id", "sex", "diagnosis", "cohort"]


def test_subjects_do_not_depend_on_their_number() -> None:
    assert draw_subject(3, 17) == draw_subject(3, 17)
    assert draw_subject(3, 17) != draw_subject(4, 17)
    subjects = [draw_subject(0, i) for i in range(400)]
    scans = sum(len(s.visits) * len(s.modalities) for s in subjects) / 400
    assert 2.3 < scans < 3.0  # 160 subjects: about 420 volumes
    assert {len(s.visits) for s in subjects} == {1, 2, 3, 4}
    assert {s.cohort.name for s in subjects} == {"PhantomA", "PhantomB", "PhantomC"}
    assert {s.field_strength_t for s in subjects} == {1.5, 3.0}
    for subject in subjects:
        ages = [visit.age_years for visit in subject.visits]
        assert 18 <= ages[0] <= 84
        assert ages == sorted(ages)


def test_first_visits_follow_the_ventricle_law() -> None:
    """Regression of log volume on age, sex and AD finds the law's numbers."""
    subjects = [draw_subject(1, i) for i in range(1500)]
    x = np.array([[1, s.visits[0].age_years - 25, s.sex == "M", s.diagnosis == "AD"] for s in subjects], float)
    y = np.log([s.visits[0].shape.ventricle_ml for s in subjects])
    base, age, male, ad = np.linalg.lstsq(x, y, rcond=None)[0]
    assert math.exp(base) == pytest.approx(15, rel=0.04)
    assert age == pytest.approx(0.0187, rel=0.05)
    assert math.exp(male) == pytest.approx(1.08, abs=0.03)
    assert math.exp(ad) == pytest.approx(1.4, abs=0.05)
    assert (y - x @ [base, age, male, ad]).std() == pytest.approx(0.15, abs=0.02)
    assert ventricle_law_ml(25, "F", "HC") == 15


def test_ad_progresses_faster() -> None:
    def rate(diagnosis: str) -> float:
        rates = []
        for s in (draw_subject(2, i) for i in range(300)):
            if s.diagnosis == diagnosis and len(s.visits) > 1:
                first, last = s.visits[0], s.visits[-1]
                ratio = last.shape.ventricle_ml / first.shape.ventricle_ml
                rates.append(math.log(ratio) / (last.days - first.days) * 365.25)
        return float(np.mean(rates))

    assert rate("HC") == pytest.approx(0.0187, rel=0.01)
    assert rate("AD") == pytest.approx(3 * 0.0187, rel=0.05)


def test_anatomy_has_the_volume_asked_for(template: Template) -> None:
    ages, measured, cortex = [], [], []
    for i in range(60):
        subject = draw_subject(5, i)
        visit = subject.visits[0]
        anatomy = make(template, visit.shape)
        assert anatomy.ventricle_ml == pytest.approx(visit.shape.ventricle_ml, rel=0.01)
        inside = anatomy.mask > 0.5
        parts = anatomy.gm + anatomy.wm + anatomy.csf + anatomy.ventricle + anatomy.core + anatomy.rim + anatomy.oedema
        assert np.percentile(np.abs(parts[inside] - 1), 99) < 0.02
        assert 900 < anatomy.brain_ml < 1900
        assert (anatomy.lesion_ml > 3) == (subject.diagnosis == "glioma")
        if subject.diagnosis == "HC":
            ages.append(visit.age_years)
            measured.append(math.log(anatomy.ventricle_ml))
            cortex.append(anatomy.gm.sum() / anatomy.mask.sum())
    assert np.corrcoef(ages, measured)[0, 1] > 0.85
    assert np.corrcoef(ages, cortex)[0, 1] < -0.7


def test_tumor_grows_and_pushes(template: Template) -> None:
    subject = next(s for s in (draw_subject(0, i) for i in range(50)) if s.diagnosis == "glioma")
    small = subject.visits[0].shape
    assert small.tumor is not None
    large = dataclasses.replace(small, tumor=dataclasses.replace(small.tumor, radius_mm=1.3 * small.tumor.radius_mm))
    a, b = make(template, small), make(template, large)
    assert b.lesion_ml > 1.4 * a.lesion_ml
    assert b.ventricle_ml == pytest.approx(a.ventricle_ml, rel=0.02)  # pushed aside, not replaced


def test_contrast_of_modalities(template: Template) -> None:
    subject = next(s for s in (draw_subject(0, i) for i in range(50)) if s.diagnosis == "glioma")
    anatomy = make(template, subject.visits[0].shape)

    def mean(modality: str, tissue: np.ndarray) -> float:
        image = paint(anatomy, modality, QUIET, 0.0, 1, np.random.default_rng(0)).astype(float)
        weight = tissue * (tissue > 0.6) * (image > 0)
        return float((image * weight).sum() / weight.sum())

    a = anatomy
    csf = a.csf + a.ventricle
    assert mean("T1", a.wm) > mean("T1", a.gm) > 1.5 * mean("T1", csf)
    assert mean("T2", csf) > 1.3 * mean("T2", a.gm) > 1.3 * mean("T2", a.wm)
    assert mean("FLAIR", csf) < 0.5 * mean("FLAIR", a.wm)
    assert mean("FLAIR", a.oedema) > 1.3 * mean("FLAIR", a.gm)
    assert mean("T1c", a.rim) > 1.2 * mean("T1c", a.wm)
    assert mean("T1", a.rim) < mean("T1", a.wm)


@pytest.mark.parametrize("modality", ["T1", "T2"])
def test_ventricles_can_be_measured_in_the_image(template: Template, modality: str) -> None:
    """Share of CSF by intensity near the ventricles, against the true volume, over subjects of all ages."""
    true, found = [], []
    tissue = CONTRASTS[modality]
    for i in range(0, 24):
        subject = draw_subject(7, i)
        if subject.diagnosis == "glioma":
            continue
        anatomy = make(template, subject.visits[0].shape)
        image = paint(anatomy, modality, QUIET, 0.0, 1, np.random.default_rng(0)).astype(float)
        near = (anatomy.rim_distance_mm < 3) & (image > 0)
        white = np.median(image[(anatomy.wm > 0.9) & (image > 0)])
        share = (image / white - 1) / (tissue.csf / tissue.wm - 1)
        true.append(anatomy.ventricle_ml)
        found.append(np.clip(share[near], 0, 1).sum() * 0.064)
    assert np.corrcoef(true, found)[0, 1] > 0.98
    assert np.mean(np.array(found) / true) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("axes", ["RAS", "LAS", "PSR", "LPI"])
def test_reorient_moves_no_voxel_in_the_world(axes: str) -> None:
    rng = np.random.default_rng(0)
    volume = rng.random((4, 5, 6)).astype(np.float32)
    affine = np.array([[2, 0, 0, -3], [0, 2, 0, 5], [0, 0, 2, 7], [0, 0, 0, 1]], float)
    turned, turned_affine = reorient(volume, affine, axes)
    assert "".join(nib.aff2axcodes(turned_affine)) == axes
    back = nib.as_closest_canonical(nib.Nifti1Image(turned, turned_affine))
    np.testing.assert_array_equal(back.get_fdata(dtype=np.float32), volume)
    np.testing.assert_allclose(back.affine, affine)


def test_impossible_arguments(tmp_path: Path) -> None:
    for arguments in ((0, 4.0, 0), (5, 0.1, 0), (5, 4.0, -1)):
        with pytest.raises(G3nError):
            make_phantom(tmp_path / "x", *arguments)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("keep")
    with pytest.raises(G3nError, match="not an empty folder"):
        make_phantom(tmp_path / "x", 1, 8.0, 0)
