"""1000 Functional Connectomes: about 1,200 healthy adults of some 35 sites (http://fcon_1000.projects.nitrc.org)."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<site>[A-Z][A-Za-z0-9_-]+)/(?:[^/]+/)*(?:[^/]*sub-(?P<sub>\d{5})[^/]*_T1w_brain|sub-(?P<raw>\d{5})/anat/mprage_skullstripped)\.nii\.gz$"
_SEX = {"M": "M", "F": "F", "male": "M", "female": "F"}


def discover(root: Path) -> list[Image]:
    """The first folder below the root is the site: numbers of subjects are unique within a site only."""
    return [
        Image(path, m["sub"] or m["raw"], "T1", site=m["site"], space="native_stripped")
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """<Site>_participants.tsv or <Site>/participants.tsv. 9999 and -1 are missing ages, as is a range."""
    paths = sorted(
        {*root.glob("*_participants.tsv"), *root.glob("*/*_participants.tsv"), *root.glob("*/participants.tsv")}
    )
    if not paths:
        find_table(root, "*_participants.tsv")
    rows = []
    for path in paths:
        site = path.name.removesuffix("participants.tsv").rstrip("_") or path.parent.name
        for row in read_table(path, ["participant_id"]):
            age = row.get("age", "")
            values = {
                "age_years": None if "-" in age[1:] else number(age, ["9999", "-1"]),
                "sex": code(row.get("sex", ""), _SEX, f"{path.name} sex"),
                "diagnosis": "HC",
                "diagnosis_source": "cohort_default",
            }
            rows.append(Row(row["participant_id"].removeprefix("sub-").zfill(5), values, site=site))
    return rows


COHORT = Cohort("fcon1000", "open", discover, phenotypes, min_match=0.97, ids_unique_within="site")
