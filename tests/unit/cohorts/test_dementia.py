"""ADNI, PPMI, OASIS-1 and 2: made-up tables with their headers, codes and traps."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from data_prep.cohorts.ppmi import autonomic, depression
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

XML = """<?xml version="1.0"?><idaxs xmlns="http://ida.loni.usc.edu"><project xmlns="">
<subject><subjectIdentifier>002_S_0001</subjectIdentifier><researchGroup>MCI</researchGroup><subjectSex>F</subjectSex>
<subjectInfo item="APOE A1">3</subjectInfo><subjectInfo item="APOE A2">4</subjectInfo>
<study><subjectAge>75.3</subjectAge><series><dateAcquired>2010-05-04</dateAcquired>
<protocolTerm><protocol term="Manufacturer">SIEMENS</protocol><protocol term="Field Strength">1.5</protocol></protocolTerm>
</series></study></subject></project></idaxs>"""


@pytest.fixture
def adni(tmp_path: Path) -> Path:
    base = "ADNI/002_S_0001"
    touch(
        tmp_path,
        f"{base}/MPRAGE/2010-05-04_10_00_00.0/S10/ADNI_002_S_0001_MR_MPRAGE_Br_2010_S10_I11.nii",
        f"{base}/MT1__GradWarp__N3m/2010-05-04_10_00_00.0/S10/ADNI_002_S_0001_MR_MT1_Br_2010_S10_I12.nii",
        f"{base}/MPRAGE/2012-06-01_10_00_00.0/S20/ADNI_002_S_0001_MR_MPRAGE_Br_2012_S20_I21.nii",
    )
    (tmp_path / "ADNI_002_S_0001_MPRAGE_S10_I11.xml").write_text(XML)
    table(tmp_path / "PTDEMOG_01Jan2026.csv", "PTID,PTGENDER,PTHAND,PTEDUCAT", "002_S_0001,2,1,16")
    visits = [
        "002_S_0001,bl,,2010-05-20,27",
        "002_S_0001,m06,2010-12-01,2010-12-01,-1",
        "002_S_0001,m24,2012-06-10,,19",
    ]
    table(tmp_path / "MMSE_01Jan2026.csv", "PTID,VISCODE,VISDATE,EXAMDATE,MMSCORE", *visits)
    table(tmp_path / "MMSE_01Jan2020.csv", "PTID,VISCODE,VISDATE,EXAMDATE,MMSCORE", "002_S_0001,bl,,2010-05-20,1")
    diagnoses = ["002_S_0001,bl,2010-05-20,2", "002_S_0001,m24,2012-06-10,3"]
    table(tmp_path / "DXSUM_01Jan2026.csv", "PTID,VISCODE,EXAMDATE,DIAGNOSIS", *diagnoses)
    return tmp_path


def test_adni(adni: Path) -> None:
    assert {Path(p).name[-7:] for p in images("adni", adni)} == {"I21.nii", "I12.nii"}
    found, _ = joined("adni", adni)
    first, later = sorted(found.values(), key=lambda j: str(j.image.date))
    assert first.values["diagnosis"] == "MCI"
    assert later.values["diagnosis"] == "AD"  # a converter: not the label of enrolment
    assert (first.values["mmse"], later.values["mmse"]) == (27, 19)
    assert (first.delay_days, later.delay_days) == (16, 9)
    assert (first.values["sex"], first.values["apoe_e4_count"], first.values["education_years"]) == ("F", 1, 16)
    assert (first.values["age_years"], first.values["field_strength_t"], first.values["manufacturer"]) == (
        75.3,
        1.5,
        "SIEMENS",
    )
    assert "age_years" not in later.values
    paper, _ = joined("adni", adni, "paper")
    assert {j.values["diagnosis"] for j in paper.values()} == {"MCI"}


def test_adni_refuses_what_it_does_not_know(adni: Path) -> None:
    table(adni / "DXSUM_02Jan2026.csv", "PTID,VISCODE,EXAMDATE,DIAGNOSIS", "002_S_0001,bl,2010-05-20,7")
    with pytest.raises(G3nError, match="DXSUM DIAGNOSIS has the code '7'"):
        load_cohort("adni").phenotypes(adni, "clean")
    (adni / "DXSUM_02Jan2026.csv").unlink()
    (adni / "ADNI_x.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    with pytest.raises(G3nError, match="not one of the archive's descriptions"):
        load_cohort("adni").phenotypes(adni, "clean")


def test_adni_merge_gives_the_age_at_the_visit(adni: Path) -> None:
    for path in adni.glob("*.xml"):
        path.unlink()
    header = "PTID,VISCODE,EXAMDATE,DX_bl,DX,AGE,Years_bl,PTGENDER,APOE4,MMSE,CDRSB"
    row = "002_S_0001,m24,2012-06-02,LMCI,Dementia,75.0,2.1,Female,1,20,4.5"
    table(adni / "ADNIMERGE_01Jan2026.csv", header, row)
    later = max(joined("adni", adni)[0].values(), key=lambda j: str(j.image.date)).values
    assert (later["age_years"], later["cdr_sb"], later["apoe_e4_count"]) == (77.1, 4.5, 1)


@pytest.fixture
def ppmi(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        "PPMI/3001/SAG_T1_MPRAGE/2012-03-01_09_00_00.0/I100/a.nii.gz",
        "PPMI/3001/SAG_T1_MPRAGE/2012-03-01_09_00_00.0/I100/a_Eq_1.nii.gz",
        "PPMI/3001/AXIAL_T2_FLAIR/2012-03-01_09_00_00.0/I101/a.nii.gz",
        "PPMI/3001/12345/MPRAGE/2014-03-01_09_00_00.0/I200/a.nii.gz",
        "PPMI/3001/DTI_gated_T1/2012-03-01_09_00_00.0/I102/a.nii.gz",
        "PPMI/3002/T2_TSE/2013-03-01_09_00_00.0/I300/a.nii.gz",
    )
    status = ["3001,1,Parkinson's Disease,61.5,03/2012", "3002,2,Healthy Control,50,02/2013"]
    table(tmp_path / "Participant_Status_1.csv", "PATNO,COHORT,COHORT_DEFINITION,ENROLL_AGE,ENROLL_DATE", *status)
    table(tmp_path / "Demographics_1.csv", "PATNO,SEX,HANDED,BIRTHDT", "3001,0,2,09/1950", "3002,1,1,01/1963")
    header = "PATNO,EVENT_ID,INFODT,PAG_NAME,NP3TOT,PDSTATE,NHY"
    motor = ["3001,BL,03/2012,NUPDRS3,20,,2", "3001,V06,03/2014,NUPDR3ON,25,ON,2", "3001,V06,03/2014,NUPDR3OF,38,OFF,2"]
    table(tmp_path / "MDS-UPDRS_Part_III_1.csv", header, *motor, "3002,BL,02/2013,NUPDRS3,101,,0")
    moca = ["3001,SC,01/2012,28", "3001,V06,04/2014,22"]
    table(tmp_path / "Montreal_Cognitive_Assessment__MoCA__1.csv", "PATNO,EVENT_ID,INFODT,MCATOT", *moca)
    return tmp_path


def test_ppmi(ppmi: Path) -> None:
    found = {(j.image.subject, j.image.session, j.image.modality): j for j in joined("ppmi", ppmi)[0].values()}
    assert set(found) == {
        ("3001", "20120301", "T1"), ("3001", "20120301", "FLAIR"), ("3001", "20140301", "T1"), ("3002", "20130301", "T2")
    }  # fmt: skip
    first, later = found["3001", "20120301", "T1"].values, found["3001", "20140301", "T1"].values
    assert (first["sex"], first["handedness"], first["diagnosis"]) == ("F", "L", "PD")
    assert (first["age_years"], later["age_years"]) == (pytest.approx(61.5, abs=0.01), pytest.approx(63.5, abs=0.01))
    assert (first["mds_updrs_iii"], first["updrs_state"]) == (20, "UNTREATED")
    assert (later["mds_updrs_iii"], later["updrs_state"]) == (38, "OFF")
    assert (first["moca"], later["moca"]) == (28, 22)
    assert "site" not in first
    control = found["3002", "20130301", "T2"].values
    assert (control["sex"], control["diagnosis"]) == ("M", "HC")
    assert "mds_updrs_iii" not in control
    paper = {j.image.session: j.values for j in joined("ppmi", ppmi, "paper")[0].values()}["20140301"]
    assert (paper["age_years"], paper["mds_updrs_iii"]) == (61.5, 20)


def test_ppmi_scores() -> None:
    scopa = {f"SCAU{i}": "1" for i in range(1, 26)} | {"SCAU23A": "9", "SCAU26A": "1"}
    assert autonomic(scopa) == 25
    assert autonomic(scopa | {"SCAU8": "9", "SCAU22": "9"}) == 25 + 2 - 1
    assert autonomic(scopa | {"SCAU5": ""}) is None
    names = ["GDSSATIS", "GDSDROPD", "GDSEMPTY", "GDSBORED", "GDSGSPIR", "GDSAFRAD", "GDSHAPPY", "GDSHLPLS", "GDSHOME"]
    names += ["GDSMEMRY", "GDSALIVE", "GDSWRTLS", "GDSENRGY", "GDSHOPLS", "GDSBETER"]
    assert depression(dict.fromkeys(names, "0")) == 5
    assert depression(dict.fromkeys(names, "1")) == 10
    assert depression(dict.fromkeys(names[:14], "1")) is None


def test_oasis1(tmp_path: Path) -> None:
    base = "disc1/OAS1_0001_MR1/PROCESSED/MPRAGE/T88_111/OAS1_0001_MR1_mpr"
    touch(tmp_path, f"{base}_n4_anon_111_t88_gfc.hdr", f"{base}_n4_anon_111_t88_gfc.img")
    touch(
        tmp_path, f"{base}_n4_anon_111_t88_masked_gfc.hdr", "disc1/OAS1_0001_MR1/FSL_SEG/OAS1_0001_MR1_mpr_n4_fseg.hdr"
    )
    for subject, n in (("0002_MR1", 3), ("0002_MR2", 6), ("0003_MR1", 4)):
        touch(tmp_path, f"disc2/OAS1_{subject}/PROCESSED/MPRAGE/T88_111/OAS1_{subject}_mpr_n{n}_anon_111_t88_gfc.hdr")
    header = "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR,eTIV,nWBV,ASF,Delay"
    rows = ["OAS1_0001_MR1,F,R,74,2,3,29,0.5,1344,0.743,1.306,N/A", "OAS1_0002_MR1,M,R,22,,,,,1500,0.8,1.1,N/A"]
    rows += ["OAS1_0002_MR2,M,R,22,,,,,1500,0.8,1.1,40", "OAS1_0003_MR1,F,R,80,1,4,17,1,1300,0.7,1.3,N/A"]
    table(tmp_path / "oasis_cross-sectional.csv", header, *rows)
    found = {(j.image.subject, j.image.session): j for j in joined("oasis1", tmp_path)[0].values()}
    assert set(found) == {("OAS1_0001", "1"), ("OAS1_0002", "1"), ("OAS1_0002", "2"), ("OAS1_0003", "1")}
    assert [found["OAS1_000" + s, v].values["diagnosis"] for s, v in ("11", "21", "31")] == ["MCI", "HC", "AD"]
    young = found["OAS1_0002", "1"]
    assert young.values["diagnosis_source"] == "cohort_default"
    assert "cdr_global" not in young.values  # stays out of the dementia task
    assert "education_years" not in found["OAS1_0001", "1"].values  # an ordinal code here
    assert young.group == found["OAS1_0002", "2"].group
    assert load_cohort("oasis1").plan(young.image).spacing_mm == (1, 1, 1)


def test_oasis2(tmp_path: Path) -> None:
    for visit in (1, 3):
        touch(tmp_path, *(f"OAS2_RAW_PART1/OAS2_0001_MR{visit}/RAW/mpr-{k}.nifti.hdr" for k in (1, 2)))
    header = "Subject ID,MRI ID,Group,Visit,MR Delay,M/F,Hand,Age,EDUC,SES,MMSE,CDR,eTIV,nWBV,ASF"
    rows = ["OAS2_0001,OAS2_0001_MR1,Converted,1,0,M,R,87,14,2,27,0,1987,0.696,0.883"]
    rows += ["OAS2_0001,OAS2_0001_MR3,Converted,3,457,M,R,88,14,2,30,0.5,2004,0.681,0.876"]
    table(tmp_path / "oasis_longitudinal.csv", header, *rows)
    found = list(joined("oasis2", tmp_path)[0].values())
    assert [j.image.session for j in found] == ["1", "3"]
    assert [j.values["diagnosis"] for j in found] == ["HC", "MCI"]
    assert [j.values["days_from_baseline"] for j in found] == [0, 457]
    assert found[0].values["education_years"] == 14
    assert [j.values["diagnosis"] for j in joined("oasis2", tmp_path, "paper")[0].values()] == ["MCI", "MCI"]
    plan = load_cohort("oasis2").plan(found[0].image)
    assert (plan.axes, plan.spacing_mm) == ((2, 0, 1), (1.25, 1, 1))
