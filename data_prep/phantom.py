"""The embedded default cohort: a BIDS folder of synthetic subjects whose true volumes are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.anatomy import BOX_MM, Shape, Tumor, box_grid, load_template, make
from data_prep.painting import MODALITIES, Scanner, paint
from data_prep.progress import run_all
from data_prep.shards import write_text
from g3n.config import G3nError
from g3n.nifti import write_volume
from g3n.templates import read_template

VERSION = 2
SUFFIX = {"T1": "T1w", "T1c": "ce-gadolinium_T1w", "T2": "T2w", "FLAIR": "FLAIR"}
TRUTH_COLUMNS = ("subject", "session", "modality", "path", "ventricle_ml", "brain_ml", "lesion_ml")
_RECIPE = "phantom.json"
_PAD = 2  # voxels of field of view beyond the atlas box, on each side


@dataclass(frozen=True)
class Cohort:
    """``share_3t`` of its subjects are scanned at 3 T; ``axes`` is the orientation of its files. Noise is that of 1 mm voxels."""

    name: str
    scanner: Scanner
    share_3t: float
    axes: str


COHORTS = (
    Cohort("PhantomA", Scanner(contrast=1.0, bias=0.06, noise=0.045), 0.7, "RAS"),
    Cohort("PhantomB", Scanner(contrast=0.8, bias=0.10, noise=0.06), 0.3, "LAS"),
    Cohort("PhantomC", Scanner(contrast=1.15, bias=0.08, noise=0.038), 0.5, "PSR"),
)


@dataclass(frozen=True)
class Visit:
    days: int
    age_years: float
    hyper: float
    shape: Shape


@dataclass(frozen=True)
class Subject:
    label: str
    sex: str
    diagnosis: str
    cohort: Cohort
    field_strength_t: float
    modalities: tuple[str, ...]
    visits: tuple[Visit, ...]
    seed: tuple[int, int]


def ventricle_law_ml(age_years: float, sex: str, diagnosis: str) -> float:
    """Median volume of the lateral ventricles of a first visit."""
    return (
        15.0 * math.exp(0.0187 * (age_years - 25)) * (1.08 if sex == "M" else 1.0) * (1.4 if diagnosis == "AD" else 1)
    )


def draw_subject(seed: int, number: int) -> Subject:
    """Subject ``number`` of the cohort ``seed``, independent of how many there are."""
    rng = np.random.default_rng([seed, number])
    diagnosis = str(rng.choice(["HC", "AD", "glioma"], p=[0.6, 0.2, 0.2]))
    sex = str(rng.choice(["F", "M"]))
    age = rng.uniform(55 if diagnosis == "AD" else 18, 84)
    cohort = COHORTS[rng.integers(len(COHORTS))]
    field = 3.0 if rng.random() < cohort.share_3t else 1.5
    order = [MODALITIES[i] for i in rng.permutation(len(MODALITIES))]
    chosen = order[: rng.choice([1, 2, 4], p=[0.6, 0.32, 0.08])]
    visits = int(rng.choice([1, 2, 3, 4], p=[0.5, 0.3, 0.13, 0.07]))
    gap = {"HC": (240, 720), "AD": (180, 540), "glioma": (60, 240)}[diagnosis]
    days = np.concatenate([[0], np.cumsum(rng.integers(*gap, visits - 1))]).astype(int)

    size = (1.02 if sex == "M" else 0.975) * math.exp(0.02 * rng.standard_normal())
    first_ml = ventricle_law_ml(age, sex, diagnosis) * math.exp(0.15 * rng.standard_normal())
    tissue = float(np.clip((age - 18) / 85 + 0.06 * rng.standard_normal() + 0.15 * (diagnosis == "AD"), 0, 1.2))
    hyper = float(np.clip((age - 50) / 40, 0, 1) * rng.uniform(0.3, 1))
    pace = 3.0 if diagnosis == "AD" else 1.0
    tumor = _draw_tumor(rng) if diagnosis == "glioma" else None
    growth = rng.uniform(0.1, 0.5)  # of the radius, a year
    shape_seed = int(rng.integers(2**31))
    made = []
    for day in days:
        years = day / 365.25
        shape = Shape(
            seed=shape_seed,
            size=size,
            ventricle_ml=min(first_ml * math.exp(0.0187 * pace * years), 140.0),
            atrophy=tissue + pace * years / 85,
            tumor=replace(tumor, radius_mm=tumor.radius_mm * (1 + growth * years)) if tumor else None,
        )
        made.append(Visit(int(day), round(age + years, 2), hyper, shape))
    modalities = tuple(m for m in MODALITIES if m in chosen)
    return Subject(f"P{number + 1:05d}", sex, diagnosis, cohort, field, modalities, tuple(made), (seed, number))


def _draw_tumor(rng: np.random.Generator) -> Tumor:
    """In the white matter of either hemisphere, clear of the midline and the brain stem (RAS mm of the template)."""
    x, y, z = rng.choice([-1, 1]) * rng.uniform(22, 38), rng.uniform(-60, 28), rng.uniform(8, 38)
    radius, oedema = rng.uniform(11, 19), rng.uniform(1.4, 2.1)
    return Tumor((float(x), float(y), float(z)), float(radius), float(oedema), int(rng.integers(2**31)))


def make_phantom(output: Path, subjects: int, spacing_mm: float, seed: int, workers: int | None = None) -> int:
    """Write the cohort and return its number of scans. The same arguments give the same files, whatever ``workers``.

    What an interrupted call finished is kept. Raises G3nError for impossible arguments or a folder with other content.
    """
    if not 1 <= subjects <= 99_999:
        raise G3nError(f"subjects is {subjects}; give 1 to 99999")
    if not 0.5 <= spacing_mm <= 10:
        raise G3nError(f"spacing is {spacing_mm} mm; give 0.5 to 10")
    if seed < 0:
        raise G3nError(f"seed is {seed}; give 0 or more")
    read_template("t1")
    recipe = {"phantom": VERSION, "subjects": subjects, "spacing_mm": spacing_mm, "seed": seed, "box_mm": list(BOX_MM)}
    _open_output(output, recipe)
    work = partial(_write_subject, str(output), spacing_mm, seed)
    rows = [row for part in run_all(work, range(subjects), workers, "phantom") for row in part]
    people = [draw_subject(seed, i) for i in range(subjects)]
    table = [(f"sub-{p.label}", p.sex, p.diagnosis, p.cohort.name) for p in people]
    _write_table(output / "participants.tsv", ("participant_id", "sex", "diagnosis", "cohort"), table)
    _write_table(output / "truth.tsv", TRUTH_COLUMNS, [[row[c] for c in TRUTH_COLUMNS] for row in rows])
    return len(rows)


def _open_output(output: Path, recipe: dict[str, Any]) -> None:
    mark = output / _RECIPE
    if mark.is_file():
        if json.loads(mark.read_text()) != recipe:
            raise G3nError(f"'{output}' holds another phantom ({mark.name} differs); give an empty folder")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise G3nError(f"'{output}' is not an empty folder; give a new one")
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(recipe) + "\n")
    description = {
        "Name": "g3n phantom",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "CC0",
        "SourceDatasets": [{"URL": "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009"}],
    }
    write_text(output / "dataset_description.json", json.dumps(description, indent=1) + "\n")
    write_text(output / ".bidsignore", f"{_RECIPE}\ntruth.tsv\n**/truth.json\n")


def _write_subject(output: str, spacing_mm: float, seed: int, number: int) -> list[dict[str, Any]]:
    """Write one subject's files and return its rows of truth.tsv; truth.json, written last, says that it is whole."""
    subject = draw_subject(seed, number)
    folder = Path(output) / f"sub-{subject.label}"
    done = folder / "truth.json"
    if done.is_file():
        rows = json.loads(done.read_text())
        if all((Path(output) / row["path"]).is_file() for row in rows):
            return list(rows)
    divide = max(1, round(spacing_mm / 2))
    template = load_template(box_grid(spacing_mm, divide))
    scanner = subject.cohort.scanner
    weak_field = 1.8 if subject.field_strength_t < 2 else 1.0
    scanner = replace(scanner, noise=weak_field * scanner.noise * spacing_mm**-1.5)  # larger voxels average it out
    rows, sessions = [], []
    for v, visit in enumerate(subject.visits, 1):
        anatomy = make(template, visit.shape)
        sessions.append((f"ses-{v:02d}", f"{visit.age_years:g}", visit.days))
        for m, modality in enumerate(subject.modalities):
            rng = np.random.default_rng([*subject.seed, v, m])
            image = np.pad(paint(anatomy, modality, scanner, visit.hyper, divide, rng), _PAD)
            affine = box_grid(spacing_mm).matrix
            affine[:3, 3] -= _PAD * spacing_mm
            image, affine = reorient(image, affine, subject.cohort.axes)
            stem = f"sub-{subject.label}/ses-{v:02d}/anat/sub-{subject.label}_ses-{v:02d}_{SUFFIX[modality]}"
            write_volume(Path(output) / f"{stem}.nii.gz", image, affine)
            sidecar = {"Modality": "MR", "MagneticFieldStrength": subject.field_strength_t}
            write_text(Path(output) / f"{stem}.json", json.dumps(sidecar) + "\n")
            volumes = {
                "ventricle_ml": round(anatomy.ventricle_ml, 3),
                "brain_ml": round(anatomy.brain_ml, 2),
                "lesion_ml": round(anatomy.lesion_ml, 3),
            }
            row = {"subject": subject.label, "session": f"{v:02d}", "modality": modality, "path": f"{stem}.nii.gz"}
            rows.append(row | volumes)
    columns = ("session_id", "age", "days_from_baseline")
    _write_table(folder / f"sub-{subject.label}_sessions.tsv", columns, sessions)
    write_text(done, json.dumps(rows))
    return rows


def reorient(volume: np.ndarray, affine: np.ndarray, axes: str) -> tuple[np.ndarray, np.ndarray]:
    """A RAS volume with its axes running to ``axes`` (as 'LPS'); the affine follows, no voxel moves in the world."""
    order = [next(i for i, pair in enumerate(("RL", "AP", "SI")) if letter in pair) for letter in axes]
    affine = affine[:, [*order, 3]].copy()
    volume = volume.transpose(order)
    for i, letter in enumerate(axes):
        if letter in "LPI":
            volume = np.flip(volume, i)
            affine[:, 3] += affine[:, i] * (volume.shape[i] - 1)
            affine[:, i] *= -1
    return np.ascontiguousarray(volume), affine


def _write_table(path: Path, columns: tuple[str, ...], rows: list[Any]) -> None:
    text = "".join("\t".join(str(value) for value in row) + "\n" for row in [columns, *rows])
    write_text(path, text)
