"""IXI: about 600 healthy adults of three London sites (https://brain-development.org/ixi-dataset), CC BY-SA 3.0."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, read_table

_FILE = r"(?:^|/)IXI(?P<sub>\d{3})-(?P<site>Guys|HH|IOP)-(?P<scan>\d+)-(?P<mod>T1|T2)\.nii(?:\.gz)?$"
_FIELD_T = {"Guys": 1.5, "IOP": 1.5, "HH": 3.0}  # the table has none


def discover(root: Path) -> list[Image]:
    return [
        Image(path, m["sub"], m["mod"], site=m["site"], values={"field_strength_t": _FIELD_T[m["site"]]})
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """The sheet has repeated ids: a full row and a zeroed copy, or (219, 328) rows that disagree; join drops those."""
    path = find_table(root, "IXI*.xls", "IXI*.xlsx", "IXI*.csv")
    assert path is not None
    rows = []
    for row in read_table(path, ["IXI_ID", "AGE"]):
        sex_column = next((name for name in row if name.startswith("SEX_ID")), "SEX_ID")  # its name holds the code book
        values = {
            "age_years": number(row["AGE"], missing=["0"]),
            "sex": code(row.get(sex_column, ""), {"1": "M", "2": "F", "0": None}, f"{path.name} SEX_ID"),
            "diagnosis": "HC",
            "diagnosis_source": "cohort_default",
        }
        rows.append(Row(f"{int(float(row['IXI_ID'])):03d}", values))
    return rows


COHORT = Cohort("ixi", "open", discover, phenotypes, min_match=0.97, female_share=0.55)
