"""NKI-Rockland: a community sample from 6 to 85 years (https://fcon_1000.projects.nitrc.org/indi/enhanced), CC BY-NC."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import brain_mask
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)sub-(?P<sub>A\d{8})/(?:ses-[A-Za-z0-9]+/)?anat/sub-A\d{8}(?:_ses-(?P<ses>[A-Za-z0-9]+))?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?[^/]*_T1w\.nii\.gz$"
)
_SEX = {"MALE": "M", "FEMALE": "F", "M": "M", "F": "F"}
_HANDS = {"RIGHT": "R", "LEFT": "L", "AMBIDEXTROUS": "A", "R": "R", "L": "L", "A": "A"}
_TABLES = ("*participants*.tsv", "*sessions.tsv", "*visit*.tsv")


def discover(root: Path) -> list[Image]:
    """Raw heads alone: what a pipeline made of them is the same head again."""
    return [image for image in find(root, "native_defaced") if not re.search(r"_(space|desc)-[^/]*$", image.path)]


def find(root: Path, space: str) -> list[Image]:
    """Images under NKI's ids; ``person`` is one for this cohort and nki2."""
    return [
        Image(
            path,
            m["sub"],
            "T1",
            m["ses"] or "1",
            int(m["run"] or 1),
            m["acq"] or "",
            space=space,
            mask=brain_mask(root, path),
            person=f"nki:{m['sub']}",
            values={"field_strength_t": 3.0},
        )
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """participants.tsv holds the age at enrolment; a table of sessions or visits, where there is one, that of each.

    The sample is not screened: HC is the cohort's default, not a diagnosis.
    """
    paths = sorted({path for name in _TABLES for path in (*root.glob(name), *root.glob(f"*/{name}"))})
    if not any("participants" in path.name for path in paths):
        find_table(root, "*participants*.tsv")
    rows = []
    for path in paths:
        owner = re.match(r"sub-(A\d{8})_sessions", path.name)
        for row in read_table(path):
            subject = owner[1] if owner else row.get("participant_id", "").removeprefix("sub-")
            if not subject:
                raise G3nError(f"table '{path}' lacks the column participant_id, or an id in it")
            age = number(row.get("age", ""), what=f"{path.name} age")
            session = row.get("session_id") or row.get("session") or row.get("visit") or ""
            always = {
                "sex": code(row.get("sex", ""), _SEX, f"{path.name} sex"),
                "handedness": code(row.get("handedness", ""), _HANDS, f"{path.name} handedness"),
                "diagnosis": "HC",
                "diagnosis_source": "cohort_default",
            }
            rows.append(Row(subject, always))
            if age is not None:
                when = {"age_years": age, "age_precision": "exact" if session else "enrol"}
                rows.append(Row(subject, when, session.removeprefix("ses-") or None))
    return rows


COHORT = Cohort("nki", "nc", discover, phenotypes, min_match=0.6)
