"""ABIDE II: autism and controls of 19 samples (http://fcon_1000.projects.nitrc.org/indi/abide/abide_II.html), CC BY-NC-SA 3.0."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = (
    r"(?:^|/)ABIDEII-(?P<site>[A-Za-z0-9_]+)/sub-(?P<sub>\d{5})/(?:ses-[A-Za-z0-9]+/)?anat/sub-\d{5}(?:_ses-(?P<ses>[A-Za-z0-9]+))?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?_(?P<mod>T1w|FLAIR)\.nii\.gz$"
)
_MISSING = ["-9999"]


def discover(root: Path) -> list[Image]:
    return [
        Image(
            path,
            m["sub"],
            "T1" if m["mod"] == "T1w" else "FLAIR",
            m["ses"] or "1",
            int(m["run"] or 1),
            m["acq"] or "",
            site=m["site"],
            space="native_defaced",
        )
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """The composite table holds baselines; the longitudinal one names visits. Handedness is a number, unlike in ABIDE I."""
    paths = [find_table(root, "ABIDEII_Composite_Phenotypic*.csv")]
    paths.append(find_table(root, "ABIDEII_Long_Composite_Phenotypic*.csv", needed=False))
    rows = []
    for path in paths:
        if path is None:
            continue
        for row in read_table(path, ["SUB_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX"]):
            at_mprage = number(row.get("AGE_AT_MPRAGE", ""), _MISSING)
            fixed = {
                "sex": code(row["SEX"], {"1": "M", "2": "F", "-9999": None}, f"{path.name} SEX"),
                "diagnosis": code(row["DX_GROUP"], {"1": "ASD", "2": "HC"}, f"{path.name} DX_GROUP"),
                "diagnosis_source": "visit",
                "handedness": code(
                    row.get("HANDEDNESS_CATEGORY", ""),
                    {"1": "R", "2": "L", "3": "A", "-9999": None},
                    f"{path.name} HANDEDNESS_CATEGORY",
                ),
            }
            subject = str(int(float(row["SUB_ID"])))
            age = at_mprage if at_mprage is not None else number(row["AGE_AT_SCAN"], _MISSING)
            rows.append(Row(subject, {"age_years": age}, session=_session(row.get("SESSION", ""))))
            rows.append(Row(subject, fixed))
    return rows


def _session(text: str) -> str:
    """'Baseline' and no session are ses-1, 'Followup_1' is ses-2."""
    digits = "".join(c for c in text if c.isdigit())
    return str(int(digits) + 1) if "follow" in text.lower() and digits else digits or "1"


COHORT = Cohort("abide2", "nc", discover, phenotypes, min_match=0.92, female_share=0.22)
