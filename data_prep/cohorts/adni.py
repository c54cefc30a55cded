"""ADNI: controls, mild cognitive impairment and Alzheimer dementia, followed for years (https://adni.loni.usc.edu), data use agreement."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.cohorts.adni_xml import DIAGNOSIS_AT_ENROLLMENT, MISSING, NONE, SEX, rows_of_xml
from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.scores import cognition
from data_prep.cohorts.tables import Table, code, day, e4_count, files, find_table, number, plain_id, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)(?P<sub>\d{3}_S_\d{4,5})/(?P<desc>[^/]+)/(?P<date>\d{4}-\d{2}-\d{2})_[\d_.]+/[IS](?P<img>\d+)/[^/]+\.(?:nii|nii\.gz)$"
_T1 = re.compile(r"T1|MP[-_ ]?R|SPGR|BRAVO|TFE|FFE|ACCEL", re.IGNORECASE)
_NOT_T1 = re.compile(r"FLAIR|T2|DTI|DWI|FMRI|BOLD|MASK|LOCALI|SCOUT", re.IGNORECASE)
# Columns without which a table would leave out or change a label in silence.
_TABLES: Mapping[str, tuple[str, ...]] = {
    "REGISTRY": (), "PTDEMOG": ("PTGENDER", "PTHAND", "PTEDUCAT"), "MMSE": ("MMSCORE",), "CDR": ("CDGLOBAL",), "MOCA": (),
    "GDSCALE": ("GDTOTAL",), "APOERES": (), "DXSUM": (), "ADNIMERGE": ("DX", "DX_bl", "AGE", "Years_bl", "PTGENDER"),
}  # fmt: skip
_DIAGNOSIS = {"1": "HC", "2": "MCI", "3": "AD", **NONE}
_CHANGE = {**_DIAGNOSIS, "4": "MCI", "5": "AD", "6": "AD", "7": "HC", "8": "MCI", "9": "HC"}
_DIAGNOSIS_COLUMNS = {"DIAGNOSIS": _DIAGNOSIS, "DXCURREN": _DIAGNOSIS, "DXCHANGE": _CHANGE}
_SCORES = (("MMSE", "MMSCORE", "mmse"), ("CDR", "CDGLOBAL", "cdr_global"), ("CDR", "CDRSB", "cdr_sb"), ("GDSCALE", "GDTOTAL", "gds15"))  # fmt: skip


def discover(root: Path) -> list[Image]:
    """One T1 a subject and day: MT1 with GradWarp before other MT1 before the rest, then the lowest image number."""
    best: dict[tuple[str, str], tuple[tuple[int, int], Image]] = {}
    for path, m in files(root, _FILE):
        desc = m["desc"].lower()
        if not _T1.search(desc) or _NOT_T1.search(desc):
            continue
        rank = (2 if "mt1" not in desc else 1 if "gradwarp" not in desc else 0, int(m["img"]))
        image = Image(path, m["sub"], "T1", m["date"].replace("-", ""), date=day(m["date"]), site=m["sub"][:3])
        key = (m["sub"], m["date"])
        if key not in best or rank < best[key][0]:
            best[key] = (rank, image)
    return [image for _, image in best.values()]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Diagnosis and scores of the nearest visit within 180 days; paper mode takes the group at enrollment for every scan."""
    ptid = {plain_id(i.subject.rpartition("_")[2], "RID"): i.subject for i in discover(root)}
    tables = {name: _table(root, name, columns, ptid) for name, columns in _TABLES.items()}
    dates = _calendar(tables.values())
    _check_dates(tables, dates)
    known = {name for table, _, name in _SCORES if tables[table]}
    rows = [row for path in sorted(root.rglob("ADNI_*.xml")) for row in rows_of_xml(path, harmonise, known)]
    for row in tables["PTDEMOG"]:
        values = {
            "sex": code(row["PTGENDER"], SEX, "PTDEMOG PTGENDER"),
            "handedness": code(row["PTHAND"], {"1": "R", "2": "L", **NONE}, "PTDEMOG PTHAND"),
            "education_years": number(row["PTEDUCAT"], MISSING, "PTDEMOG PTEDUCAT"),
        }
        rows.append(Row(row["PTID"], values))
    for table, column, name in _SCORES:
        for row in tables[table]:
            rows += _at_visit(row, {name: number(row.get(column, ""), MISSING, f"{table} {column}")}, dates)
    for row in tables["MOCA"]:
        rows += _at_visit(row, {"moca": cognition(row, MISSING)}, dates)
    rows += [Row(row["PTID"], {"apoe_e4_count": _alleles(row)}) for row in tables["APOERES"]]
    if harmonise == "clean":
        for row in tables["DXSUM"]:
            if diagnosis := _diagnosis(row):
                rows += _at_visit(row, {"diagnosis": diagnosis, "diagnosis_source": "visit"}, dates)
    for row in tables["ADNIMERGE"]:
        rows += _from_merge(row, harmonise, dates)
    return rows


def _table(root: Path, name: str, columns: tuple[str, ...], ptid: Mapping[str, str]) -> Table:
    """Rows of a table, if it is there, each with its PTID. Old exports name people by RID alone: who has no image is left out."""
    path = find_table(root, f"{name}_*.csv", f"{name}.csv", needed=False)
    rows = read_table(path, columns) if path else []
    if rows and not {"PTID", "RID"} & set(rows[0]):
        raise G3nError(f"table '{path}' lacks the columns PTID and RID; is it one of ADNI's?")
    people = [row.get("PTID") or ptid.get(plain_id(row["RID"], f"{name} RID"), "") for row in rows]
    return [{**row, "PTID": person} for row, person in zip(rows, people, strict=True) if person]


def _date(row: Mapping[str, str]) -> datetime.date | None:
    """VISDATE is empty in parts of old tables: EXAMDATE then."""
    return day(row.get("VISDATE", "")) or day(row.get("EXAMDATE", ""))


def _calendar(tables: Iterable[Table]) -> dict[tuple[str, str], datetime.date]:
    """When each person's visit (VISCODE or VISCODE2) was, by the tables that say so: others name the visit alone."""
    found: dict[tuple[str, str], datetime.date] = {}
    for row in (row for table in tables for row in table):
        if date := _date(row):
            for visit in filter(None, (row.get("VISCODE2"), row.get("VISCODE"))):
                found.setdefault((row["PTID"], visit), date)
    return found


def _check_dates(tables: Mapping[str, Table], dates: Mapping[tuple[str, str], datetime.date]) -> None:
    for name in ("MMSE", "CDR", "MOCA", "GDSCALE", "DXSUM"):
        if tables[name] and not any(_at_visit(row, {}, dates) for row in tables[name]):
            raise G3nError(f"no visit of table {name} has a date; put REGISTRY or ADNIMERGE beside it, which have them")


def _at_visit(
    row: Mapping[str, str], values: Mapping[str, str | float | None], dates: Mapping[tuple[str, str], datetime.date]
) -> list[Row]:
    """A row at the visit's date; none where no table knows it, for it cannot be joined."""
    visits = [(row["PTID"], row.get(name, "")) for name in ("VISCODE2", "VISCODE")]
    date = _date(row) or next((dates[visit] for visit in visits if visit in dates), None)
    return [Row(row["PTID"], values, session=f"visit {row.get('VISCODE', '')}", date=date)] if date else []


def _diagnosis(row: Mapping[str, str]) -> str | None:
    """DIAGNOSIS, or what it was called in ADNI 1 (DXCURREN) and GO/2 (DXCHANGE: 4 to 6 conversions, 7 to 9 reversions)."""
    if not set(_DIAGNOSIS_COLUMNS) & set(row):
        raise G3nError(f"table DXSUM lacks the column {' or '.join(_DIAGNOSIS_COLUMNS)}; is it the right table?")
    found = (code(row.get(name, ""), levels, f"DXSUM {name}") for name, levels in _DIAGNOSIS_COLUMNS.items())
    return next((dx for dx in found if dx is not None), None)


def _alleles(row: Mapping[str, str]) -> float | None:
    """APGEN1 and APGEN2, in newer exports GENOTYPE."""
    if not {"APGEN1", "GENOTYPE"} & set(row):
        raise G3nError("table APOERES lacks the column APGEN1 or GENOTYPE; is it the right table?")
    pair = [row.get("APGEN1", ""), row.get("APGEN2", "")]
    both = all(number(allele, MISSING, "APOERES APGEN") is not None for allele in pair)
    return e4_count("/".join(pair) if both else row.get("GENOTYPE", ""), "APOERES", MISSING)


def _from_merge(
    row: Mapping[str, str], harmonise: Harmonise, dates: Mapping[tuple[str, str], datetime.date]
) -> list[Row]:
    """AGE is that at baseline; the age at the visit is AGE + Years_bl."""
    age, years = (number(row[name], MISSING, f"ADNIMERGE {name}") for name in ("AGE", "Years_bl"))
    years = 0.0 if years is None and row.get("VISCODE") == "bl" else years
    always: dict[str, str | float | None] = {
        "sex": code(row["PTGENDER"], SEX, "ADNIMERGE PTGENDER"),
        "apoe_e4_count": number(row.get("APOE4", ""), MISSING, "ADNIMERGE APOE4"),
    }
    values: dict[str, str | float | None] = {
        "age_years": None if age is None or years is None else round(age + years, 2),
        "mmse": number(row.get("MMSE", ""), MISSING, "ADNIMERGE MMSE"),
        "cdr_sb": number(row.get("CDRSB", ""), MISSING, "ADNIMERGE CDRSB"),
    }
    column, into, source = ("DX_bl", always, "baseline") if harmonise == "paper" else ("DX", values, "visit")
    into["diagnosis"] = code(row[column], {**DIAGNOSIS_AT_ENROLLMENT, **NONE}, f"ADNIMERGE {column}")
    into["diagnosis_source"] = source
    return [*_at_visit(row, values, dates), Row(row["PTID"], always)]


COHORT = Cohort("adni", "dua", discover, phenotypes, min_match=0.99)
