"""UPenn-GBM: pre-operative glioblastomas (https://doi.org/10.7937/TCIA.709X-DN49), CC BY 4.0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>UPENN-GBM-\d{5})_11_(?P<mod>T1GD|T1|T2|FLAIR)\.nii\.gz$"
_MODALITY = {"T1GD": "T1c", "T1": "T1", "T2": "T2", "FLAIR": "FLAIR"}
_MISSING = ["Not Available", "Not Applicable"]
_NONE = dict.fromkeys(_MISSING)
_LEVELS: Mapping[str, Mapping[str, str | None]] = {
    "Gender": {"M": "M", "F": "F"},
    "IDH1": {"Wildtype": "wildtype", "Mutated": "mutant", "NOS/NEC": None, **_NONE},
    "MGMT": {"Methylated": "methylated", "Unmethylated": "unmethylated", "Indeterminate": None, **_NONE},
    "GTR_over90percent": {"Y": "GTR", "N": "STR", **_NONE},
    "Survival_Status": {
        "Deceased": "1", "Alive": "0", "Lost to Follow-up": "0", "Deceased - uncertain date of death": None, **_NONE,
    },
}  # fmt: skip
_DIED, _CENSORED = "Survival_from_surgery_days_UPDATED", "Survival_Censor"


def discover(root: Path) -> list[Image]:
    """Baselines (_11): follow-ups (_21) have resection cavities. ``old`` folders and unstripped copies are passed over."""
    return [
        Image(path, m["sub"], _MODALITY[m["mod"]], session="11", space="brats")
        for path, m in files(root, _FILE, prune=["old"])
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Survival counts from the first surgery; who is lost or alive is censored; an uncertain date of death is missing."""
    path = find_table(root, "UPENN-GBM_clinical_info*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["ID", "Age_at_scan_years", "KPS", _DIED, _CENSORED, *_LEVELS]):
        subject, _, visit = row["ID"].rpartition("_")
        if visit != "11":
            continue
        levels = {name: code(row[name], known, f"{path.name} {name}") for name, known in _LEVELS.items()}
        event = levels["Survival_Status"]
        survival = _DIED if event == "1" else _CENSORED
        values = {
            "age_years": number(row["Age_at_scan_years"], _MISSING, f"{path.name} Age_at_scan_years"),
            "sex": levels["Gender"],
            "diagnosis": "GBM",
            "diagnosis_source": "cohort_default",
            "who_grade": 4.0,
            "idh": levels["IDH1"],
            "mgmt": levels["MGMT"],
            "kps": number(row["KPS"], _MISSING, f"{path.name} KPS"),
            "resection": levels["GTR_over90percent"],
            "os_event": None if event is None else float(event),
            "os_days": None if event is None else number(row[survival], _MISSING, f"{path.name} {survival}"),
        }
        rows.append(Row(subject, values, session="11"))
    return rows


COHORT = Cohort("upenn_gbm", "open", discover, phenotypes, min_match=0.99, female_share=266 / 671)
