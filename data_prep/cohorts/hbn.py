"""Healthy Brain Network: children and adolescents who seek help (http://fcon_1000.projects.nitrc.org/indi/cmi_healthy_brain_network)."""

from __future__ import annotations

import re
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import brain_mask, one_version
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from g3n.config import G3nError

_FILE = (
    r"(?:^|/)(?P<sub>sub-NDAR[A-Z0-9]{8})/(?:ses-(?P<ses>[A-Za-z0-9]+)/)?anat/sub-NDAR[A-Z0-9]{8}[^/]*?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?(?P<space>_space-MNI[^/_]*)?(?P<prep>_desc-preproc)?_T1w\.nii\.gz$"
)
_SITE = r"(?:[Ss]ite-?|[-_])(SI|RU|CBIC|CUNY)(?![A-Za-z0-9])"
_FIELD_T = {"SI": 1.5, "RU": 3.0, "CBIC": 3.0, "CUNY": 3.0}
_SITE_IDS = {**{site: site for site in _FIELD_T}, **{f"HBNsite{site}": site for site in _FIELD_T}}
_SEX = {"0": "M", "1": "F", "male": "M", "female": "F", "M": "M", "F": "F"}  # 1 is a man in most cohorts
_YES = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "1": "yes", "0": "no"}
_AFTER_HCP = 100


def discover(root: Path) -> list[Image]:
    """qsiprep's T1 (MNI axes, ``desc-preproc``), else raw ones. Where a child has acq-HCP and acq-VNav, HCP counts first."""
    ranked = []
    for path, m in files(root, _FILE):
        site, acq = re.search(_SITE, path), m["acq"] or ""
        prepared = bool(m["space"] or m["prep"])
        session = "1" if (m["ses"] or "").startswith("HBNsite") else m["ses"] or "1"
        image = Image(
            path,
            m["sub"],
            "T1",
            session=session,
            run=int(m["run"] or 1) + (_AFTER_HCP if acq.startswith("VNav") else 0),
            acq=acq,
            space="mni" if prepared else "native_defaced",
            mask=brain_mask(root, path),
            values={"site": site[1], "field_strength_t": _FIELD_T[site[1]]} if site else {},
        )
        ranked.append((0 if prepared else 1, image))
    return one_version(ranked)


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """No diagnosis is public: all are PED_MIXED, by the cohort. Some tables called .tsv have commas."""
    names = ("*participants*.tsv", "*participants*.csv")
    paths = sorted({path for name in names for path in (*root.glob(name), *root.glob(f"*/{name}"))})
    if not paths:
        find_table(root, "participants*.tsv")
    rows = []
    for path in paths:
        named = re.search(_SITE, path.relative_to(root).as_posix())
        for row in read_table(path):
            low = {name.lower(): value for name, value in row.items()}
            subject = low.get("participant_id") or low.get("subject_id") or ""
            if not subject:
                raise G3nError(f"table '{path}' lacks the column participant_id or subject_id")
            ehq = number(low.get("ehq_total", ""), what=f"{path.name} EHQ_Total")
            site = code(low.get("scan_site_id", ""), _SITE_IDS, f"{path.name} scan_site_id")
            site = site or (named[1] if named else None)
            values = {
                "age_years": number(low.get("age", ""), what=f"{path.name} Age"),
                "sex": code(low.get("sex", ""), _SEX, f"{path.name} Sex"),
                "handedness": None if ehq is None else "R" if ehq > 40 else "L" if ehq < -40 else "A",
                "diagnosis": "PED_MIXED",
                "diagnosis_source": "cohort_default",
                "commercial_use": code(low.get("commercial_use", ""), _YES, f"{path.name} Commercial_Use"),
                "site": site,
                "field_strength_t": _FIELD_T[site] if site else None,
            }
            rows.append(Row(f"sub-{subject.removeprefix('sub-')}", values))
    return rows


COHORT = Cohort("hbn", "nc", discover, phenotypes, min_match=0.99, female_share=0.36)
