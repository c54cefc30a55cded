"""OASIS-1: cross-sectional T1 from 18 to 96 years (https://sites.wustl.edu/oasisbrains), data use terms."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Plan, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>OAS1_\d{4})_MR(?P<ses>\d)/(?:[^/]+/)*OAS1_\d{4}_MR\d_mpr_n\d+_anon_111_t88_gfc\.(?:hdr|nii|nii\.gz)$"
_BY_CDR = {"0": "HC", "0.5": "MCI", "1": "AD", "2": "AD", "3": "AD"}


def discover(root: Path) -> list[Image]:
    """The bias-corrected Talairach volume with head (not the ``masked`` one); its number of averages varies."""
    return [
        Image(path, m["sub"], "T1", m["ses"], space="t88", values={"field_strength_t": 1.5})
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """CDR 0 is HC, 0.5 MCI, 1 and more AD. The young have no CDR: HC as the cohort's default, without a cdr_global.

    Educ is an ordinal code here (years in OASIS-2): left out. paper mode calls the unrated HC like the rated and takes the
    code for years. Delay is that of the repeated scan (MR2) since the first.
    """
    path = find_table(root, "oasis_cross-sectional*.csv", "oasis_cross-sectional*.xlsx")
    assert path is not None
    rows = []
    for row in read_table(path, ["ID", "M/F", "Hand", "Age", "Educ", "MMSE", "CDR", "Delay"]):
        subject, _, session = row["ID"].rpartition("_MR")
        diagnosis = code(row["CDR"], _BY_CDR, f"{path.name} CDR")
        values = {
            "age_years": number(row["Age"], what=f"{path.name} Age"),
            "age_precision": "year",
            "sex": code(row["M/F"], {"M": "M", "F": "F"}, f"{path.name} M/F"),
            "handedness": code(row["Hand"], {"R": "R", "L": "L"}, f"{path.name} Hand"),
            "diagnosis": diagnosis or "HC",
            "diagnosis_source": "visit" if diagnosis or harmonise == "paper" else "cohort_default",
            "cdr_global": number(row["CDR"]),
            "mmse": number(row["MMSE"], what=f"{path.name} MMSE"),
            "days_from_baseline": 0.0 if session == "1" else number(row["Delay"], what=f"{path.name} Delay"),
        }
        if harmonise == "paper":
            values["education_years"] = number(row["Educ"], what=f"{path.name} Educ")
        rows.append(Row(subject, values, session=session))
    return rows


def plan(image: Image) -> Plan:
    """Analyze without orientation: the voxel grid is kept, the atlas's axes are imposed."""
    return Plan("t88", axes=(0, 1, 2), spacing_mm=(1, 1, 1))


COHORT = Cohort("oasis1", "dua", discover, phenotypes, plan, min_match=0.99)
