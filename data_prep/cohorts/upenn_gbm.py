"""UPenn-GBM: pre-operative glioblastomas (https://doi.org/10.7937/TCIA.709X-DN49), CC BY 4.0."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)(?P<sub>UPENN-GBM-\d{5})_11_(?P<mod>T1GD|T1|T2|FLAIR)\.nii\.gz$"
_MODALITY = {"T1GD": "T1c", "T1": "T1", "T2": "T2", "FLAIR": "FLAIR"}
_MISSING = ["Not Available", "Not Applicable"]
_NONE = dict.fromkeys(_MISSING)


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
    for row in read_table(path, ["ID", "Gender", "Age_at_scan_years", "IDH1", "MGMT"]):
        subject, _, visit = row["ID"].rpartition("_")
        if visit != "11":
            continue
        states = {
            "Deceased": "1",
            "Alive": "0",
            "Lost to Follow-up": "0",
            "Deceased - uncertain date of death": None,
            **_NONE,
        }
        event = code(row.get("Survival_Status", ""), states, f"{path.name} Survival_Status")
        survival = row.get("Survival_from_surgery_days_UPDATED" if event == "1" else "Survival_Censor", "")
        cut = {"Y": "GTR", "N": "STR", **_NONE}
        values = {
            "age_years": number(row["Age_at_scan_years"], _MISSING),
            "sex": code(row["Gender"], {"M": "M", "F": "F"}, f"{path.name} Gender"),
            "diagnosis": "GBM",
            "diagnosis_source": "cohort_default",
            "who_grade": 4.0,
            "idh": code(row["IDH1"], {"Wildtype": "wildtype", "Mutated": "mutant", "NOS/NEC": None, **_NONE}, "IDH1"),
            "mgmt": code(
                row["MGMT"],
                {"Methylated": "methylated", "Unmethylated": "unmethylated", "Indeterminate": None, **_NONE},
                f"{path.name} MGMT",
            ),
            "kps": number(row.get("KPS", ""), _MISSING),
            "resection": code(row.get("GTR_over90percent", ""), cut, f"{path.name} GTR_over90percent"),
            "os_event": None if event is None else float(event),
            "os_days": None if event is None else number(survival, _MISSING),
        }
        rows.append(Row(subject, values, session="11"))
    return rows


COHORT = Cohort("upenn_gbm", "open", discover, phenotypes, min_match=0.98, female_share=266 / 671)
