"""HCP Young Adult S1200: healthy twins and siblings (https://www.humanconnectome.org/study/hcp-young-adult), data use terms."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)(?P<sub>\d{6})/T1w/(?P<mod>T1w|T2w)_acpc_dc_restore_brain\.nii\.gz$"
_BINS = {"22-25": 23.5, "26-30": 28.0, "31-35": 33.0, "36+": 37.0}


def discover(root: Path) -> list[Image]:
    return [
        Image(path, m["sub"], m["mod"][:2], space="native_stripped", values={"field_strength_t": 3.0})
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Public ages are bins of five years: their middle, marked bin5, in paper mode as if exact. Restricted tables add family,
    handedness, years of school and (clean mode) the age in years."""
    path = find_table(root, "unrestricted_*.csv", "HCP_YA_subjects_*.csv", "HCP_S1200*.csv")
    assert path is not None
    more = _restricted(root, harmonise)
    rows = []
    for row in read_table(path, ["Subject", "Gender", "Age"]):
        if row["Age"] not in (*_BINS, ""):
            raise G3nError(f"{path.name} Age is '{row['Age'][:20]}'; known: {', '.join(_BINS)}")
        values = {
            "age_years": _BINS.get(row["Age"]),
            "age_precision": "exact" if harmonise == "paper" else "bin5",
            "sex": code(row["Gender"], {"M": "M", "F": "F"}, f"{path.name} Gender"),
            "mmse": number(row.get("MMSE_Score", ""), what=f"{path.name} MMSE_Score"),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
            "diagnosis_detail": _anomaly(row.get("QC_Issue", ""), path.name),
        }
        rows.append(Row(row["Subject"], {**values, **more.get(row["Subject"], {})}))
    return rows


def _anomaly(issues: str, table: str) -> str | None:
    """QC_Issue lists letters: A is a focal anomaly of the brain, B to E are of the acquisition."""
    letters = set() if issues.lower() in ("nan", "na", "n/a", "none") else set(re.findall("[A-Z]", issues.upper()))
    if letters - set("ABCDE"):
        raise G3nError(f"{table} QC_Issue is '{issues[:20]}'; known: letters A to E. Look it up")
    return "focal anomaly" if "A" in letters else None


def _restricted(root: Path, harmonise: Harmonise) -> dict[str, dict[str, str | float | None]]:
    """Family, handedness (-100 to 100), years of school and age, for those who may use them."""
    path = find_table(root, "RESTRICTED_*.csv", "restricted_*.csv", needed=False)
    found: dict[str, dict[str, str | float | None]] = {}
    if path is None:
        return found
    for row in read_table(path, ["Subject", "Family_ID"]):
        age, hand, school = (
            number(row.get(name, ""), what=f"{path.name} {name}") for name in ("Age_in_Yrs", "Handedness", "SSAGA_Educ")
        )
        values: dict[str, str | float | None] = {
            "family": row["Family_ID"] or row.get("Mother_ID") or None,
            "education_years": school,
        }
        if age is not None and harmonise == "clean":
            values |= {"age_years": age, "age_precision": "year"}
        if hand is not None:
            values["handedness"] = "R" if hand > 40 else "L" if hand < -40 else "A"
        found[row["Subject"]] = values
    return found


COHORT = Cohort("hcp_ya", "dua", discover, phenotypes, min_match=0.99, female_share=0.54, has_relatives=True)
