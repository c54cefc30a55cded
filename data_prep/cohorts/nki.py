"""NKI-Rockland: a community sample from 6 to 85 years (https://fcon_1000.projects.nitrc.org/indi/enhanced), CC BY-NC."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = (
    r"(?:^|/)sub-(?P<sub>A\d{8})/(?:ses-[A-Za-z0-9]+/)?anat/sub-A\d{8}(?:_ses-(?P<ses>[A-Za-z0-9]+))?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?[^/]*_T1w\.nii\.gz$"
)


def discover(root: Path) -> list[Image]:
    return find(root, "native_defaced")


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
            person=f"nki:{m['sub']}",
            values={"field_strength_t": 3.0},
        )
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """participants.tsv holds the age at enrolment; a sessions table, where there is one, that of each visit.

    The sample is not screened: HC is the cohort's default, not a diagnosis.
    """
    path = find_table(root, "participants.tsv")
    assert path is not None
    rows = []
    for row in read_table(path, ["participant_id"]):
        subject = row["participant_id"].removeprefix("sub-")
        session = row.get("session_id") or row.get("session") or row.get("visit") or ""
        values = {
            "age_years": number(row.get("age", "")),
            "age_precision": "exact" if session else "enrol",
            "sex": code(row.get("sex", ""), {"MALE": "M", "FEMALE": "F", "M": "M", "F": "F"}, f"{path.name} sex"),
            "handedness": code(
                row.get("handedness", ""),
                {"RIGHT": "R", "LEFT": "L", "AMBIDEXTROUS": "A", "R": "R", "L": "L", "A": "A"},
                f"{path.name} handedness",
            ),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
        }
        if session:
            rows.append(
                Row(subject, {k: values.pop(k) for k in ("age_years", "age_precision")}, session.removeprefix("ses-"))
            )
        rows.append(Row(subject, values))
    return rows


COHORT = Cohort("nki", "nc", discover, phenotypes, min_match=0.6)
