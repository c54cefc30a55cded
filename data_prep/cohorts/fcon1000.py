"""1000 Functional Connectomes: about 1,200 healthy adults of some 35 sites (http://fcon_1000.projects.nitrc.org)."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)(?P<site>[A-Z][A-Za-z0-9_-]+)/(?:[^/]+/)*(?:[^/]*sub-(?P<sub>\d{5})(?:_ses-(?P<ses>[A-Za-z0-9]+))?[^/]*?"
    r"(?:_run-(?P<run>\d+))?_T1w_brain|sub-(?P<raw>\d{5})/anat/mprage_(?P<kind>skullstripped|anonymized))\.nii\.gz$"
)
_SEX = {"M": "M", "F": "F", "male": "M", "female": "F"}
_HANDS = {"r": "R", "right": "R", "l": "L", "left": "L", "a": "A", "ambidextrous": "A"}  # other words are missing


def discover(root: Path) -> list[Image]:
    """Stripped derivatives, else stripped, else whole raw heads. The first folder below the root is the site: numbers of
    subjects are unique within a site only."""
    ranked = []
    for path, m in files(root, _FILE):
        rank = {None: 0, "skullstripped": 1, "anonymized": 2}[m["kind"]]
        space = "native_defaced" if rank == 2 else "native_stripped"
        session, run = m["ses"] or "1", int(m["run"] or 1)
        ranked.append((rank, Image(path, m["sub"] or m["raw"], "T1", session, run, site=m["site"], space=space)))
    return one_version(ranked)


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """<Site>_participants.tsv or <Site>/participants.tsv. 9999 and -1 are missing ages, as is a range. Some sites give no
    sex."""
    paths = sorted(
        {*root.glob("*_participants.tsv"), *root.glob("*/*_participants.tsv"), *root.glob("*/participants.tsv")}
    )
    if not paths:
        find_table(root, "*_participants.tsv")
    rows = []
    for path in paths:
        site = path.name.removesuffix("participants.tsv").rstrip("_") or path.parent.name
        for row in read_table(path):
            subject = row.get("participant_id") or row.get("Subject", "")
            if not subject:
                raise G3nError(f"table '{path}' lacks the column participant_id, or an id in it")
            age, hand = row.get("age", ""), row.get("handed") or row.get("handedness", "")
            values = {
                "age_years": None if "-" in age[1:] else number(age, ["9999", "-1"], f"'{path}' age"),
                "sex": code(row.get("sex", ""), _SEX, f"'{path}' sex"),
                "handedness": _HANDS.get(hand.lower()),
                "diagnosis": "HC",
                "diagnosis_source": "cohort_default",
            }
            rows.append(Row(subject.removeprefix("sub").removeprefix("-").zfill(5), values, site=site))
    return rows


COHORT = Cohort("fcon1000", "open", discover, phenotypes, min_match=0.97, ids_unique_within="site")
