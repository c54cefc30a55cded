"""Healthy Brain Network: children and adolescents who seek help (http://fcon_1000.projects.nitrc.org/indi/cmi_healthy_brain_network)."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)(?P<sub>sub-NDAR[A-Z0-9]{8})/(?:ses-(?P<ses>[A-Za-z0-9]+)/)?anat/sub-NDAR[A-Z0-9]{8}[^/]*?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?(?P<space>_space-MNI[^/_]*)?(?P<prep>_desc-preproc)?_T1w\.nii\.gz$"
)
_SITE = r"Site-(SI|RU|CBIC|CUNY)"
_FIELD_T = {"SI": 1.5, "RU": 3.0, "CBIC": 3.0, "CUNY": 3.0}


def discover(root: Path) -> list[Image]:
    """qsiprep's T1 (MNI axes, ``desc-preproc``) or raw ones, where acq-HCP is preferred to acq-VNav by its run number."""
    images = []
    for path, m in files(root, _FILE):
        site = re.search(_SITE, path)
        images.append(
            Image(
                path,
                m["sub"],
                "T1",
                session=m["ses"] or "1",
                run=int(m["run"] or 1),
                acq=m["acq"] or "",
                site=site[1] if site else None,
                space="mni" if m["space"] or m["prep"] else "native_defaced",
                values={"field_strength_t": _FIELD_T[site[1]]} if site else {},
            )
        )
    return images


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """No diagnosis is public: all are PED_MIXED, by the cohort. Sex is 0 male, 1 female, unlike most cohorts."""
    paths = sorted(
        {*root.glob("participants*.tsv"), *root.glob("*/participants*.tsv"), *root.glob("participants*.csv")}
    )
    if not paths:
        find_table(root, "participants*.tsv")
    rows = []
    for path in paths:
        for row in read_table(path):
            low = {name.lower(): value for name, value in row.items()}
            subject = low.get("participant_id") or low.get("subject_id") or ""
            if not subject:
                raise G3nError(f"table '{path}' lacks the column participant_id or subject_id")
            ehq = number(low.get("ehq_total", ""))
            hand = None if ehq is None else "R" if ehq > 40 else "L" if ehq < -40 else "A"
            yes = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "1": "yes", "0": "no"}
            values = {
                "age_years": number(low.get("age", "")),
                "sex": code(low.get("sex", ""), {"0": "M", "1": "F", "male": "M", "female": "F"}, f"{path.name} Sex"),
                "handedness": hand,
                "diagnosis": "PED_MIXED",
                "diagnosis_source": "cohort_default",
                "commercial_use": code(low.get("commercial_use", ""), yes, f"{path.name} Commercial_Use"),
                "site": low.get("scan_site_id") or None,
            }
            rows.append(Row(f"sub-{subject.removeprefix('sub-')}", values))
    return rows


COHORT = Cohort("hbn", "nc", discover, phenotypes, min_match=0.9, female_share=0.36)
