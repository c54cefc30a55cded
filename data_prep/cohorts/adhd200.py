"""ADHD-200: children and adolescents of eight sites (http://fcon_1000.projects.nitrc.org/indi/adhd200), CC BY-NC."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)sub-(?P<sub>\d{7})/(?:ses-[A-Za-z0-9]+/)?anat/sub-\d{7}(?:_ses-(?P<ses>[A-Za-z0-9]+))?(?:_acq-[A-Za-z0-9]+)?"
    r"(?:_run-(?P<run>\d+))?(?P<space>_space-MNI[A-Za-z0-9]*)?(?:_res-\d+)?(?:_desc-preproc)?_T1w\.nii\.gz$"
)
_SITE = ("Peking", "Brown", "KKI", "NeuroIMAGE", "NYU", "OHSU", "Pittsburgh", "WashU")
_MISSING = ["-999", "L", "R"]
_DIAGNOSIS = {"0": "HC", "1": "ADHD", "2": "ADHD", "3": "ADHD", "pending": None, "withheld": None, "-999": None}


def discover(root: Path) -> list[Image]:
    """fMRIPrep's T1 in MNI space keeps the skull: its brain mask, beside it, is taken along. Or the raw, defaced head."""
    images = []
    for path, m in files(root, _FILE):
        mask = path.replace("_desc-preproc_T1w", "_desc-brain_mask")
        has_mask = mask != path and (root / mask).is_file()
        images.append(
            Image(
                path,
                m["sub"],
                "T1",
                m["ses"] or "1",
                int(m["run"] or 1),
                space="mni" if m["space"] else "native_defaced",
                mask=mask if has_mask else None,
            )
        )
    return images


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Tables write ids without zeros, folders with seven digits. Test labels come in a table of their own; some sites list
    those subjects twice."""
    paths = sorted(
        {p for pattern in ("*phenotypic*.csv", "*phenotypic*.tsv", "*/*phenotypic*.csv") for p in root.glob(pattern)}
    )
    if not paths:
        find_table(root, "*phenotypic*.csv", "*phenotypic*.tsv")
    rows = []
    for path in paths:
        for row in read_table(path):
            low = {name.lower().strip().replace("_", " "): value for name, value in row.items()}
            subject = low.get("scandir id") or low.get("id") or ""
            if not subject.strip().isdigit():
                raise G3nError(f"table '{path}' has no ScanDir ID in every row; found '{subject[:20]}'")
            site = low.get("site", "")
            hand = low.get("handedness", "")
            values = {
                "age_years": number(low.get("age", ""), _MISSING),
                "sex": code(low.get("gender", ""), {"0": "F", "1": "M", "-999": None}, f"{path.name} Gender"),
                "diagnosis": code(low.get("dx", ""), _DIAGNOSIS, f"{path.name} DX"),
                "diagnosis_source": "visit",
                "handedness": {"0": "L", "1": "R", "2": "A"}.get(hand),  # NYU has a score here: missing
                "site": _SITE[int(site) - 1] if site.isdigit() and 1 <= int(site) <= 8 else site or None,
            }
            rows.append(Row(subject.zfill(7), values))
    return rows


COHORT = Cohort("adhd200", "nc", discover, phenotypes, min_match=0.96, female_share=0.39)
