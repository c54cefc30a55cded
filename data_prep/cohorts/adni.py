"""ADNI: controls, mild cognitive impairment and Alzheimer dementia, followed for years (https://adni.loni.usc.edu), data use agreement."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import Table, code, day, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)(?P<sub>\d{3}_S_\d{4,5})/(?P<desc>[^/]+)/(?P<date>\d{4}-\d{2}-\d{2})_[\d_.]+/(?P<img>[IS]\d+)/[^/]+\.(?P<kind>nii|nii\.gz)$"
_MISSING = ["-1", "-4"]
_SEX = {"1": "M", "2": "F", "M": "M", "F": "F", "Male": "M", "Female": "F", "-4": None}
_DIAGNOSIS = {"1": "HC", "2": "MCI", "3": "AD", "-4": None}
_LEGACY = {
    "1": "HC",
    "2": "MCI",
    "3": "AD",
    "4": "MCI",
    "5": "AD",
    "6": "AD",
    "7": "HC",
    "8": "MCI",
    "9": "HC",
    "-4": None,
}
_ENROLLED = {
    "CN": "HC", "SMC": "HC", "EMCI": "MCI", "LMCI": "MCI", "MCI": "MCI", "AD": "AD", "Dementia": "AD", "Patient": None,
}  # fmt: skip
_MAX_XML_BYTES = 1 << 20


def discover(root: Path) -> list[Image]:
    """One image a subject and day: corrected for gradients (GradWarp, MT1) before the rest, then the lowest image number."""
    best: dict[tuple[str, str], tuple[tuple[int, str], Image]] = {}
    for path, m in files(root, _FILE):
        desc = m["desc"].lower()
        rank = (
            0 if "gradwarp" in desc and "mt1" in desc else 1 if "mt1" in desc or "gradwarp" in desc else 2,
            m["img"],
        )
        image = Image(path, m["sub"], "T1", m["date"].replace("-", ""), date=day(m["date"]), site=m["sub"][:3])
        key = (m["sub"], m["date"])
        if key not in best or rank < best[key][0]:
            best[key] = (rank, image)
    return [image for _, image in best.values()]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Diagnosis and scores of the nearest visit within 180 days; paper mode takes the group at enrolment for every scan."""
    rows = [row for path in sorted(root.rglob("ADNI_*.xml")) for row in _from_xml(path, harmonise)]
    for row in _table(root, "PTDEMOG*.csv"):
        values = {
            "sex": code(row.get("PTGENDER", ""), _SEX, "PTDEMOG PTGENDER"),
            "handedness": code(row.get("PTHAND", ""), {"1": "R", "2": "L", "-4": None}, "PTDEMOG PTHAND"),
            "education_years": number(row.get("PTEDUCAT", ""), _MISSING),
        }
        rows.append(Row(row["PTID"], values))
    for table, column, name in (
        ("MMSE", "MMSCORE", "mmse"), ("CDR", "CDGLOBAL", "cdr_global"), ("CDR", "CDRSB", "cdr_sb"),
        ("MOCA", "MOCA", "moca"), ("GDSCALE", "GDTOTAL", "gds15"),
    ):  # fmt: skip
        for row in _table(root, f"{table}_*.csv", f"{table}.csv"):
            rows += _at_visit(row, {name: number(row.get(column, ""), _MISSING)})
    for row in _table(root, "APOERES*.csv"):
        alleles = [row.get("APGEN1", ""), row.get("APGEN2", "")]
        if all(alleles):
            rows.append(Row(row["PTID"], {"apoe_e4_count": float(sum(number(a) == 4 for a in alleles))}))
    if harmonise == "clean":
        for row in _table(root, "DXSUM*.csv"):
            for column, levels in (("DIAGNOSIS", _DIAGNOSIS), ("DXCURREN", _LEGACY), ("DXCHANGE", _LEGACY)):
                if row.get(column, ""):
                    values = {"diagnosis": code(row[column], levels, f"DXSUM {column}"), "diagnosis_source": "visit"}
                    rows += _at_visit(row, values)
                    break
    for row in _table(root, "ADNIMERGE*.csv"):
        rows += _from_merge(row, harmonise)
    return rows


def _table(root: Path, *patterns: str) -> Table:
    """Rows of a table, if it is there; -4 and -1 stand for missing. Ids are PTID."""
    path = find_table(root, *patterns, needed=False)
    return [row for row in read_table(path, ["PTID"]) if row["PTID"]] if path else []


def _at_visit(row: dict[str, str], values: dict[str, str | float | None]) -> list[Row]:
    """VISDATE is empty in parts of old tables: EXAMDATE then. Without a date a visit cannot be joined."""
    date = day(row.get("VISDATE", "")) or day(row.get("EXAMDATE", ""))
    return [Row(row["PTID"], values, session=f"visit {row.get('VISCODE', '')}", date=date)] if date else []


def _from_merge(row: dict[str, str], harmonise: Harmonise) -> list[Row]:
    """AGE is that at baseline; the age at the visit is AGE + Years_bl."""
    age, years = number(row.get("AGE", "")), number(row.get("Years_bl", "") or "0")
    column = "DX_bl" if harmonise == "paper" else "DX"
    values: dict[str, str | float | None] = {
        "age_years": None if age is None or years is None else round(age + years, 2),
        "diagnosis": code(row.get(column, ""), _ENROLLED, f"ADNIMERGE {column}"),
        "mmse": number(row.get("MMSE", ""), _MISSING),
        "cdr_sb": number(row.get("CDRSB", ""), _MISSING),
    }
    always: dict[str, str | float | None] = {
        "sex": code(row.get("PTGENDER", ""), _SEX, "ADNIMERGE PTGENDER"),
        "apoe_e4_count": number(row.get("APOE4", ""), _MISSING),
    }
    return [*_at_visit(row, values), Row(row["PTID"], always)]


def _from_xml(path: Path, harmonise: Harmonise) -> list[Row]:
    """The description that the archive gives with each image. A document type, which could name entities, is refused."""
    text = path.read_bytes()[: _MAX_XML_BYTES + 1]
    if len(text) > _MAX_XML_BYTES or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise G3nError(f"'{path}' is not one of the archive's descriptions; remove it")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise G3nError(f"'{path}' is damaged XML ({error}); download it again") from error
    found = {e.tag.rsplit("}", 1)[-1]: (e.text or "").strip() for e in tree.iter()}
    terms = {e.get("term", ""): (e.text or "").strip() for e in tree.iter() if e.get("term")}
    items = {e.get("item", ""): (e.text or "").strip() for e in tree.iter() if e.get("item")}
    subject, date = found.get("subjectIdentifier", ""), day(found.get("dateAcquired", ""))
    if not subject or date is None:
        return []
    alleles = [number(items.get(f"APOE A{i}", "")) for i in (1, 2)]
    at_scan: dict[str, str | float | None] = {
        "age_years": number(found.get("subjectAge", "")),
        "field_strength_t": number(terms.get("Field Strength", "")),
        "manufacturer": terms.get("Manufacturer") or None,
        "scanner_model": terms.get("Mfg Model") or None,
    }
    always: dict[str, str | float | None] = {
        "sex": code(found.get("subjectSex", ""), _SEX, "XML subjectSex"),
        "apoe_e4_count": None if None in alleles else float(sum(a == 4 for a in alleles)),
    }
    if harmonise == "paper":
        always |= {
            "diagnosis": code(found.get("researchGroup", ""), _ENROLLED, "XML researchGroup"),
            "diagnosis_source": "baseline",
        }
    return [Row(subject, at_scan, session=date.strftime("%Y%m%d"), date=date), Row(subject, always)]


COHORT = Cohort("adni", "dua", discover, phenotypes, min_match=0.99)
