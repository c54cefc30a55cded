"""SchizConnect: COBRE and MCIC, schizophrenia and controls (http://schizconnect.org), data use agreement."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import Table, code, files, find_table, number, plain_id, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)(?P<sub>[A-Z][A-Z0-9]{3,})/(?:ses[-_]?(?P<ses>\w+)/)?(?P<mod>T1|T2)\.nii\.gz$"
_INDI = r"(?:^|/)(?P<sub>004\d{4})/session_(?P<ses>\d+)/anat_(?P<run>\d+)/mprage\.nii\.gz$"
_DIAGNOSIS = {
    "No_Known_Disorder": "HC",
    "Schizophrenia_Strict": "SCZ",
    "Schizophrenia_Broad": "SCZ",
    "Schizoaffective": "SZA",
    "Bipolar_Disorder": "BP",
    "Bipolar_Disorder_Strict": "BP",
    "Bipolar_Disorder_Broad": "BP",
}
_DSM = (("295.7", "SZA"), ("295.4", None), ("295", "SCZ"), *((f"296.{i}", "BP") for i in (0, 4, 5, 6, 7, 8)))
_HANDS = {"Right": "R", "Left": "L", "Both": "A"}


def discover(root: Path) -> list[Image]:
    """SchizConnect's stripped images, or the raw heads of INDI's COBRE: the same people under other ids, so never both."""
    images = [
        Image(path, m["sub"], m["mod"], session=m["ses"] or "1", space="native_stripped")
        for path, m in files(root, _FILE)
    ]
    heads = [
        Image(path, plain_id(m["sub"], path), "T1", m["ses"], int(m["run"]), space="native")
        for path, m in files(root, _INDI)
    ]
    if images and heads:
        raise G3nError(
            f"'{root}' holds COBRE of SchizConnect and of INDI, whose ids cannot be linked; scan one of them"
        )
    return images + heads


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """One row a scan in SchizConnect's table: repeated rows of a subject must agree. Schizoaffective is not schizophrenia."""
    names = ("SCHIZO_metadata*.tsv", "*[Ss]chiz[Cc]onnect*.csv", "COBRE_phenotypic_data*.csv")
    path = find_table(root, *names)
    assert path is not None
    if path.name.startswith("COBRE"):
        return _indi(read_table(path, ["Current Age", "Gender", "Subject Type", "Diagnosis"]), path.name)
    rows = []
    for row in read_table(path, ["study", "age", "sex", "dx"]):
        subject = row.get("eid") or row.get("subjectid") or row.get("Subject_ID") or ""
        if not subject:
            raise G3nError(f"table '{path}' lacks the column eid, subjectid or Subject_ID, or an id in it")
        values = {
            "age_years": number(row["age"], what=f"{path.name} age"),
            "age_precision": "year",
            "sex": code(row["sex"], {"male": "M", "female": "F"}, f"{path.name} sex"),
            "diagnosis": code(row["dx"], _DIAGNOSIS, f"{path.name} dx"),
            "diagnosis_source": "baseline",
            "diagnosis_detail": row["dx"] or None,
            "site": row["study"] or None,
        }
        rows.append(Row(subject.upper(), values))
    return rows


def _indi(table: Table, name: str) -> list[Row]:
    """COBRE as INDI gives it, with DSM-IV codes of patients; the columns of who left the study say Disenrolled."""
    rows = []
    for row in table:
        if "Disenrolled" in row.values():
            continue
        kind = code(row["Subject Type"], {"Patient": "patient", "Control": "HC"}, f"{name} Subject Type")
        values = {
            "age_years": number(row["Current Age"], what=f"{name} Current Age"),
            "age_precision": "year",
            "sex": code(row["Gender"], {"Male": "M", "Female": "F"}, f"{name} Gender"),
            "handedness": code(row.get("Handedness", ""), _HANDS, f"{name} Handedness"),
            "diagnosis": _by_dsm(row["Diagnosis"], f"{name} Diagnosis") if kind == "patient" else kind,
            "diagnosis_source": "baseline",
            "site": "COBRE",
        }
        rows.append(Row(plain_id(row.get("ID") or row.get("", ""), f"{name} ID"), values))
    return rows


def _by_dsm(text: str, what: str) -> str | None:
    """Schizophrenia (295), schizoaffective (295.7) or bipolar disorder (296.4 to .8, 296.0); other codes are no label."""
    if text.lower() in ("", "none"):
        return None
    if not re.match(r"\d{3}(\.\d{1,2})?(?![\d.])", text):
        raise G3nError(f"{what} is '{text[:40]}'; expected a code of DSM-IV such as 295.3, or None")
    return next((label for start, label in _DSM if text.startswith(start)), None)


COHORT = Cohort("schizconnect", "dua", discover, phenotypes, min_match=0.99)
