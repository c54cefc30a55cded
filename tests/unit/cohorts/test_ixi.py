"""IXI: sex code in the column's name, zeros for missing, repeated and contradicting rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

HEADER = 'IXI_ID,"SEX_ID (1=m, 2=f)",HEIGHT,WEIGHT,DOB,STUDY_DATE,AGE'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(tmp_path, "T1/IXI002-Guys-0828-T1.nii.gz", "T2/IXI002-Guys-0828-T2.nii.gz", "IXI012-HH-1211-T1.nii.gz")
    touch(tmp_path, "IXI219-IOP-0893-T1.nii.gz", "PD/IXI002-Guys-0828-PD.nii.gz", "IXI002-Guys-0828-MRA.nii.gz")
    rows = ["2,2,164,58,1970-01-01,2005-11-18,35.80", "2,0,0,0,,,0", "12,1,175,70,,2005-08-01,38.78"]
    rows += ["219,1,0,0,,,60.5", "219,2,0,0,,,25.25"]
    table(tmp_path / "IXI.csv", HEADER, *rows)
    return tmp_path


def test_images(root: Path) -> None:
    found = images("ixi", root)
    assert {(i.subject, i.modality, i.site) for i in found.values()} == {
        ("002", "T1", "Guys"), ("002", "T2", "Guys"), ("012", "T1", "HH"), ("219", "T1", "IOP")
    }  # fmt: skip


def test_values(root: Path) -> None:
    found, report = joined("ixi", root)
    guys = found["T1/IXI002-Guys-0828-T1.nii.gz"].values
    assert (guys["age_years"], guys["sex"], guys["field_strength_t"], guys["diagnosis"]) == (35.8, "F", 1.5, "HC")
    assert found["IXI012-HH-1211-T1.nii.gz"].values["field_strength_t"] == 3.0
    unclear = found["IXI219-IOP-0893-T1.nii.gz"].values
    assert not {"age_years", "sex"} & set(unclear)
    assert any("219" in note and "disagree on sex" in note for note in report.notes)


def test_a_new_code_is_refused(root: Path) -> None:
    table(root / "IXI.csv", HEADER, "2,3,1,1,,,30")
    with pytest.raises(G3nError, match="SEX_ID has the code '3'"):
        load_cohort("ixi").phenotypes(root, "clean")


def test_tables_of_other_people_are_refused(root: Path) -> None:
    table(root / "IXI.csv", HEADER, "600,1,1,1,,,30")
    with pytest.raises(G3nError, match="only 0 of 4 images found a row"):
        joined("ixi", root)
