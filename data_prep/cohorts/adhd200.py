"""ADHD-200: children and adolescents of eight sites (http://fcon_1000.projects.nitrc.org/indi/adhd200), CC BY-NC."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version, seven_digits
from data_prep.cohorts.tables import code, find_table, number, plain_id, read_table
from g3n.config import G3nError

_NAMES = ("Peking", "Brown", "KKI", "NeuroIMAGE", "NYU", "OHSU", "Pittsburgh", "WashU")
_SITE: dict[str, str | None] = {str(i): name for i, name in enumerate(_NAMES, 1)}
_SITE |= {name: name for name in _NAMES} | {f"Peking_{i}": "Peking" for i in (1, 2, 3)} | {"-999": None}
_SEX = {"0": "F", "1": "M", "Female": "F", "Male": "M", "-999": None}
_HANDS = {
    "0": "L", "1": "R", "2": "A", "L": "L", "R": "R", "Left": "L", "Right": "R", "Ambidextrous": "A",
    "3": None, "-999": None,  # 3 is in no key
}  # fmt: skip
_DIAGNOSIS = {
    "0": "HC", "1": "ADHD", "2": "ADHD", "3": "ADHD", "pending": None, "withheld": None, "-999": None,
    "Typically Developing Children": "HC", "ADHD-Combined": "ADHD", "ADHD-Hyperactive/Impulsive": "ADHD",
    "ADHD-Inattentive": "ADHD",
}  # fmt: skip
_TABLES = ("*phenotypic*.csv", "*phenotypic*.tsv", "participants.tsv")


def discover(root: Path) -> list[Image]:
    return one_version(seven_digits(root))


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """All tables there are: of a site, of all, or BIDS's. Labels of the test set come in a table of their own, and some
    sites list those subjects twice: what is withheld in one row is taken from another."""
    paths = sorted({path for name in _TABLES for path in (*root.glob(name), *root.glob(f"*/{name}"))})
    if not paths:
        find_table(root, *_TABLES)
    rows = []
    for path in paths:
        for row in read_table(path):
            low = {re.sub(r"[^a-z0-9]", "", name.lower()): value for name, value in row.items()}
            subject = low.get("scandirid") or low.get("id") or low.get("participantid", "").removeprefix("sub-")
            site = _site(low.get("site", ""), path)
            hand = "" if site == "NYU" else low.get("handedness", "")  # a score from -1 to 1 there
            values = {
                "age_years": number(low.get("age", ""), ["-999"], f"{path.name} Age"),
                "sex": code(low.get("gender", ""), _SEX, f"{path.name} Gender"),
                "diagnosis": code(low.get("dx", ""), _DIAGNOSIS, f"{path.name} DX"),
                "diagnosis_source": "visit",
                "handedness": code(hand, _HANDS, f"{path.name} Handedness"),
                "site": site,
            }
            rows.append(Row(plain_id(subject, f"{path.name} ScanDir ID"), values))
    return rows


def _site(text: str, path: Path) -> str | None:
    """The site of a row, which must be the one after which a table (or the folder of participants.tsv) is named."""
    place = path.parent.name if path.name == "participants.tsv" else path.name
    named = next((name for name in _NAMES if place.lower().startswith(name.lower())), None)
    found = code(text, _SITE, f"{path.name} Site") or named
    if named is not None and found != named:
        raise G3nError(f"'{path}': Site '{text}' is {found} here, but the table is named after {named}; look it up")
    return found


COHORT = Cohort("adhd200", "nc", discover, phenotypes, min_match=0.96, female_share=0.39)
