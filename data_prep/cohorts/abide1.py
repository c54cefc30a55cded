"""ABIDE I: autism and controls of 17 institutions (http://fcon_1000.projects.nitrc.org/indi/abide), CC BY-NC-SA 3.0."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?:(?P<site>[A-Z][A-Za-z0-9_]+)/)?sub-(?P<sub>00\d{5})/(?:ses-\w+/)?anat/sub-00\d{5}(?:_ses-(?P<ses>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?_T1w\.nii\.gz$"
_MISSING = ["-9999"]
_DETAIL = {"0": None, "1": "autism", "2": "Asperger", "3": "PDD-NOS", "4": "Asperger or PDD-NOS", "-9999": None}


def discover(root: Path) -> list[Image]:
    return [
        Image(
            path,
            m["sub"].lstrip("0"),
            "T1",
            m["ses"] or "1",
            int(m["run"] or 1),
            site=m["site"],
            space="native_defaced",
        )
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """DX_GROUP decides: 20 autistic subjects carry DSM_IV_TR 0."""
    path = find_table(root, "Phenotypic_V1_0b*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["SUB_ID", "SITE_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX"]):
        hands = {"R": "R", "L": "L", "Ambi": "A", "Mixed": "A", "L->R": "A", "-9999": None}
        values = {
            "age_years": number(row["AGE_AT_SCAN"], _MISSING),
            "sex": code(row["SEX"], {"1": "M", "2": "F", "-9999": None}, f"{path.name} SEX"),
            "diagnosis": code(row["DX_GROUP"], {"1": "ASD", "2": "HC"}, f"{path.name} DX_GROUP"),
            "diagnosis_source": "visit",
            "diagnosis_detail": code(row.get("DSM_IV_TR", ""), _DETAIL, f"{path.name} DSM_IV_TR"),
            "handedness": code(row.get("HANDEDNESS_CATEGORY", ""), hands, f"{path.name} HANDEDNESS_CATEGORY"),
            "site": row["SITE_ID"] or None,
        }
        rows.append(Row(str(int(float(row["SUB_ID"]))), values))
    return rows


COHORT = Cohort("abide1", "nc", discover, phenotypes, min_match=0.99, female_share=0.15)
