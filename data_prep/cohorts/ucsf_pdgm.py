"""UCSF-PDGM: 495 pre-operative diffuse gliomas, one 3 T scanner (https://doi.org/10.7937/tcia.bdgf-8v37), CC BY 4.0."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>UCSF-PDGM-\d{3,4})(?:_FU(?P<fu>\d{3})d)?(?:_nifti)?/[^/]*_(?P<mod>T1c|T1|T2|FLAIR)(?P<bias>_bias)?\.nii\.gz$"
_REPEATED = {
    "0138",
    "0175",
    "0181",
    "0278",
    "0289",
    "0315",
}  # first exams of people who are there again under another id
_MISSING = {"unknown": None, "indeterminate": None}


def discover(root: Path) -> list[Image]:
    """The bias-corrected file of a modality where there is one; of a person imaged twice the later exam alone."""
    chosen: dict[tuple[str, str, str], tuple[bool, Image]] = {}
    for path, m in files(root, _FILE):
        digits = m["sub"][-4:] if m["sub"][-4:].isdigit() else "0" + m["sub"][-3:]
        if digits in _REPEATED or m["fu"]:
            continue
        image = Image(path, _id(m["sub"]), m["mod"], space="brats", values={"field_strength_t": 3.0})
        key = (image.subject, image.session, image.modality)
        if key not in chosen or (m["bias"] and not chosen[key][0]):
            chosen[key] = (bool(m["bias"]), image)
    return [image for _, image in chosen.values()]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    path = find_table(root, "UCSF-PDGM-metadata*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["ID", "Sex", "Age at MRI", "WHO CNS Grade", "IDH"]):
        if "_FU" in row["ID"]:
            continue
        grade = number(row["WHO CNS Grade"])
        died = code(row.get("1-dead 0-alive", ""), {"1": "1", "0": "0", "unknown": None}, "1-dead 0-alive")
        idh = row["IDH"].strip().lower()
        values = {
            "age_years": number(row["Age at MRI"], ["unknown"]),
            "age_precision": "year",
            "sex": code(row["Sex"], {"M": "M", "F": "F"}, f"{path.name} Sex"),
            "diagnosis": None if grade is None else "GBM" if grade == 4 else "GLIOMA",
            "diagnosis_source": "visit",
            "diagnosis_detail": re.sub(r"[^A-Za-z0-9 /-]", "", row.get("Final pathologic diagnosis (WHO 2021)", ""))[
                :40
            ]
            or None,
            "who_grade": grade,
            "idh": None if idh in ("", "unknown") else "wildtype" if idh == "wildtype" else "mutant",
            "mgmt": code(
                row.get("MGMT status", ""),
                {"positive": "methylated", "negative": "unmethylated", **_MISSING},
                f"{path.name} MGMT status",
            ),
            "mgmt_index": number(row.get("MGMT index", ""), ["unknown"]),
            "codel_1p19q": code(
                row.get("1p/19q", ""),
                {"intact": "intact", "co-deletion": "codeleted", "relative co-deletion": None, **_MISSING},
                f"{path.name} 1p/19q",
            ),
            "os_days": number(row.get("OS", ""), ["unknown"]),
            "os_event": None if died is None else float(died),
            "resection": code(
                row.get("EOR", ""), {"GTR": "GTR", "STR": "STR", "biopsy": "biopsy", **_MISSING}, f"{path.name} EOR"
            ),
        }
        rows.append(Row(_id(row["ID"]), values))
    return rows


def _id(text: str) -> str:
    """Four digits: the table has three, the folders four."""
    return f"UCSF-PDGM-{int(text.rsplit('-', 1)[1]):04d}"


COHORT = Cohort("ucsf_pdgm", "open", discover, phenotypes, min_match=0.98, female_share=202 / 501)
