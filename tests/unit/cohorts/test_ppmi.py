"""PPMI: on and off medication, 101 for not rated, months for dates, totals from items, scores of the visit."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from data_prep.cohorts.contract import Harmonise
from data_prep.cohorts.scores import GDS_ITEMS, autonomic, autonomic_as_published, depression
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

STATUS = "PATNO,COHORT,COHORT_DEFINITION,ENROLL_AGE,ENROLL_DATE,ENROLL_STATUS"
MOTOR = "PATNO,EVENT_ID,PAG_NAME,INFODT,PDSTATE,NP3SPCH,NP3GAIT,NP3TOT,NHY"
SCOPA = [*(f"SCAU{i}" for i in range(1, 24)), "SCAU23A", "SCAU23AT", "SCAU24", "SCAU25", "SCAU26A", "SCAU26AT"]
SCOPA_OF_ONES = {name: "" if name.endswith("T") else "1" for name in SCOPA}
PEOPLE = ("3001", "3002", "3003", "3004", "100005")


@pytest.fixture
def ppmi(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        "PPMI/3001/SAG_T1_MPRAGE/2012-03-01_09_00_00.0/I100/a.nii.gz",
        "PPMI/3001/SAG_T1_MPRAGE/2012-03-01_09_00_00.0/I100/a_Eq_1.nii.gz",
        "PPMI/3001/SAG_T1_MPRAGE_repeat/2012-03-01_09_00_00.0/I103/a.nii.gz",
        "PPMI/3001/AXIAL_T2_FLAIR/2012-03-01_09_00_00.0/I101/a.nii.gz",
        "PPMI_2/PPMI/3001/12345/MPRAGE/2014-03-01_09_00_00.0/I200/a.nii.gz",
        "PPMI/3001/DTI_gated_T1/2012-03-01_09_00_00.0/I102/a.nii.gz",
        "PPMI/3002/T2_TSE/2013-03-01_09_00_00.0/I300/a.nii.gz",
        *(f"PPMI/{p}/MPRAGE/2013-03-01_09_00_00.0/I{p}/a.nii" for p in PEOPLE[2:]),
    )
    groups = ["Parkinson's Disease", "Healthy Control", "Prodromal", "SWEDD", "Early Imaging"]
    status = [f"{p},1,{group},61.5,03/2012,Enrolled" for p, group in zip(PEOPLE, groups, strict=True)]
    table(tmp_path / "Participant_Status_01Jan2026.csv", STATUS, *status)
    births = ["3001,0,2,09/1950", "3002,1,1,01/1963", "3003,1,3,01/1963", "3004,1,,01/1963", "100005,0,1,"]
    table(tmp_path / "Demographics_01Jan2026.csv", "PATNO,SEX,HANDED,BIRTHDT", *births)
    motor = ["3001,BL,NUPDRS3,03/2012,,1,1,20,2", "3002,BL,NUPDRS3,02/2013,,101,0,33,0"]
    motor += ["3001,V06,NUPDR3ON,03/2014,ON,1,1,25,2", "3001,V06,NUPDR3OF,03/2014,OFF,2,2,38,2"]
    table(tmp_path / "MDS-UPDRS_Part_III_01Jan2026.csv", MOTOR, *motor)
    moca = ["3001,SC,01/2012,28", "3001,V06,04/2014,22"]
    table(tmp_path / "Montreal_Cognitive_Assessment__MoCA__01Jan2026.csv", "PATNO,EVENT_ID,INFODT,MCATOT", *moca)
    return tmp_path


def values(root: Path, person: str = "3001", year: str = "2012", mode: Harmonise = "clean") -> dict[str, str | float]:
    of_person = [j for j in joined("ppmi", root, mode)[0].values() if j.image.subject == person]
    return next(j.values for j in of_person if j.image.session[:4] == year)


def test_images(ppmi: Path) -> None:
    found = [i for i in images("ppmi", ppmi).values() if i.subject in ("3001", "3002")]
    assert sorted((i.subject, i.session, i.modality, i.acq) for i in found) == [
        ("3001", "20120301", "FLAIR", "I101"), ("3001", "20120301", "T1", "I100"), ("3001", "20120301", "T1", "I103"),
        ("3001", "20140301", "T1", "I200"), ("3002", "20130301", "T2", "I300"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("desc", "modality"),
    [
        *((d, "T1") for d in ("SAG_FSPGR_BRAVO", "SAG_SPGR_3D", "T1-3D_TFE", "3D_T1_FFE", "mprage_grappa2")),
        *((d, "FLAIR") for d in ("3D_T2_FLAIR", "FLAIR_LongTR", "t2_flair_FSE")),
        *((d, "T2") for d in ("AX_T2_FSE", "DUAL_TSE_T2")),
        *((f"T1_{word}", None) for word in ("fMRI", "BOLD", "REST", "DTI", "DWI", "ASL", "LOC", "FIELD_MAP", "B0", "B1")),
        *((f"T1_{word}", None) for word in ("CALIBRATION", "SCOUT", "SETTER", "SCREEN_SAVE", "3_PLANE")),
        *((d, None) for d in ("2D_GRE-MT_T1", "2D_GRE-NM_T1", "2D_GRE_-_MT_T1", "T2_STAR", "GRE_T2*", "HeadScan", "PD")),
    ],
)  # fmt: skip
def test_series_by_description(desc: str, modality: str | None, tmp_path: Path) -> None:
    touch(tmp_path, f"PPMI/3001/{desc}/2012-03-01_09_00_00.0/I100/a.nii.gz")
    assert [i.modality for i in images("ppmi", tmp_path).values()] == ([modality] if modality else [])


def test_values_of_the_visit(ppmi: Path) -> None:
    first, later = values(ppmi), values(ppmi, year="2014")
    assert (first["sex"], first["handedness"], first["diagnosis"]) == ("F", "L", "PD")
    assert (first["age_years"], later["age_years"]) == (pytest.approx(61.5, abs=0.01), pytest.approx(63.5, abs=0.01))
    assert first["age_precision"] == "month"
    assert (first["mds_updrs_iii"], first["updrs_state"]) == (20, "UNTREATED")
    assert (later["mds_updrs_iii"], later["updrs_state"]) == (38, "OFF")
    assert (first["moca"], later["moca"]) == (28, 22)  # at screening, two months before the baseline
    assert "site" not in first  # it is not in PATNO
    control = values(ppmi, "3002", "2013")
    assert (control["sex"], control["diagnosis"], control["handedness"]) == ("M", "HC", "R")
    assert "mds_updrs_iii" not in control  # an item could not be rated


def test_groups(ppmi: Path) -> None:
    assert [values(ppmi, p, "2013")["diagnosis"] for p in PEOPLE[1:]] == ["HC", "PRODROMAL", "SWEDD", "PD"]
    assert values(ppmi, "3003", "2013")["handedness"] == "A"
    assert "age_years" not in values(ppmi, "100005", "2013")
    table(ppmi / "Participant_Status_02Jan2026.csv", STATUS, "3001,9,Relative,60,03/2012,Enrolled")
    with pytest.raises(G3nError, match="COHORT_DEFINITION has the code 'Relative'"):
        load_cohort("ppmi").phenotypes(ppmi, "clean")


@pytest.mark.parametrize(
    ("rows", "total", "state"),
    [
        (["BL,NUPDR3ON,03/2012,,1,1,25,2", "BL,NUPDR3OF,03/2012,,2,2,38,2"], 38, "OFF"),  # the page tells it
        (["BL,NUPDR3ON,03/2012,ON,1,1,25,2", "BL,NUPDRS3,03/2012,,2,2,18,2"], 18, "UNTREATED"),
        (["BL,NUPDRDOSE3,03/2012,,1,1,25,2", "BL,NUPDRDOSE3,03/2012,ON,2,2,30,2"], 30, "ON"),
        (["BL,NUPDRDOSE3,03/2012,,1,1,25,2"], 25, None),
        (["BL,NUPDR3OF,03/2012,OFF,1,101,138,2", "BL,NUPDR3ON,03/2012,ON,2,2,30,2"], 30, "ON"),
        (["BL,NUPDRS3,03/2012,,0,0,101,2"], None, None),
        (["SC,NUPDRS3,03/2012,,1,1,12,2", "BL,NUPDRS3,03/2012,,1,1,14,2"], None, "UNTREATED"),  # of one month: which?
        (["BL,NUPDRS3,08/2012,,1,1,14,2"], 14, "UNTREATED"),
        (["BL,NUPDRS3,10/2012,,1,1,14,2"], None, None),  # more than 180 days
    ],
)
def test_motor_examinations(rows: list[str], total: float | None, state: str | None, ppmi: Path) -> None:
    table(ppmi / "MDS-UPDRS_Part_III_02Jan2026.csv", MOTOR, *(f"3001,{row}" for row in rows))
    found = values(ppmi)
    assert (found.get("mds_updrs_iii"), found.get("updrs_state")) == (total, state)


@pytest.mark.parametrize(
    ("name", "header", "cells", "message"),
    [
        ("MDS-UPDRS_Part_III", MOTOR, "3001,BL,NUPDRS3,03/2012,DYSK,1,1,20,2", "PDSTATE has the code 'DYSK'"),
        ("MDS-UPDRS_Part_III", MOTOR, "3001,BL,NUPDRS9,03/2012,,1,1,20,2", "PAG_NAME has the code 'NUPDRS9'"),
        ("Demographics", "PATNO,SEX,HANDED,BIRTHDT", "3001,2,1,09/1950", "SEX has the code '2'"),
        ("Demographics", "PATNO,SEX,HANDED,BIRTHDT", "3001,1,1,Sept 1950", "BIRTHDT is 'Sept 1950'"),
        ("Demographics", "PATNO,SEX,HANDED", "3001,1,1", "lacks the column BIRTHDT"),
        ("SCOPA-AUT", "PATNO,EVENT_ID,INFODT,SCAU1", "3001,BL,03/2012,1", "lacks the column SCAU2"),
        ("Geriatric_Depression_Scale", "PATNO,EVENT_ID,INFODT,GDSTOT", "3001,BL,03/2012,1", "lacks the column GDSSATIS"),
        ("iu_genetic_consensus", "PATNO,APOE", "3001,E3/?", "genotype 'E3/"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused(name: str, header: str, cells: str, message: str, ppmi: Path) -> None:
    table(ppmi / f"{name}_02Jan2026.csv", header, cells)
    with pytest.raises(G3nError, match=message):
        load_cohort("ppmi").phenotypes(ppmi, "clean")


def test_school_and_genes_hold_for_every_scan(ppmi: Path) -> None:
    table(ppmi / "Socio-Economics_01Jan2026.csv", "PATNO,EVENT_ID,INFODT,EDUCYRS", "3001,SC,01/2012,16")
    table(ppmi / "iu_genetic_consensus_01Jan2026.csv", "PATNO,APOE,LRRK2", "3001,E4/E4,0", "3002,E3/E2,0", "3003,,0")
    later = values(ppmi, year="2014")
    assert (later["education_years"], later["apoe_e4_count"]) == (16, 2)
    assert values(ppmi, "3002", "2013")["apoe_e4_count"] == 0
    assert "apoe_e4_count" not in values(ppmi, "3003", "2013")


def test_paper_mode_repeats_the_baseline(ppmi: Path) -> None:
    answers = ",".join(SCOPA_OF_ONES.values())
    visits = [f"3001,SC,01/2012,{answers.replace('1', '2', 1)}", f"3001,BL,03/2012,{answers}"]
    table(ppmi / "SCOPA-AUT_01Jan2026.csv", f"PATNO,EVENT_ID,INFODT,{','.join(SCOPA_OF_ONES)}", *visits)
    later = values(ppmi, year="2014", mode="paper")
    assert (later["age_years"], later["age_precision"], later["mds_updrs_iii"]) == (61.5, "exact", 20)
    assert later["moca"] == 28  # none at BL: the earliest
    assert later["scopa_aut"] == 27  # of BL, not of SC; 23A and 26A too
    assert values(ppmi)["scopa_aut"] == 25
    assert (later["site"], values(ppmi, "100005", "2013", "paper")["site"]) == ("30", "10")


def test_autonomic_score() -> None:
    assert autonomic(SCOPA_OF_ONES) == 25
    assert autonomic(SCOPA_OF_ONES | {"SCAU23A": "9", "SCAU26A": "9"}) == 25
    assert autonomic(SCOPA_OF_ONES | dict.fromkeys(("SCAU8", "SCAU13"), "9")) == 25 + 2 * 2
    assert autonomic(SCOPA_OF_ONES | dict.fromkeys(("SCAU22", "SCAU25"), "9")) == 25 - 2
    assert autonomic(SCOPA_OF_ONES | {"SCAU24": "", "SCAU25": ""}) == 23  # a man
    assert autonomic(SCOPA_OF_ONES | dict.fromkeys(("SCAU22", "SCAU23", "SCAU24", "SCAU25"), "")) is None
    assert autonomic(SCOPA_OF_ONES | {"SCAU5": ""}) is None
    with pytest.raises(G3nError, match="SCAU7 has the code '9'"):
        autonomic(SCOPA_OF_ONES | {"SCAU7": "9"})
    assert autonomic_as_published(SCOPA_OF_ONES) == 27
    assert autonomic_as_published(dict.fromkeys(SCOPA[:9], "1")) is None


def test_depression_score() -> None:
    assert len(GDS_ITEMS) == 15
    assert depression(dict.fromkeys(GDS_ITEMS, "0")) == 5
    assert depression(dict.fromkeys(GDS_ITEMS, "1") | {"GDSTOT": "99"}) == 10
    happy = {
        name: "1" if name in ("GDSSATIS", "GDSGSPIR", "GDSHAPPY", "GDSALIVE", "GDSENRGY") else "0" for name in GDS_ITEMS
    }
    assert depression(happy) == 0
    assert depression(happy | {"GDSHOME": "1"}) == 1
    assert depression(happy | {"GDSHOME": ""}) is None
    with pytest.raises(G3nError, match="GDSHOME has the code '2'"):
        depression(happy | {"GDSHOME": "2"})
