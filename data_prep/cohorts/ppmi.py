"""PPMI: Parkinson disease, controls, prodromal and SWEDD (https://www.ppmi-info.org), data use agreement."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.scores import GDS_ITEMS, SCOPA_ITEMS, autonomic, autonomic_as_published, depression
from data_prep.cohorts.tables import Table, code, day, e4_count, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)(?P<sub>\d{4,6})/(?:\d+/)?(?P<desc>[^/]+)/(?P<date>\d{4}-\d{2}-\d{2})_[^/]+/(?P<img>I\d+)/(?!.*_Eq_)[^/]+\.(?:nii|nii\.gz)$"
_KEEP = ("T1", "MPRAGE", "FSPGR", "SPGR", "BRAVO", "FFE", "TFE", "T2", "FLAIR")
_DROP = (
    "FMRI", "BOLD", "REST", "DTI", "DWI", "ASL", "LOC", "FIELD", "B0", "B1", "GRE-MT", "GRE_MT", "GRE_-_MT", "NM", "CALIBRATION",
    "SCOUT", "SETTER", "SCREEN", "PLANE", "T2*", "T2STAR", "T2_STAR", "T2-STAR",
)  # fmt: skip
_COHORT = {
    "Parkinson's Disease": "PD", "Early Imaging": "PD", "Healthy Control": "HC", "Prodromal": "PRODROMAL", "SWEDD": "SWEDD",
}  # fmt: skip
_VISIT = ("EVENT_ID", "INFODT")
_UNABLE = ("101", "101.0")  # to rate
# The page of a motor examination tells its state where PDSTATE does not; NUPDRDOSE3 is of treated people, on or off.
_PAGE = {"NUPDRS3": "UNTREATED", "NUPDR3OF": "OFF", "NUPDR3ON": "ON", "NUPDRDOSE3": None}
_BEST_STATE = ("OFF", "UNTREATED", "ON", None)


def discover(root: Path) -> list[Image]:
    """Converted series (dcm2niix) whose description is a structural one; acq keeps two series of one day apart."""
    images = []
    for path, m in files(root, _FILE):
        desc = m["desc"].upper()
        if not any(word in desc for word in _KEEP) or any(word in desc for word in _DROP):
            continue
        modality = "FLAIR" if "FLAIR" in desc else "T2" if any(w in desc for w in ("T2", "TSE", "FSE")) else "T1"
        date = day(m["date"])
        images.append(Image(path, m["sub"], modality, m["date"].replace("-", ""), acq=m["img"], date=date))
    return images


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Age from the month of birth, scores from the nearest visit.

    paper mode takes the age at enrollment, scores of the baseline, a SCOPA-AUT of all items and a site that is none.
    """
    paper = harmonise == "paper"
    rows = []
    for row in _table(root, "Participant_Status*.csv", "COHORT_DEFINITION", "ENROLL_AGE"):
        values: dict[str, Any] = {
            "diagnosis": code(row["COHORT_DEFINITION"], _COHORT, "Participant_Status COHORT_DEFINITION"),
            "diagnosis_source": "baseline",
        }
        if paper:
            age = number(row["ENROLL_AGE"], (), "Participant_Status ENROLL_AGE")
            values |= {"age_years": age, "age_precision": "exact", "site": row["PATNO"][:2]}
        rows.append(Row(row["PATNO"], values))
    for row in _table(root, "Demographics*.csv", "SEX", "BIRTHDT"):
        values = {
            "sex": code(row["SEX"], {"0": "F", "1": "M"}, "Demographics SEX"),
            "handedness": code(row.get("HANDED", ""), {"1": "R", "2": "L", "3": "A"}, "Demographics HANDED"),
        }
        if not paper:
            values |= {"birth_date": _month(row["BIRTHDT"], "Demographics BIRTHDT"), "age_precision": "month"}
        rows.append(Row(row["PATNO"], values))
    for row in _table(root, "Socio-Economics*.csv", "EDUCYRS"):
        rows.append(Row(row["PATNO"], {"education_years": number(row["EDUCYRS"], (), "Socio-Economics EDUCYRS")}))
    for row in _table(root, "iu_genetic_consensus*.csv", "APOE"):
        rows.append(Row(row["PATNO"], {"apoe_e4_count": e4_count(row["APOE"], "iu_genetic_consensus APOE")}))
    moca = _table(root, "Montreal_Cognitive_Assessment*.csv", *_VISIT, "MCATOT")
    rows += _visits(moca, {"moca": lambda r: number(r["MCATOT"], (), "MoCA MCATOT")}, paper)
    rows += _visits(_table(root, "Geriatric_Depression_Scale*.csv", *_VISIT, *GDS_ITEMS), {"gds15": depression}, paper)
    scopa = autonomic_as_published if paper else autonomic
    rows += _visits(_table(root, "SCOPA-AUT*.csv", *_VISIT, *SCOPA_ITEMS), {"scopa_aut": scopa}, paper)
    motor = _table(root, "MDS-UPDRS_Part_III*.csv", *_VISIT, "NP3TOT", "PDSTATE", "PAG_NAME")
    motor = [row for row in motor if _motor(row) is not None]
    return rows + _visits(
        motor if paper else _best_of_day(motor), {"mds_updrs_iii": _motor, "updrs_state": _state}, paper
    )


def _table(root: Path, pattern: str, *columns: str) -> Table:
    path = find_table(root, pattern, needed=pattern.startswith(("Participant_Status", "Demographics")))
    return read_table(path, ["PATNO", *columns]) if path else []


def _visits(table: Table, values: Mapping[str, Callable[[dict[str, str]], Any]], paper: bool) -> list[Row]:
    """A row a visit with a score; in paper mode that of EVENT_ID BL, else of the earliest visit, for every scan."""
    visits = [(row, {name: value(row) for name, value in values.items()}) for row in table]
    visits = [(row, found) for row, found in visits if any(v is not None for v in found.values())]
    if not paper:
        dated = [(row, found, _month(row["INFODT"], "INFODT of a visit")) for row, found in visits]
        return [Row(row["PATNO"], found, f"visit {row['EVENT_ID']}", date) for row, found, date in dated if date]
    first: dict[str, datetime.date] = {}
    for row, _ in visits:
        first[row["PATNO"]] = min(first.get(row["PATNO"], datetime.date.max), _when(row))
    return [Row(row["PATNO"], found) for row, found in visits if _when(row) == first[row["PATNO"]]]


def _when(row: Mapping[str, str]) -> datetime.date:
    """For the order of visits: baseline before all."""
    return (
        datetime.date.min
        if row["EVENT_ID"] == "BL"
        else _month(row["INFODT"], "INFODT of a visit") or datetime.date.max
    )


def _month(text: str, what: str) -> datetime.date | None:
    """Dates are rounded to months. One that is not understood would take an age or a visit away in silence."""
    date = day(text)
    if text and date is None:
        raise G3nError(f"{what} is '{text[:20]}', which is not a month like 09/1950; correct the table")
    return date


def _best_of_day(table: Sequence[dict[str, str]]) -> Table:
    """Of the motor examinations of one day those off medication, else untreated, else on."""
    best: dict[tuple[str, str], int] = {}
    for row in table:
        key, rank = (row["PATNO"], row["INFODT"]), _BEST_STATE.index(_state(row))
        best[key] = min(best.get(key, rank), rank)
    return [row for row in table if _BEST_STATE.index(_state(row)) == best[row["PATNO"], row["INFODT"]]]


def _motor(row: Mapping[str, str]) -> float | None:
    """MDS-UPDRS III; None where an item could not be rated, for it counts 101."""
    unable = any(value in _UNABLE for name, value in row.items() if name.startswith("NP3"))
    return None if unable else number(row["NP3TOT"], (), "MDS-UPDRS_Part_III NP3TOT")


def _state(row: Mapping[str, str]) -> str | None:
    told = code(row["PDSTATE"], {"OFF": "OFF", "ON": "ON"}, "MDS-UPDRS_Part_III PDSTATE")
    return told or code(row["PAG_NAME"], _PAGE, "MDS-UPDRS_Part_III PAG_NAME")


COHORT = Cohort("ppmi", "dua", discover, phenotypes, min_match=0.99)
