"""ABIDE I: autism and controls of 17 institutions (http://fcon_1000.projects.nitrc.org/indi/abide), CC BY-NC-SA 3.0."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version
from data_prep.cohorts.tables import code, files, find_table, number, plain_id, read_table

_BIDS = (
    r"(?:^|/)(?:(?P<site>[A-Z][A-Za-z0-9_]+)/)?sub-(?P<sub>00\d{5})/(?:ses-\w+/)?anat/sub-00\d{5}"
    r"(?:_ses-(?P<ses>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?_T1w\.nii\.gz$"
)
_NITRC = r"(?:^|/)(?P<site>[A-Za-z][A-Za-z0-9_]*)_(?P<sub>00\d{5})/(?:[^/]+/)*anat/(?:[^/]+/)*mprage\.nii\.gz$"
_MISSING = ["-9999"]
_DETAIL = {"0": None, "1": "autism", "2": "Asperger", "3": "PDD-NOS", "4": "Asperger or PDD-NOS", "-9999": None}
_HANDS = {"R": "R", "L": "L", "Ambi": "A", "Mixed": "A", "L->R": "A", "-9999": None}


def discover(root: Path) -> list[Image]:
    """RawDataBIDS or NITRC's folders. ``person`` is one with ABIDE II, whose longitudinal sites go on with these ids."""
    ranked = []
    for rank, pattern in enumerate((_BIDS, _NITRC)):
        for path, m in files(root, pattern):
            found = m.groupdict()
            subject = plain_id(m["sub"], path)
            session, run = found.get("ses") or "1", int(found.get("run") or 1)
            person = f"abide:{subject}"
            image = Image(path, subject, "T1", session, run, site=m["site"], space="native_defaced", person=person)
            ranked.append((rank, image))
    return one_version(ranked)


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """DX_GROUP decides: 20 autistic subjects carry DSM_IV_TR 0."""
    path = find_table(root, "Phenotypic_V1_0b*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["SUB_ID", "SITE_ID", "DX_GROUP", "AGE_AT_SCAN", "SEX"]):
        values = {
            "age_years": number(row["AGE_AT_SCAN"], _MISSING, f"{path.name} AGE_AT_SCAN"),
            "sex": code(row["SEX"], {"1": "M", "2": "F", "-9999": None}, f"{path.name} SEX"),
            "diagnosis": code(row["DX_GROUP"], {"1": "ASD", "2": "HC"}, f"{path.name} DX_GROUP"),
            "diagnosis_source": "visit",
            "diagnosis_detail": code(row.get("DSM_IV_TR", ""), _DETAIL, f"{path.name} DSM_IV_TR"),
            "handedness": code(row.get("HANDEDNESS_CATEGORY", ""), _HANDS, f"{path.name} HANDEDNESS_CATEGORY"),
            "site": row["SITE_ID"] or None,
        }
        rows.append(Row(plain_id(row["SUB_ID"], f"{path.name} SUB_ID"), values))
    return rows


COHORT = Cohort("abide1", "nc", discover, phenotypes, min_match=0.99, female_share=0.15)
