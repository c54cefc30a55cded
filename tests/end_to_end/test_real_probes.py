"""Sex and age from real scans: anyone's features with anyone's table, and how few people the figures rest on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from g3n.cli import app

REAL = Path(os.environ.get("G3N_REAL_DATA", "") or "/nowhere")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="G3N_REAL_DATA names no folder of real scans"),
]


def coarse(path: Path) -> np.ndarray:
    """Mean intensity of 6^3 blocks over their largest: a poor encoder, but one of the scan."""
    image = nib.as_closest_canonical(nib.load(path))  # type: ignore[arg-type]
    voxels = np.asarray(image.dataobj, np.float32)[::2, ::2, ::2]
    edges = [np.linspace(0, n, 7).astype(int)[:-1] for n in voxels.shape[:3]]
    sums = np.add.reduceat(np.add.reduceat(np.add.reduceat(voxels, edges[0], 0), edges[1], 1), edges[2], 2)
    return (sums / sums.max()).ravel()


def test_sex_and_age_of_real_people(tmp_path: Path) -> None:
    people = pd.read_csv(REAL / "participants.tsv", sep="\t", dtype=str, keep_default_na=False)
    scans = {s: sorted((REAL / s).glob("ses-*/anat/*_T1w.nii.gz"))[:1] for s in people["participant_id"]}
    scans = {s: found for s, found in scans.items() if found}
    np.savez(
        tmp_path / "coarse.npz", features=np.stack([coarse(f[0]) for f in scans.values()]), ids=np.array(list(scans))
    )
    words = [
        "probe",
        "--features",
        tmp_path / "coarse.npz",
        "--targets",
        REAL / "participants.tsv",
        "--id",
        "participant_id",
    ]
    words += ["--task", "sex", "--task", "age", "--output", tmp_path / "out", "--no-mlflow"]
    app([str(word) for word in words], standalone_mode=False)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    known = people[people["participant_id"].isin(scans)]
    sex, age = found["tasks"]["sex all"], found["tasks"]["age all"]
    assert sex["classes"] == {s: int((known["sex"] == s).sum()) for s in ("F", "M")}
    assert age["n_subjects"] == int((known["age"] != "n/a").sum())
    for task, metric in ((sex, "auroc"), (age, "mae")):
        cell = task["folds"]["coarse features"]
        assert cell[metric]["low"] < cell[metric]["value"] < cell[metric]["high"]
        assert 0 < cell["p"] <= cell["p_holm"] <= 1
    assert age["folds"]["coarse features"]["mae"]["value"] < 40
