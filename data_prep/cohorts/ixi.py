"""IXI: about 600 healthy adults of three London sites (https://brain-development.org/ixi-dataset), CC BY-SA 3.0."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.tables import code, files, find_table, number, plain_id, read_table
from g3n.config import G3nError

_FILE = r"(?:^|/)IXI(?P<sub>\d{3})-(?P<site>Guys|HH|IOP)-(?P<scan>\d+)-(?P<mod>T1|T2)\.nii(?:\.gz)?$"
_FIELD_T = {"Guys": 1.5, "IOP": 1.5, "HH": 3.0}  # the table has none
_SEX = {"1": "M", "2": "F", "0": None}
_BOOK = "(1=m, 2=f)"


def discover(root: Path) -> list[Image]:
    return [
        Image(path, m["sub"], m["mod"], site=m["site"], values={"field_strength_t": _FIELD_T[m["site"]]})
        for path, m in files(root, _FILE)
    ]


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """The sheet has repeated ids: a full row and a zeroed copy (0 is missing), or, under 219 and 328, two people.

    Where the rows of an id differ in age or sex, only what differs is passed on: join takes that as missing, with a note.
    """
    path = find_table(root, "IXI*.xls", "IXI*.xlsx", "IXI*.csv")
    assert path is not None
    table = read_table(path, ["IXI_ID", "AGE"])
    sex_column = _sex_column(list(table[0]) if table else [], path.name)
    people: dict[str, list[dict[str, str | float | None]]] = defaultdict(list)
    for row in (row for row in table if row["IXI_ID"]):
        values: dict[str, str | float | None] = {
            "age_years": number(row["AGE"], ["0"], f"{path.name} AGE"),
            "sex": code(row[sex_column], _SEX, f"{path.name} SEX_ID"),
        }
        people[plain_id(row["IXI_ID"], f"{path.name} IXI_ID").zfill(3)].append(values)
    rows = []
    for subject, found in people.items():
        differ = [name for name in ("age_years", "sex") if len({v[name] for v in found if v[name] is not None}) > 1]
        for values in found:
            kept = {name: value for name, value in values.items() if not differ or name in differ}
            rows.append(Row(subject, {**kept, "diagnosis": "HC", "diagnosis_source": "cohort_default"}))
    return rows


def _sex_column(header: list[str], table: str) -> str:
    """The column's name holds its code book, 'SEX_ID (1=m, 2=f)': another book would turn the sexes round."""
    column = next((name for name in header if name.startswith("SEX_ID")), "")
    if column not in ("SEX_ID", f"SEX_ID {_BOOK}"):
        raise G3nError(f"{table} has the column '{column}' for the sex; expected 'SEX_ID {_BOOK}': look its codes up")
    return column


COHORT = Cohort("ixi", "open", discover, phenotypes, min_match=0.97, female_share=0.55)
