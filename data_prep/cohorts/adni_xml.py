"""The XML description that the image archive gives with each ADNI image."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from xml.etree import ElementTree

from data_prep.cohorts.contract import Harmonise, Row
from data_prep.cohorts.tables import code, day, e4_count, number
from g3n.config import G3nError

MISSING = ("-1", "-4")
NONE = dict.fromkeys(MISSING)
SEX = {
    "1": "M",
    "2": "F",
    "M": "M",
    "F": "F",
    "Male": "M",
    "Female": "F",
    **NONE,
}  # a code or text, as the export has it
DIAGNOSIS_AT_ENROLLMENT = {
    "CN": "HC", "SMC": "HC", "EMCI": "MCI", "LMCI": "MCI", "MCI": "MCI", "AD": "AD", "Dementia": "AD", "Patient": None,
}  # fmt: skip
_SCORES = {"MMSE": "mmse", "CDR": "cdr_global", "GDSCALE": "gds15"}
_MAX_BYTES = 1 << 20


def rows_of_xml(path: Path, harmonise: Harmonise, known: Collection[str]) -> list[Row]:
    """Rows of one image: age and scanner at the scan, sex and APOE at every scan, scores of the visit unless their table is
    ``known``. The namespace is left aside: <project xmlns=""> empties it. A document type, which could name entities, is refused.
    """
    text = path.read_bytes()[: _MAX_BYTES + 1]
    if len(text) > _MAX_BYTES or b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise G3nError(f"'{path}' is not one of the archive's descriptions; remove it")
    try:
        tree = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise G3nError(f"'{path}' is damaged XML ({error}); download it again") from error
    found = {_name(e): (e.text or "").strip() for e in tree.iter()}
    terms = {e.get("term", ""): (e.text or "").strip() for e in tree.iter() if e.get("term")}
    items = {e.get("item", ""): (e.text or "").strip() for e in tree.iter() if e.get("item")}
    subject, date = found.get("subjectIdentifier", ""), day(found.get("dateAcquired", ""))
    if not subject or date is None:
        return []
    alleles = [items.get(f"APOE A{i}", "") for i in (1, 2)]
    both = all(number(allele, MISSING, f"{path.name} APOE") is not None for allele in alleles)
    at_scan: dict[str, str | float | None] = {
        "age_years": number(found.get("subjectAge", ""), MISSING, f"{path.name} subjectAge"),
        "field_strength_t": number(terms.get("Field Strength", ""), MISSING, f"{path.name} Field Strength"),
        "manufacturer": terms.get("Manufacturer") or None,
        "scanner_model": terms.get("Mfg Model") or None,
    }
    always: dict[str, str | float | None] = {
        "sex": code(found.get("subjectSex", ""), SEX, "XML subjectSex"),
        "apoe_e4_count": e4_count("/".join(alleles), "XML APOE") if both else None,
    }
    if harmonise == "paper":  # of this image first, else of any
        group = code(found.get("researchGroup", ""), DIAGNOSIS_AT_ENROLLMENT, "XML researchGroup")
        for values in (at_scan, always):
            values |= {"diagnosis": group, "diagnosis_source": "baseline"}
    session = date.strftime("%Y%m%d")
    scores = {name: value for name, value in _scores(tree).items() if name not in known}
    return [Row(subject, at_scan, session, date), Row(subject, scores, session), Row(subject, always)]


def _name(element: ElementTree.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


def _scores(tree: ElementTree.Element) -> dict[str, float | None]:
    """The first score of each assessment, which is its total."""
    found: dict[str, float | None] = {}
    for assessment in (e for e in tree.iter() if _name(e) == "assessment" and e.get("name") in _SCORES):
        score = next((e.text or "" for e in assessment.iter() if _name(e) == "assessmentScore"), "")
        found[_SCORES[assessment.get("name", "")]] = number(score, MISSING, f"XML {assessment.get('name')}")
    return found
