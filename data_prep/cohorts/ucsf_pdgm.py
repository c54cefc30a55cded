"""UCSF-PDGM: 495 pre-operative diffuse gliomas, one 3 T scanner (https://doi.org/10.7937/tcia.bdgf-8v37), CC BY 4.0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table
from data_prep.schema import plain_name
from g3n.config import G3nError

_FILE = r"(?:^|/)UCSF-PDGM-(?P<sub>\d{3,4})(?P<fu>_FU\d{3}d)?(?:_nifti)?/[^/]*_(?P<mod>T1c|T1|T2|FLAIR)(?P<bias>_bias)?\.nii\.gz$"
# First exams of people who are there again as 0429, 0396, 0409, 0431, 0391 and 0433; newer releases name them 0429_FU003d etc.
_REPEATED = {"0138", "0175", "0181", "0278", "0289", "0315"}
_MISSING = {"unknown": None, "indeterminate": None}
_GRADE, _DIAGNOSIS, _DIED = "WHO CNS Grade", "Final pathologic diagnosis (WHO 2021)", "1-dead 0-alive"
_LEVELS: Mapping[str, Mapping[str, str | None]] = {
    "Sex": {"M": "M", "F": "F"},
    _GRADE: {"2": "GLIOMA", "3": "GLIOMA", "4": "GBM", "unknown": None},
    "MGMT status": {"positive": "methylated", "negative": "unmethylated", **_MISSING},
    "1p/19q": {"intact": "intact", "co-deletion": "codeleted", "relative co-deletion": None, **_MISSING},
    _DIED: {"1": "1", "0": "0", "unknown": None},
    "EOR": {"GTR": "GTR", "STR": "STR", "biopsy": "biopsy", **_MISSING},
}


def discover(root: Path) -> list[Image]:
    """The bias-corrected file of a modality where there is one; of a person imaged twice the later exam alone."""
    chosen: dict[tuple[str, str], tuple[bool, Image]] = {}
    for path, m in files(root, _FILE):
        subject = m["sub"].zfill(4)
        if subject in _REPEATED or m["fu"]:
            continue
        image = Image(path, f"UCSF-PDGM-{subject}", m["mod"], space="brats", values={"field_strength_t": 3.0})
        key = (subject, m["mod"])
        if key not in chosen or (m["bias"] and not chosen[key][0]):
            chosen[key] = (bool(m["bias"]), image)
    return [image for _, image in chosen.values()]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Grade 4 is GBM, IDH-mutant astrocytomas of grade 4 too (diagnosis_detail and idh tell them apart), 2 and 3 GLIOMA.

    Of the living the days are those until censoring. A relative co-deletion is uncertain, so missing. Ids have three digits
    here, four in the folders.
    """
    path = find_table(root, "UCSF-PDGM-metadata*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["ID", "Age at MRI", _DIAGNOSIS, "MGMT index", "IDH", "OS", *_LEVELS]):
        named = re.fullmatch(r"UCSF-PDGM-(\d{3,4})(_FU\d{3}d)?", row["ID"])
        if named is None:
            raise G3nError(f"{path.name} has the ID '{row['ID'][:30]}'; expected one like UCSF-PDGM-004")
        if named[2]:
            continue
        levels = {name: code(row[name], known, f"{path.name} {name}") for name, known in _LEVELS.items()}
        died = levels[_DIED]
        age, index, days = (number(row[n], ["unknown"], f"{path.name} {n}") for n in ("Age at MRI", "MGMT index", "OS"))
        values = {
            "age_years": age,
            "age_precision": "year",
            "sex": levels["Sex"],
            "diagnosis": levels[_GRADE],
            "diagnosis_source": "visit",
            "diagnosis_detail": plain_name(row[_DIAGNOSIS]),
            "who_grade": number(row[_GRADE], ["unknown"]),
            "idh": _idh(row["IDH"], path.name),
            "mgmt": levels["MGMT status"],
            "mgmt_index": index,
            "codel_1p19q": levels["1p/19q"],
            "os_days": days,
            "os_event": None if died is None else float(died),
            "resection": levels["EOR"],
        }
        rows.append(Row(f"UCSF-PDGM-{named[1].zfill(4)}", values))
    return rows


def _idh(text: str, table: str) -> str | None:
    """Mutations have many spellings: 'IDH1 p.R132H', 'IDH1 p.Arg132His', 'mutated (NOS)'."""
    if re.fullmatch(r"IDH[12] p\.[A-Za-z]+\d+[A-Za-z]+|mutated \(NOS\)", text, re.IGNORECASE):
        return "mutant"
    return code(text, {"wildtype": "wildtype", "unknown": None}, f"{table} IDH")


COHORT = Cohort("ucsf_pdgm", "open", discover, phenotypes, min_match=0.99, female_share=202 / 501)
