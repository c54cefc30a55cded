"""OASIS-2: longitudinal T1 of 150 people from 60 to 96 years (https://sites.wustl.edu/oasisbrains), data use terms."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Plan, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>OAS2_\d{4})_MR(?P<ses>\d+)/RAW/mpr-1(?!\d)[^/]*\.(?:hdr|nii|nii\.gz)$"
_GROUP = {"Nondemented": "HC", "Demented": "AD", "Converted": "MCI"}
_BY_CDR = {"0": "HC", "0.5": "MCI", "1": "AD", "2": "AD", "3": "AD"}


def discover(root: Path) -> list[Image]:
    """The first acquisition of each session."""
    return [
        Image(path, m["sub"], "T1", m["ses"], space="oasis2_raw", values={"field_strength_t": 1.5})
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Diagnosis at the visit by its CDR (0 HC, 0.5 MCI, 1 and more AD); paper mode takes the group for all visits."""
    path = find_table(root, "oasis_longitudinal*.csv", "oasis_longitudinal*.xlsx")
    assert path is not None
    rows = []
    for row in read_table(
        path, ["Subject ID", "MRI ID", "Group", "MR Delay", "M/F", "Hand", "Age", "EDUC", "MMSE", "CDR"]
    ):
        group = code(row["Group"], _GROUP, f"{path.name} Group")
        by_cdr = code(row["CDR"], _BY_CDR, f"{path.name} CDR")
        values = {
            "age_years": number(row["Age"], what=f"{path.name} Age"),
            "age_precision": "year",
            "sex": code(row["M/F"], {"M": "M", "F": "F"}, f"{path.name} M/F"),
            "handedness": code(row["Hand"], {"R": "R", "L": "L"}, f"{path.name} Hand"),
            "diagnosis": group if harmonise == "paper" else by_cdr,
            "diagnosis_source": "baseline" if harmonise == "paper" else "visit",
            "diagnosis_detail": row["Group"] or None,
            "cdr_global": number(row["CDR"]),
            "mmse": number(row["MMSE"], what=f"{path.name} MMSE"),
            "education_years": number(row["EDUC"], what=f"{path.name} EDUC"),
            "days_from_baseline": number(row["MR Delay"], what=f"{path.name} MR Delay"),
        }
        rows.append(Row(row["Subject ID"], values, session=row["MRI ID"].rpartition("_MR")[2]))
    return rows


def plan(image: Image) -> Plan:
    """Axes are AP, SI, LR at 1 x 1 x 1.25 mm under an identity header. Left and right cannot be told: look at the pictures."""
    return Plan("oasis2_raw", axes=(2, 0, 1), spacing_mm=(1.25, 1, 1))


COHORT = Cohort("oasis2", "dua", discover, phenotypes, plan, min_match=0.99)
