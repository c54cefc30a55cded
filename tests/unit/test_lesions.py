"""Lesions measured on volumes agree with the tumors that the phantom planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from data_prep.anatomy import box_grid, load_template, make
from data_prep.painting import MODALITIES, paint
from data_prep.phantom import draw_subject, reorient
from g3n.evaluate.anatomy import lesion_present, measure
from g3n.nifti import atlas_grid
from g3n.templates import ventricle_distance_mm

GRID = atlas_grid((40, 48, 40), 4.0)
OF_EACH = {"glioma": 12, "HC": 8, "AD": 4}


@pytest.fixture(scope="module")
def measured() -> dict[str, np.ndarray]:
    """[subjects, 3] of (true, measured, judged present) lesion by modality: last visits, as make_phantom writes them."""
    template = load_template(box_grid(4.0, 2))
    left = dict(OF_EACH)
    rows: dict[str, list[tuple[float, float, float]]] = {modality: [] for modality in MODALITIES}
    for number in range(200):
        subject = draw_subject(21, number)
        if left[subject.diagnosis] == 0:
            continue
        left[subject.diagnosis] -= 1
        visit = subject.visits[-1]
        anatomy = make(template, visit.shape)
        noise = subject.cohort.scanner.noise * (1.8 if subject.field_strength_t < 2 else 1.0) * 4.0**-1.5
        scanner = replace(subject.cohort.scanner, noise=noise)
        for m, modality in enumerate(MODALITIES):
            image = paint(anatomy, modality, scanner, visit.hyper, 2, np.random.default_rng([*subject.seed, m]))
            volume, affine = reorient(image, box_grid(4.0).matrix, "LPS")
            assert np.allclose(affine, GRID.matrix)
            found = measure(volume.astype(np.float32), GRID, modality)
            rows[modality].append((anatomy.lesion_ml, found.lesion_ml, lesion_present(found, modality)))
    return {modality: np.array(part) for modality, part in rows.items()}


@pytest.mark.parametrize(
    ("modality", "auc", "r", "right"),
    [("T1", 0.93, 0.75, 0.85), ("T1c", 0.97, 0.85, 0.9), ("T2", 0.97, 0.9, 0.9), ("FLAIR", 0.95, 0.85, 0.9)],
)
def test_lesions_as_the_phantom_planted_them(
    measured: dict[str, np.ndarray], modality: str, auc: float, r: float, right: float
) -> None:
    true, found, present = measured[modality].T
    planted = true > 0
    assert planted.sum() == 12
    assert roc_auc_score(planted, found) >= auc
    assert np.corrcoef(true, found)[0, 1] >= r
    assert ((present[planted] == 1).mean() + (present[~planted] == 0).mean()) / 2 >= right


def head(lesion_level: float, center: tuple[int, int, int], both_sides: bool = False) -> tuple[np.ndarray, float]:
    """A FLAIR-like head with a ball of 4 voxels' radius, and the ball's volume in mL."""
    distance_mm = ventricle_distance_mm(GRID)
    volume = np.where(distance_mm < 29, 1.0, 0.0).astype(np.float32)
    volume[distance_mm < 0] = 0.2
    at = np.indices(GRID.shape)
    ball = sum((a - c) ** 2 for a, c in zip(at, center, strict=True)) <= 16
    ball |= ball[::-1] if both_sides else False
    volume[ball] = lesion_level
    return volume, float(ball.sum()) * 0.064


def test_a_ball_of_known_volume() -> None:
    place = (28, 24, 26)
    bright, true_ml = head(2.0, place)
    assert measure(bright, GRID, "FLAIR").lesion_ml == pytest.approx(true_ml, rel=0.1)
    assert measure(5 * bright, GRID, "FLAIR") == measure(bright, GRID, "FLAIR")
    dark, _ = head(0.5, place)
    assert measure(dark, GRID, "T1").lesion_ml == pytest.approx(true_ml, rel=0.1)
    assert measure(dark, GRID, "FLAIR").lesion_ml == 0  # dark on FLAIR is CSF, not a lesion
    assert measure(head(1.0, place)[0], GRID, "T1").lesion_ml == 0
    assert measure(head(2.0, place, both_sides=True)[0], GRID, "FLAIR").lesion_ml == 0  # both sides alike
