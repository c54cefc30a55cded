"""ABIDE II: autism and controls of 19 samples (http://fcon_1000.projects.nitrc.org/indi/abide/abide_II.html), CC BY-NC-SA 3.0."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version
from data_prep.cohorts.tables import code, files, find_table, number, plain_id, read_table
from g3n.config import G3nError

_BIDS = (
    r"(?:^|/)(?:ABIDEII-(?P<site>[A-Za-z0-9_]+)/)?sub-(?P<sub>\d{5})/(?:ses-[A-Za-z0-9]+/)?anat/sub-\d{5}"
    r"(?:_ses-(?P<ses>[A-Za-z0-9]+))?(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?_(?P<mod>T1w|FLAIR)\.nii\.gz$"
)
_NITRC = (
    r"(?:^|/)(?:ABIDEII-)?(?P<site>[A-Za-z][A-Za-z0-9_]*)_(?P<sub>\d{5})_(?P<ses>\d+)/(?:[^/]+/)*"
    r"(?P<mod>anat|flair)_(?P<run>\d+)/NIfTI(?:-\d+)?/(?:anat|flair)\.nii\.gz$"
)
_MISSING = ["-9999"]
_HANDS = {"1": "R", "2": "L", "3": "A", "-9999": None}  # numbers, unlike in ABIDE I


def discover(root: Path) -> list[Image]:
    """RawData's BIDS or NITRC's folders, of every session and run. ``person`` is one with ABIDE I."""
    ranked = []
    for rank, pattern in enumerate((_BIDS, _NITRC)):
        for path, m in files(root, pattern):
            image = Image(
                path,
                m["sub"],
                "FLAIR" if m["mod"].lower() == "flair" else "T1",
                m["ses"] or "1",
                int(m["run"] or 1),
                m.groupdict().get("acq") or "",
                site=m["site"],
                space="native_defaced",
                person=f"abide:{m['sub']}",
            )
            ranked.append((rank, image))
    return one_version(ranked)


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """The composite table holds baselines; the longitudinal one has a row a session."""
    rows = []
    for pattern, is_long in (("ABIDEII_Composite_Phenotypic*.csv", False), ("ABIDEII_Long_Composite*.csv", True)):
        path = find_table(root, pattern, needed=not is_long)
        if path is None:
            continue
        needed = ["SUB_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX", *(["SESSION"] if is_long else [])]
        for row in read_table(path, needed):
            subject = plain_id(row["SUB_ID"], f"{path.name} SUB_ID")
            hand = row.get("HANDEDNESS_CATEGORY", "")
            always = {
                "sex": code(row["SEX"], {"1": "M", "2": "F", "-9999": None}, f"{path.name} SEX"),
                "diagnosis": code(row["DX_GROUP"], {"1": "ASD", "2": "HC"}, f"{path.name} DX_GROUP"),
                "diagnosis_source": "visit",
                "handedness": code(hand, _HANDS, f"{path.name} HANDEDNESS_CATEGORY"),
            }
            age = number(row.get("AGE_AT_MPRAGE", ""), _MISSING, f"{path.name} AGE_AT_MPRAGE")
            if age is None:  # the T1 was made on the day of the other scans
                age = number(row["AGE_AT_SCAN"], _MISSING, f"{path.name} AGE_AT_SCAN")
            now = {"age_years": age, "site": row.get("SITE_ID", "").removeprefix("ABIDEII-") or None}
            rows.append(Row(subject, now, session=_session(row["SESSION"], path.name) if is_long else "1"))
            rows.append(Row(subject, always))
    return rows


def _session(text: str, table: str) -> str:
    """Baseline is ses-1, Followup_1 is ses-2."""
    match = re.fullmatch(r"baseline|follow[-_ ]?up[-_ ]?(\d+)", text, re.IGNORECASE)
    if match is None:
        raise G3nError(f"{table} SESSION is '{text[:20]}'; expected Baseline or Followup_<n>")
    return str(int(match[1]) + 1) if match[1] else "1"


COHORT = Cohort("abide2", "nc", discover, phenotypes, min_match=0.92, female_share=0.22)
