"""OASIS-1 and 2: a code that is not years, the unrated young, repeated visits, numbers of visits that skip."""

from __future__ import annotations

from pathlib import Path

import openpyxl
import pytest

from data_prep.cohort_scan import scan_cohort
from data_prep.cohorts import load_cohort
from data_prep.manifest import read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

ONE = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay"
ONE_ROWS = [
    "OAS1_0001_MR1,F,R,74,2,3,29,0.5,1344,0.743,1.306,N/A", "OAS1_0002_MR1,M,R,22,,,,,1500,0.8,1.1,N/A",
    "OAS1_0002_MR2,M,R,22,,,,,1500,0.8,1.1,40", "OAS1_0003_MR1,F,R,80,1,4,17,1,1300,0.7,1.3,N/A",
    "OAS1_0004_MR1,F,L,80,5,1,10,2,1300,0.7,1.3,N/A", "OAS1_0005_MR1,F,R,70,4,2,30,0,1300,0.7,1.3,N/A",
]  # fmt: skip
TWO = "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF"
TWO_ROWS = [
    "OAS2_0001,OAS2_0001_MR1,Converted,1,0,M,R,87,14,2,27,0,1987,0.696,0.883",
    "OAS2_0001,OAS2_0001_MR3,Converted,2,457,M,R,88,14,2,30,0.5,2004,0.681,0.876",
    "OAS2_0002,OAS2_0002_MR1,Nondemented,1,0,F,R,70,12,,,0.5,1987,0.696,0.883",
    "OAS2_0003,OAS2_0003_MR1,Demented,1,0,F,R,70,20,1,20,1,1987,0.696,0.883",
]


def sheet(path: Path, header: str, rows: list[str]) -> None:
    """Numbers as numbers, as in the real workbooks."""
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append([float(v) if v.replace(".", "").isdigit() else v or None for v in row.split(",")])
    book.save(path)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    for subject, n in (
        ("0001_MR1", 4),
        ("0002_MR1", 3),
        ("0002_MR2", 6),
        ("0003_MR1", 4),
        ("0004_MR1", 4),
        ("0005_MR1", 4),
    ):
        base = f"disc1/OAS1_{subject}/PROCESSED/MPRAGE/T88_111/OAS1_{subject}_mpr_n{n}_anon_111_t88"
        touch(tmp_path, f"{base}_gfc.hdr", f"{base}_gfc.img", f"{base}_masked_gfc.hdr", f"{base}_masked_gfc.img")
        touch(tmp_path, f"disc1/OAS1_{subject}/FSL_SEG/OAS1_{subject}_mpr_n{n}_anon_111_t88_masked_gfc_fseg.hdr")
        touch(tmp_path, f"disc1/OAS1_{subject}/RAW/OAS1_{subject}_mpr-1_anon.hdr")
    table(tmp_path / "oasis_cross-sectional.csv", ONE, *ONE_ROWS)
    return tmp_path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for visit in ("0001_MR1", "0001_MR3", "0002_MR1", "0003_MR1"):
        touch(tmp_path, *(f"OAS2_RAW_PART1/OAS2_{visit}/RAW/mpr-{k}.nifti.{e}" for k in (1, 2) for e in ("hdr", "img")))
    table(tmp_path / "oasis_longitudinal.csv", TWO, *TWO_ROWS)
    return tmp_path


def test_oasis1_images(one: Path) -> None:
    found = images("oasis1", one).values()
    names = {(i.subject[-1], i.session, Path(i.path).name[14:]) for i in found}
    assert ("2", "2", "mpr_n6_anon_111_t88_gfc.hdr") in names
    assert len(found) == 6  # header and image are one; not masked, not segmented, not raw
    plan = load_cohort("oasis1").plan(next(iter(found)))
    assert (plan.space, plan.axes, plan.spacing_mm) == ("t88", (0, 1, 2), (1, 1, 1))


def test_oasis1_values(one: Path) -> None:
    found = {(j.image.subject[-1], j.image.session): j for j in joined("oasis1", one)[0].values()}
    diagnoses = [found[i, "1"].values["diagnosis"] for i in "12345"]
    assert diagnoses == ["MCI", "HC", "AD", "AD", "HC"]
    young = found["2", "1"]
    assert (young.values["diagnosis_source"], found["5", "1"].values["diagnosis_source"]) == ("cohort_default", "visit")
    assert not {"cdr_global", "mmse"} & set(young.values)  # stays out of the dementia task
    assert [found[i, "1"].values["cdr_global"] for i in "1345"] == [0.5, 1, 2, 0]
    assert not any("education_years" in j.values for j in found.values())  # Educ is an ordinal code here
    assert young.group == found["2", "2"].group == "oasis1:OAS1_0002"
    assert (found["4", "1"].values["handedness"], found["4", "1"].values["age_precision"]) == ("L", "year")


def test_oasis1_delay_is_that_of_the_second_scan(one: Path) -> None:
    scan_cohort(one, "oasis1", one / "m.tsv", "clean", Shares(0.2, 0.2, 0))
    scans = [s for s in read_manifest(one / "m.tsv").scans if s.subject == "OAS10002"]
    assert [(s.session, s.days_from_baseline) for s in scans] == [("1", 0), ("2", 40)]
    assert len({s.split for s in scans}) == 1


def test_oasis1_paper_mode(one: Path) -> None:
    found = {j.image.subject[-1]: j.values for j in joined("oasis1", one, "paper")[0].values()}
    assert (found["2"]["diagnosis"], found["2"]["diagnosis_source"]) == ("HC", "visit")
    assert [found[i].get("education_years") for i in "12345"] == [2, None, 1, 5, 4]  # the code, as if years


def test_oasis1_workbook(one: Path) -> None:
    (one / "oasis_cross-sectional.csv").unlink()
    sheet(one / "oasis_cross-sectional-5708aa0a98d82080.xlsx", ONE, ONE_ROWS)
    found = {(j.image.subject[-1], j.image.session): j.values for j in joined("oasis1", one)[0].values()}
    assert (found["1", "1"]["age_years"], found["1", "1"]["cdr_global"], found["1", "1"]["diagnosis"]) == (
        74,
        0.5,
        "MCI",
    )
    assert found["2", "2"]["days_from_baseline"] == 40


@pytest.mark.parametrize(
    ("name", "file", "header", "row", "message"),
    [
        ("oasis1", "oasis_cross-sectional", ONE, ONE_ROWS[0].replace(",0.5,", ",0.25,"), "CDR has the code '0.25'"),
        ("oasis1", "oasis_cross-sectional", ONE.replace("CDR", "cdr"), ONE_ROWS[0], "lacks the column CDR"),
        (
            "oasis2",
            "oasis_longitudinal",
            TWO,
            TWO_ROWS[0].replace("Converted", "Unsure"),
            "Group has the code 'Unsure'",
        ),
        ("oasis2", "oasis_longitudinal", TWO, TWO_ROWS[1].replace(",0.5,", ",4,"), "CDR has the code '4'"),
        ("oasis2", "oasis_longitudinal", TWO, TWO_ROWS[1].replace(",M,", ",1,"), "M/F has the code '1'"),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, file: str, header: str, row: str, message: str, tmp_path: Path
) -> None:
    table(tmp_path / f"{file}.csv", header, row)
    with pytest.raises(G3nError, match=message):
        load_cohort(name).phenotypes(tmp_path, "clean")


def test_oasis2(two: Path) -> None:
    found = list(joined("oasis2", two)[0].values())
    assert [(j.image.subject[-1], j.image.session, j.image.path[-16:]) for j in found] == [
        ("1", "1", "/mpr-1.nifti.hdr"), ("1", "3", "/mpr-1.nifti.hdr"), ("2", "1", "/mpr-1.nifti.hdr"),
        ("3", "1", "/mpr-1.nifti.hdr"),
    ]  # fmt: skip
    assert [j.values["diagnosis"] for j in found] == ["HC", "MCI", "MCI", "AD"]  # by the CDR of the visit
    details = [j.values["diagnosis_detail"] for j in found]
    assert details == ["Converted", "Converted", "Nondemented", "Demented"]
    assert {j.values["diagnosis_source"] for j in found} == {"visit"}
    assert [j.values["days_from_baseline"] for j in found[:2]] == [0, 457]  # MR3 is the second visit
    assert [j.values["education_years"] for j in found] == [14, 14, 12, 20]  # years here
    assert "mmse" not in found[2].values
    assert found[0].group == found[1].group
    plan = load_cohort("oasis2").plan(found[0].image)
    assert (plan.axes, plan.spacing_mm) == ((2, 0, 1), (1.25, 1, 1))


def test_oasis2_paper_mode(two: Path) -> None:
    found = joined("oasis2", two, "paper")[0].values()
    assert [j.values["diagnosis"] for j in found] == ["MCI", "MCI", "HC", "AD"]
    assert {j.values["diagnosis_source"] for j in found} == {"baseline"}


def test_oasis2_workbook(two: Path) -> None:
    (two / "oasis_longitudinal.csv").unlink()
    sheet(two / "oasis_longitudinal_demographics-8d83e569fa2e2d30.xlsx", TWO, TWO_ROWS)
    found = list(joined("oasis2", two)[0].values())
    assert [j.values["diagnosis"] for j in found] == ["HC", "MCI", "MCI", "AD"]
    assert (found[1].values["days_from_baseline"], found[1].values["mmse"]) == (457, 30)
