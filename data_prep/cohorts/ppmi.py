"""PPMI: Parkinson disease, controls, prodromal and SWEDD (https://www.ppmi-info.org), data use agreement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import Table, code, day, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>\d{4,6})/(?:\d+/)?(?P<desc>[^/]+)/(?P<date>\d{4}-\d{2}-\d{2})_[^/]+/(?P<img>I\d+)/(?!.*_Eq_)[^/]+\.(?:nii|nii\.gz)$"
_KEEP = ("T1", "MPRAGE", "FSPGR", "SPGR", "BRAVO", "FFE", "TFE", "T2", "FLAIR")
_DROP = (
    "FMRI", "BOLD", "REST", "DTI", "DWI", "ASL", "LOC", "FIELD", "B0", "B1", "GRE-MT", "GRE_MT", "NM", "CALIBRATION", "SCOUT",
    "SETTER", "SCREEN", "PLANE",
)  # fmt: skip
_COHORT = {
    "Parkinson's Disease": "PD", "Early Imaging": "PD", "Healthy Control": "HC", "Prodromal": "PRODROMAL", "SWEDD": "SWEDD",
}  # fmt: skip
_UNABLE = ["101"]
_GDS_REVERSED = ("GDSSATIS", "GDSGSPIR", "GDSHAPPY", "GDSALIVE", "GDSENRGY")


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
    """Age from the month of birth, scores from the nearest visit; paper mode takes enrolment age and baseline scores."""
    rows = []
    for row in _table(root, "Participant_Status*.csv"):
        values: dict[str, Any] = {
            "diagnosis": code(row["COHORT_DEFINITION"], _COHORT, "Participant_Status COHORT_DEFINITION"),
            "diagnosis_source": "baseline",
        }
        if harmonise == "paper":
            values |= {"age_years": number(row.get("ENROLL_AGE", "")), "age_precision": "exact"}
        rows.append(Row(row["PATNO"], values))
    for row in _table(root, "Demographics*.csv"):
        values = {
            "sex": code(row["SEX"], {"0": "F", "1": "M"}, "Demographics SEX"),
            "handedness": code(row.get("HANDED", ""), {"1": "R", "2": "L", "3": "A"}, "Demographics HANDED"),
        }
        if harmonise == "clean":
            values |= {"birth_date": day(row.get("BIRTHDT", "")), "age_precision": "month"}
        rows.append(Row(row["PATNO"], values))
    for row in _table(root, "Socio-Economics*.csv"):
        rows.append(Row(row["PATNO"], {"education_years": number(row.get("EDUCYRS", ""))}))
    for row in _table(root, "iu_genetic_consensus*.csv"):
        if row.get("APOE", ""):
            rows.append(Row(row["PATNO"], {"apoe_e4_count": float(row["APOE"].upper().count("E4"))}))
    rows += _scored(
        root, "Montreal_Cognitive_Assessment*.csv", lambda r: {"moca": number(r.get("MCATOT", ""))}, harmonise
    )
    rows += _scored(root, "Geriatric_Depression_Scale*.csv", lambda r: {"gds15": depression(r)}, harmonise)
    rows += _scored(root, "SCOPA-AUT*.csv", lambda r: {"scopa_aut": autonomic(r)}, harmonise)
    return rows + _motor(root, harmonise)


def _table(root: Path, pattern: str) -> Table:
    path = find_table(root, pattern, needed=pattern.startswith(("Participant_Status", "Demographics")))
    return read_table(path, ["PATNO"]) if path else []


def _scored(
    root: Path, pattern: str, score: Callable[[dict[str, str]], dict[str, Any]], harmonise: Harmonise
) -> list[Row]:
    found = []
    for row in _table(root, pattern):
        if harmonise == "paper":
            if row.get("EVENT_ID") == "BL":
                found.append(Row(row["PATNO"], score(row)))
        elif date := day(row.get("INFODT", "")):
            found.append(Row(row["PATNO"], score(row), session=f"visit {row.get('EVENT_ID', '')}", date=date))
    return found


def _motor(root: Path, harmonise: Harmonise) -> list[Row]:
    """MDS-UPDRS III: of several rows of one day OFF before untreated before ON. 101 is unable to rate."""
    best: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
    for row in _table(root, "MDS-UPDRS_Part_III*.csv"):
        state = {"OFF": 0, "": 1, "ON": 2}.get(row.get("PDSTATE", "").upper(), 1)
        key = (row["PATNO"], row.get("INFODT", ""))
        if number(row.get("NP3TOT", ""), _UNABLE) is not None and (key not in best or state < best[key][0]):
            best[key] = (state, row)
    rows = []
    for (patient, when), (state, row) in best.items():
        values = {"mds_updrs_iii": number(row["NP3TOT"], _UNABLE), "updrs_state": ("OFF", "UNTREATED", "ON")[state]}
        date = day(when)
        if harmonise == "paper" and row.get("EVENT_ID") == "BL":
            rows.append(Row(patient, values))
        elif harmonise == "clean" and date:
            rows.append(Row(patient, values, session=f"visit {row.get('EVENT_ID', '')}", date=date))
    return rows


def depression(row: dict[str, str]) -> float | None:
    """GDS-15: five items count when answered no. None unless all fifteen are answered."""
    items = {name: number(value) for name, value in row.items() if name.startswith("GDS") and name != "GDSTOT"}
    if len(items) != 15 or any(value is None for value in items.values()):
        return None
    return float(sum((1 - (v or 0)) if name in _GDS_REVERSED else (v or 0) for name, v in items.items()))


def autonomic(row: dict[str, str]) -> float | None:
    """SCOPA-AUT: SCAU1 to 25; 9 counts 3 in SCAU8-13 (catheter) and 0 in SCAU22-25 (not applicable); 23A and 26 do not count."""
    total = 0.0
    for i in range(1, 26):
        value = number(row.get(f"SCAU{i}", ""))
        if value is None:
            return None
        if value == 9:
            value = 3.0 if 8 <= i <= 13 else 0.0
        total += value
    return total


COHORT = Cohort("ppmi", "dua", discover, phenotypes, min_match=0.99)
