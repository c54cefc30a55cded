"""CoRR: test-retest scans of healthy people at 33 sites (http://fcon_1000.projects.nitrc.org/indi/CoRR), CC BY."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)sub-(?P<sub>\d{7})/(?:ses-[A-Za-z0-9]+/)?anat/sub-\d{7}(?:_ses-(?P<ses>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?"
    r"(?P<space>_space-MNI[A-Za-z0-9]*)?(?:_res-\d+)?(?:_desc-preproc)?_T1w\.nii\.gz$"
)
_MISSING = ["#"]
_SEX = {"1": "F", "2": "M", "#": None, "M": "M", "F": "F"}  # the other way round than in most cohorts
_REVERSED = ("MRN", "MRN_1", "MRN114")  # Templeton / MRN-114 write 1 for male
_SEX_REVERSED = {"1": "M", "2": "F", "#": None, "M": "M", "F": "F"}


def discover(root: Path) -> list[Image]:
    images = []
    for path, m in files(root, _FILE):
        mask = path.replace("_desc-preproc_T1w", "_desc-brain_mask")
        images.append(
            Image(
                path,
                str(int(m["sub"])),
                "T1",
                m["ses"] or "1",
                int(m["run"] or 1),
                space="mni" if m["space"] else "native_defaced",
                mask=mask if mask != path and (root / mask).is_file() else None,
            )
        )
    return images


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Many subjects have their age on the baseline row alone: it then holds for the retests (they are weeks apart).

    Sex is 1 female, 2 male. If the site of Utah (all men) reads otherwise, the codes are inverted and this stops.
    """
    path = find_table(root, "CoRR_AggregatedPhenotypicData*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["SITE", "SUBID", "SESSION", "SEX", "AGE_AT_SCAN_1"]):
        subject, age = str(int(float(row["SUBID"]))), number(row["AGE_AT_SCAN_1"], _MISSING)
        levels = _SEX_REVERSED if row["SITE"] in _REVERSED else _SEX
        session = _session(row["SESSION"])
        always = {
            "sex": code(row["SEX"], levels, f"{path.name} SEX"),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
            "site": row["SITE"] or None,
        }
        rows.append(Row(subject, always))
        rows.append(Row(subject, {"age_years": age}, session=session))
        if session == "1":
            rows.append(Row(subject, {"age_years": age}))
    _check_utah(rows, path.name)
    return rows


def _session(text: str) -> str:
    """Baseline is ses-1, Retest_n is ses-(n+1)."""
    digits = "".join(c for c in text if c.isdigit())
    return str(int(digits) + 1) if text.lower().startswith("retest") and digits else "1"


def _check_utah(rows: list[Row], table: str) -> None:
    sexes = {
        r.subject: r.values["sex"]
        for r in rows
        if str(r.values.get("site", "")).startswith("Utah") and r.values.get("sex")
    }
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
