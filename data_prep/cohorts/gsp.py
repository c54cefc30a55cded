"""Brain Genomics Superstruct: 1,570 healthy young adults (https://doi.org/10.7910/DVN/25833), data use terms."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)(?:sub-(?P<sub>\d{4})_ses-(?P<ses>\d+)/anatomical_brain/[^/]+|Sub(?P<raw>\d{4})_Ses(?P<rawses>\d+)/anat/(?:[^/]+/)*[^/]*T1[^/]*)"
    r"\.nii\.gz$"
)


def discover(root: Path) -> list[Image]:
    """C-PAC outputs (stripped) or the release itself (defaced)."""
    return [
        Image(
            path,
            m["sub"] or m["raw"],
            "T1",
            session=str(int(m["ses"] or m["rawses"])),
            space="native_stripped" if m["sub"] else "native_defaced",
            values={"field_strength_t": 3.0},
        )
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Ages are rounded to even years. Ids name the visit: Sub0001_Ses1 is sub-0001_ses-01. The retest list repeats subjects,
    whose sex holds for every visit."""
    rows = []
    for pattern, needed in (("GSP_list*.csv", True), ("GSP_retest*.csv", False)):
        path = find_table(root, pattern, needed=needed)
        for row in [] if path is None else read_table(path, ["Subject_ID", "Sex", "Age_Bin"]):
            named = re.fullmatch(r"Sub(\d{4})(?:_Ses(\d+))?", row["Subject_ID"])
            if named is None:
                raise G3nError(f"{path} names '{row['Subject_ID'][:20]}'; expected a Subject_ID like Sub0001_Ses1")
            values = {
                "age_years": number(row["Age_Bin"], what=f"{pattern} Age_Bin"),
                "age_precision": "bin2",
                "sex": code(row["Sex"], {"M": "M", "F": "F"}, f"{pattern} Sex"),
                "diagnosis": "HC",
                "diagnosis_source": "cohort_default",
            }
            rows.append(Row(named[1], values, session=str(int(named[2] or 1))))
    always = ("sex", "diagnosis", "diagnosis_source")
    return rows + [Row(row.subject, {name: row.values[name] for name in always}) for row in rows]


COHORT = Cohort("gsp", "nc", discover, phenotypes, min_match=0.9, female_share=0.58)
