"""CoRR: test-retest scans of healthy people at 33 sites (http://fcon_1000.projects.nitrc.org/indi/CoRR), CC BY."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version, seven_digits
from data_prep.cohorts.tables import code, files, find_table, number, plain_id, read_table
from g3n.config import G3nError

_NITRC = (
    r"(?:^|/)[A-Za-z][A-Za-z0-9_]*_(?P<sub>\d{5,7})_(?P<ses>baseline|retest_\d+)/(?:[^/]+/)*anat_(?P<run>\d+)/"
    r"(?:[^/]+/)*anat\.nii\.gz$"
)
_MISSING = ["#"]
_SEX = {"1": "F", "2": "M", "#": None, "M": "M", "F": "F"}  # the other way round than in most cohorts; KKI has letters
_SEX_REVERSED = {**_SEX, "1": "M", "2": "F"}
_REVERSED = r"(?i)templeton|mrn[-_ ]?114"  # MRN_1 is another sample and codes as the others do


def discover(root: Path) -> list[Image]:
    """Raw, fMRIPrep's or NITRC's. Some retests are copies of the baseline, byte by byte: data_prep check finds them."""
    ranked = list(seven_digits(root))
    for path, m in files(root, _NITRC):
        session = _session(m["ses"], path)
        image = Image(path, plain_id(m["sub"], path), "T1", session, int(m["run"]), space="native_defaced")
        ranked.append((3, image))
    return one_version(ranked)


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Many subjects have their age on the baseline row alone: it then holds for the retests, marked as at enrolment.

    Sex is 1 female, 2 male: Utah, all men, and UM, mostly women, tell whether it was read the right way round.
    """
    path = find_table(root, "CoRR_AggregatedPhenotypicData*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["SITE", "SUBID", "SESSION", "SEX", "AGE_AT_SCAN_1"]):
        subject = plain_id(row["SUBID"], f"{path.name} SUBID")
        age = number(row["AGE_AT_SCAN_1"], _MISSING, f"{path.name} AGE_AT_SCAN_1")
        session = _session(row["SESSION"], path.name)
        levels = _SEX_REVERSED if re.match(_REVERSED, row["SITE"]) else _SEX
        always = {
            "sex": code(row["SEX"], levels, f"{path.name} SEX"),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
            "site": row["SITE"] or None,
        }
        rows.append(Row(subject, always))
        if age is not None:
            rows.append(Row(subject, {"age_years": age, "age_precision": "exact"}, session=session))
            if session == "1":
                rows.append(Row(subject, {"age_years": age, "age_precision": "enrol"}))
    _check_utah(rows, path.name)
    return rows


def _session(text: str, where: str) -> str:
    """Baseline is ses-1, Retest_n is ses-(n+1)."""
    match = re.fullmatch(r"baseline|retest_(\d+)", text, re.IGNORECASE)
    if match is None:
        raise G3nError(f"{where} SESSION is '{text[:20]}'; expected Baseline or Retest_<n>")
    return str(int(match[1]) + 1) if match[1] else "1"


def _check_utah(rows: Sequence[Row], table: str) -> None:
    of_utah = [r for r in rows if str(r.values.get("site", "")).startswith("Utah")]
    sexes = {r.subject: r.values["sex"] for r in of_utah if r.values.get("sex")}
    women = sum(sex == "F" for sex in sexes.values())
    if women:
        raise G3nError(
            f"{table}: {women} of {len(sexes)} subjects of Utah read as women, but all are men: sex codes are inverted"
        )


COHORT = Cohort(
    "corr",
    "open",
    discover,
    phenotypes,
    min_match=0.8,
    site_female_share={"UM": 0.72, "SWU": 0.54},
    sites_must_pass=True,
)
