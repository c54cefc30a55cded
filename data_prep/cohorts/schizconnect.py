"""SchizConnect: COBRE and MCIC, schizophrenia and controls (http://schizconnect.org), data use agreement."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>[A-Z][A-Z0-9]{3,})/(?:(?P<ses>ses[-_]?\w+)/)?(?P<mod>T1|T2)\.nii\.gz$"
_DIAGNOSIS = {
    "No_Known_Disorder": "HC",
    "Schizophrenia_Strict": "SCZ",
    "Schizophrenia_Broad": "SCZ",
    "Schizoaffective": "SZA",
    "Bipolar_Disorder": "BP",
    "Bipolar_Disorder_Strict": "BP",
    "Bipolar_Disorder_Broad": "BP",
}


def discover(root: Path) -> list[Image]:
    return [
        Image(path, m["sub"], m["mod"], session=m["ses"] or "1", space="native_stripped")
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """One row a scan in the table: repeated rows of a subject must agree. Schizoaffective is not schizophrenia."""
    path = find_table(root, "SCHIZO_metadata*.tsv", "*[Ss]chiz[Cc]onnect*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["eid", "study", "age", "sex", "dx"]):
        values = {
            "age_years": number(row["age"]),
            "age_precision": "year",
            "sex": code(row["sex"], {"male": "M", "female": "F"}, f"{path.name} sex"),
            "diagnosis": code(row["dx"], _DIAGNOSIS, f"{path.name} dx"),
            "diagnosis_source": "baseline",
            "diagnosis_detail": row["dx"] or None,
            "site": row["study"] or None,
        }
        rows.append(Row(row["eid"].upper(), values))
    return rows


COHORT = Cohort("schizconnect", "dua", discover, phenotypes, min_match=0.98)
