"""HCP Young Adult S1200: healthy twins and siblings (https://www.humanconnectome.org/study/hcp-young-adult), data use terms."""

from __future__ import annotations

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
    """Public ages are bins of five years (their middle, marked bin5; exact in paper mode); restricted tables add age and family."""
    path = find_table(root, "unrestricted_*.csv", "HCP_YA_subjects_*.csv", "HCP_S1200*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["Subject", "Gender", "Age"]):
        if row["Age"] not in (*_BINS, ""):
            raise G3nError(f"{path.name} Age is '{row['Age'][:20]}'; known: {', '.join(_BINS)}")
        values = {
            "age_years": _BINS.get(row["Age"]),
            "age_precision": "exact" if harmonise == "paper" else "bin5",
            "sex": code(row["Gender"], {"M": "M", "F": "F"}, f"{path.name} Gender"),
            "mmse": number(row.get("MMSE_Score", "")),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
        }
        rows.append((row["Subject"], values))
    more = _restricted(root)
    merged = [Row(subject, {**values, **more.get(subject, {})}) for subject, values in rows]
    return merged


def _restricted(root: Path) -> dict[str, dict[str, str | float | None]]:
    """Exact age, family and handedness (-100 to 100), for those who may use them."""
    path = find_table(root, "RESTRICTED_*.csv", "restricted_*.csv", needed=False)
    found: dict[str, dict[str, str | float | None]] = {}
    for row in [] if path is None else read_table(path, ["Subject"]):
        values: dict[str, str | float | None] = {"family": row.get("Family_ID") or row.get("Mother_ID") or None}
        age, hand = number(row.get("Age_in_Yrs", "")), number(row.get("Handedness", ""))
        if age is not None:
            values |= {"age_years": age, "age_precision": "year"}
        if hand is not None:
            values["handedness"] = "R" if hand > 40 else "L" if hand < -40 else "A"
        values["education_years"] = number(row.get("SSAGA_Educ", ""))
        found[row["Subject"]] = values
    return found


COHORT = Cohort("hcp_ya", "dua", discover, phenotypes, min_match=0.99, female_share=0.54)
