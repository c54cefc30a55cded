"""IXI: sex code in the column's name, zeros for missing, repeated and contradicting rows."""

from __future__ import annotations

import struct
from pathlib import Path

import openpyxl
import pytest

from data_prep.cohorts import load_cohort
from data_prep.cohorts.contract import Harmonise
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

BOOK = "SEX_ID (1=m, 2=f)"
HEADER = f'IXI_ID,"{BOOK}",HEIGHT,WEIGHT,ETHNIC_ID,MARITAL_ID,OCCUPATION_ID,QUALIFICATION_ID,DOB,DATE_AVAILABLE,STUDY_DATE,AGE'
ROWS = [
    "2,2,164,58,1,4,1,5,1970-01-01,1,2005-11-18,35.80", "2,0,0,0,0,0,0,0,,0,,0",  # a zeroed copy
    "12,1,175,70,1,2,1,5,,1,2005-08-01,38.78", "25,2,0,0,0,0,0,0,,1,,0",
    "219,1,0,0,0,0,0,0,,1,,60.5", "219,2,0,0,0,0,0,0,,1,,25.25", "328,2,0,0,0,0,0,0,,1,,60.5", "328,2,0,0,0,0,0,0,,1,,25.25",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(tmp_path, "T1/IXI002-Guys-0828-T1.nii.gz", "T2/IXI002-Guys-0828-T2.nii.gz", "IXI012-HH-1211-T1.nii.gz")
    touch(tmp_path, "IXI025-Guys-0852-T1.nii.gz", "IXI219-IOP-0893-T1.nii.gz", "IXI328-Guys-0960-T1.nii.gz")
    touch(tmp_path, "PD/IXI002-Guys-0828-PD.nii.gz", "IXI002-Guys-0828-MRA.nii.gz")
    table(tmp_path / "IXI.csv", HEADER, *ROWS)
    return tmp_path


def biff(path: Path, rows: list[list[str | float]]) -> None:
    """The oldest .xls (BIFF2), which is a list of cells and so can be written here."""
    cells = [b"\x09\x00\x04\x00\x07\x00\x10\x00"]
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            place = struct.pack("<HH3x", i, j)
            text = value.encode() if isinstance(value, str) else b""
            body = place + (bytes([len(text)]) + text if isinstance(value, str) else struct.pack("<d", value))
            cells.append(struct.pack("<HH", 4 if isinstance(value, str) else 3, len(body)) + body)
    path.write_bytes(b"".join([*cells, b"\x0a\x00\x00\x00"]))


def test_images(root: Path) -> None:
    found = images("ixi", root)
    assert {(i.subject, i.modality, i.site) for i in found.values()} == {
        ("002", "T1", "Guys"), ("002", "T2", "Guys"), ("012", "T1", "HH"), ("025", "T1", "Guys"), ("219", "T1", "IOP"),
        ("328", "T1", "Guys"),
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["clean", "paper"])  # the first of repeated rows is never taken
def test_values(mode: Harmonise, root: Path) -> None:
    found, report = joined("ixi", root, mode)
    guys = found["T1/IXI002-Guys-0828-T1.nii.gz"].values
    assert (guys["age_years"], guys["sex"], guys["field_strength_t"], guys["diagnosis"]) == (35.8, "F", 1.5, "HC")
    assert guys["diagnosis_source"] == "cohort_default"
    assert found["IXI012-HH-1211-T1.nii.gz"].values["field_strength_t"] == 3.0
    ageless = found["IXI025-Guys-0852-T1.nii.gz"].values
    assert (ageless["sex"], ageless.get("age_years")) == ("F", None)
    for name, field_t in (("IXI219-IOP-0893-T1.nii.gz", 1.5), ("IXI328-Guys-0960-T1.nii.gz", 1.5)):
        unclear = found[name].values
        assert not {"age_years", "sex"} & set(unclear)  # two people: not even what they have in common
        assert unclear["field_strength_t"] == field_t
    assert any("219" in note and "disagree on sex" in note for note in report.notes)
    assert any("328" in note and "disagree on age_years" in note for note in report.notes)


def test_the_real_workbook_is_an_xls(root: Path) -> None:
    (root / "IXI.csv").unlink()
    biff(
        root / "IXI.xls",
        [["IXI_ID", BOOK, "AGE"], [2, 2, 35.8], [2, 0, 0], [12, 1, 38.78], [25, 2, 0], [219, 1, 30], [328, 1, 31]],
    )
    found = joined("ixi", root)[0]
    assert found["T1/IXI002-Guys-0828-T1.nii.gz"].values["age_years"] == 35.8
    assert [found[p].values["sex"] for p in sorted(found)] == ["M", "F", "M", "M", "F", "F"]


def test_a_workbook_whose_first_sheet_is_the_table(root: Path) -> None:
    (root / "IXI.csv").unlink()
    book = openpyxl.Workbook()
    book.active.title = "Table"
    for row in (["IXI_ID", BOOK, "AGE"], [2, 2, 35.8], [12, 1, 38.78], [25, 2, None], [219, 1, 30], [328, 1, 31]):
        book.active.append(row)
    book.create_sheet("Ethnicity").append(["ID", "ETHNIC"])
    book.save(root / "IXI.xlsx")
    assert joined("ixi", root)[0]["IXI012-HH-1211-T1.nii.gz"].values["age_years"] == 38.78


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (HEADER, "2,3,1,1,,,,,,,,30", "SEX_ID has the code '3'"),
        (HEADER.replace("1=m, 2=f", "1=f, 2=m"), "2,1,1,1,,,,,,,,30", "expected 'SEX_ID"),
        ("IXI_ID,SEX,AGE", "2,1,30", "expected 'SEX_ID"),
        (HEADER, "IXI002,1,1,1,,,,,,,,30", "IXI_ID is 'IXI002'"),
    ],
)
def test_what_is_not_known_is_refused(header: str, row: str, message: str, root: Path) -> None:
    table(root / "IXI.csv", header, row)
    with pytest.raises(G3nError, match=message):
        load_cohort("ixi").phenotypes(root, "clean")


def test_tables_of_other_people_are_refused(root: Path) -> None:
    table(root / "IXI.csv", HEADER, "600,1,1,1,,,,,,,,30")
    with pytest.raises(G3nError, match="only 0 of 6 images found a row"):
        joined("ixi", root)
