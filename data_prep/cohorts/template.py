"""Template of a cohort: copy it to <name>.py, change it, add the name to NAMES (docs/adding_a_cohort.md). License, URL."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row, plan_by_space
from data_prep.cohorts.tables import code, day, files, find_table, number, read_table

# Named groups of a path below the root; FLAIR before T2, T1c before T1.
_FILE = r"(?:^|/)NL(?P<sub>\d{4})/(?P<date>\d{8})/(?P<mod>T1c|T1|FLAIR|T2)\.nii\.gz$"
_SEX = {"1": "M", "2": "F"}  # as its data dictionary says; a code that is not here stops the scan
_DIAGNOSIS = {"0": "HC", "1": "MCI", "2": "AD", "9": None}  # None: known to mean missing


def discover(root: Path) -> list[Image]:
    """Every image, known by its path alone: nothing is opened."""
    images = []
    for path, m in files(root, _FILE):
        date = day(m["date"])
        images.append(Image(path, m["sub"], m["mod"], session=m["date"], date=date, space="native_defaced"))
    return images


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Sex at every scan; age, diagnosis and MMSE at the visit nearest to the scan, within 180 days."""
    path = find_table(root, "northlake_visits*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["id", "visit_date", "sex", "age", "dx", "mmse"]):
        subject = row["id"].zfill(4)  # '12' in the table, NL0012 on disk
        rows.append(Row(subject, {"sex": code(row["sex"], _SEX, f"{path.name} sex")}))
        visit = {
            "age_years": number(row["age"], ["-99"], f"{path.name} age"),
            "diagnosis": code(row["dx"], _DIAGNOSIS, f"{path.name} dx"),
            "diagnosis_source": "visit",
            "mmse": number(row["mmse"], ["-99"], f"{path.name} mmse"),
        }
        rows.append(Row(subject, visit, date=day(row["visit_date"])))
    return rows


COHORT = Cohort("template", "dua", discover, phenotypes, plan_by_space, min_match=0.95, female_share=0.55)
