"""HCP and GSP: binned ages, families, visits in ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohort_scan import scan_cohort
from data_prep.cohorts import load_cohort
from data_prep.manifest import read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

OPEN = "Subject,Release,Acquisition,Gender,Age,T1_Count,T2_Count,QC_Issue,MMSE_Score,CogTotalComp_Unadj,PMAT24_A_CR"
CLOSED = "Subject,Age_in_Yrs,Family_ID,Mother_ID,Father_ID,ZygosityGT,Handedness,SSAGA_Educ"
BINS = {"100206": ("26-30", 28), "100307": ("22-25", 23.5), "100408": ("31-35", 33), "100610": ("36+", 37)}


@pytest.fixture
def hcp(tmp_path: Path) -> Path:
    for subject in BINS:
        touch(tmp_path, *(f"{subject}/T1w/{m}_acpc_dc_restore_brain.nii.gz" for m in ("T1w", "T2w")))
        touch(tmp_path, f"{subject}/T1w/T1w_acpc_dc_restore.nii.gz", f"{subject}/MNINonLinear/T1w_restore_brain.nii.gz")
    rows = [f"{s},S900,Q06,{'FM'[i % 2]},{age},1,1,,29,110.1,20" for i, (s, (age, _)) in enumerate(BINS.items())]
    table(tmp_path / "unrestricted_x_1_2_2020.csv", OPEN, *rows)
    return tmp_path


def restrict(root: Path) -> None:
    rows = ["100206,27,52_81,52,81,MZ,-95,14", "100307,24,52_81,52,81,MZ,60,16", "100408,31,,77,12,,40,11"]
    table(root / "RESTRICTED_x_1_2_2020.csv", CLOSED, *rows, "100610,41,,77,13,,-40,17")


def test_hcp_ages_are_bins(hcp: Path) -> None:
    found = {(j.image.subject, j.image.modality): j for j in joined("hcp_ya", hcp)[0].values()}
    assert len(found) == 8
    assert {s: found[s, "T2"].values["age_years"] for s in BINS} == {s: age for s, (_, age) in BINS.items()}
    values = found["100206", "T2"].values
    assert (values["age_precision"], values["sex"], values["mmse"], values["diagnosis"]) == ("bin5", "F", 29, "HC")
    assert found["100206", "T1"].group != found["100307", "T1"].group
    assert {j.image.space for j in found.values()} == {"native_stripped"}


def test_hcp_without_families_warns(hcp: Path) -> None:
    assert "relatives take part and no table tells who" in joined("hcp_ya", hcp)[1].warnings[0]
    restrict(hcp)
    assert joined("hcp_ya", hcp)[1].warnings == []


def test_hcp_families_share_a_group_and_a_split(hcp: Path) -> None:
    restrict(hcp)
    found = {j.image.subject: j for j in joined("hcp_ya", hcp)[0].values()}
    assert found["100206"].group == found["100307"].group == "hcp_ya:family:52_81"
    assert found["100408"].group == found["100610"].group == "hcp_ya:family:77"  # by the mother, where there is no more
    hands = [(found[s].values["handedness"], found[s].values["education_years"]) for s in BINS]
    assert hands == [("L", 14), ("R", 16), ("A", 11), ("A", 17)]
    assert next((j.values["age_years"], j.values["age_precision"]) for j in found.values()) == (27, "year")
    for seed in range(6):
        scan_cohort(hcp, "hcp_ya", hcp / "m.tsv", "clean", Shares(0.3, 0.3, seed))
        splits = {s.subject: s.split for s in read_manifest(hcp / "m.tsv").scans}
        assert (splits["100206"], splits["100408"]) == (splits["100307"], splits["100610"])


def test_hcp_paper_mode_takes_the_middle_of_a_bin_as_exact(hcp: Path) -> None:
    restrict(hcp)
    found = {j.image.subject: j for j in joined("hcp_ya", hcp, "paper")[0].values()}
    assert {s: j.values["age_years"] for s, j in found.items()} == {s: age for s, (_, age) in BINS.items()}
    assert {j.values["age_precision"] for j in found.values()} == {"exact"}
    assert found["100206"].group == found["100307"].group


@pytest.mark.parametrize(
    ("issue", "detail"), [("A", "focal anomaly"), ("C, A", "focal anomaly"), ("B", None), ("", None)]
)
def test_hcp_focal_anomalies_are_named(issue: str, detail: str | None, hcp: Path) -> None:
    rows = [f'{s},S900,Q06,F,26-30,1,1,"{issue}",29,110.1,20' for s in BINS]
    table(hcp / "unrestricted_x_1_2_2020.csv", OPEN, *rows)
    assert {j.values.get("diagnosis_detail") for j in joined("hcp_ya", hcp)[0].values()} == {detail}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("100206,S900,Q06,F,40-45,1,1,,29,110.1,20", "Age is '40-45'"),
        ("100206,S900,Q06,2,26-30,1,1,,29,110.1,20", "Gender has the code '2'"),
        ("100206,S900,Q06,F,26-30,1,1,Q,29,110.1,20", "QC_Issue is 'Q'"),
    ],
)
def test_hcp_refuses_what_it_does_not_know(row: str, message: str, hcp: Path) -> None:
    table(hcp / "unrestricted_x_1_2_2020.csv", OPEN, row)
    with pytest.raises(G3nError, match=message):
        load_cohort("hcp_ya").phenotypes(hcp, "clean")


def test_hcp_balsa_export(hcp: Path) -> None:
    (hcp / "unrestricted_x_1_2_2020.csv").rename(hcp / "HCP_YA_subjects_2025_01_01.csv")
    assert len(joined("hcp_ya", hcp)[0]) == 8


GSP = "Subject_ID,Sex,Age_Bin,Hand,Educ,Race_Ethn,Scanner,Console,EstIQ_Ship_Bin"


@pytest.fixture
def gsp(tmp_path: Path) -> Path:
    touch(
        tmp_path,
        *(f"pipeline/sub-{s}/anatomical_brain/x.nii.gz" for s in ("0001_ses-01", "0002_ses-01", "0002_ses-02")),
    )
    touch(tmp_path, "pipeline/sub-0001_ses-01/functional/x.nii.gz", "Sub0003_Ses1/anat/NIfTI/Sub0003_Ses1_T1.nii.gz")
    touch(tmp_path, "Sub0003_Ses1/func/NIfTI/Sub0003_Ses1_Rest.nii.gz")
    rows = ["Sub0001_Ses1,F,22,RHT,15,W_NOT_HL,BAY3,TrioTimB17,110", "Sub0002_Ses1,M,24,RHT,15,,,,NaN"]
    table(tmp_path / "GSP_list_140630.csv", GSP, *rows, "Sub0003,F,NaN,LFT,15,,,,")
    table(
        tmp_path / "GSP_retest_140630.csv", "Subject_ID,Sex,Age_Bin,Delay", "Sub0002_Ses1,M,24,", "Sub0002_Ses2,M,26,70"
    )
    return tmp_path


def test_gsp(gsp: Path) -> None:
    found = {(j.image.subject, j.image.session): j for j in joined("gsp", gsp)[0].values()}
    assert set(found) == {("0001", "1"), ("0002", "1"), ("0002", "2"), ("0003", "1")}
    first = found["0001", "1"].values  # Sub0001_Ses1 is sub-0001_ses-01
    assert (first["age_years"], first["age_precision"], first["sex"], first["diagnosis"]) == (22, "bin2", "F", "HC")
    assert [found["0002", s].values["age_years"] for s in "12"] == [24, 26]
    assert "age_years" not in found["0003", "1"].values
    sessions = {(r.subject, r.session) for r in load_cohort("gsp").phenotypes(gsp, "clean")}
    assert ("0003", "1") in sessions
    spaces = [found[s, "1"].image.space for s in ("0001", "0003")]
    assert spaces == ["native_stripped", "native_defaced"]
    assert found["0002", "1"].group == found["0002", "2"].group


def test_gsp_sex_holds_for_a_retest_without_its_list(gsp: Path) -> None:
    (gsp / "GSP_retest_140630.csv").unlink()
    retest = next(j for j in joined("gsp", gsp)[0].values() if j.image.session == "2")
    assert (retest.values["sex"], retest.values["diagnosis_source"]) == ("M", "cohort_default")
    assert "age_years" not in retest.values


@pytest.mark.parametrize(
    ("row", "message"),
    [("sub-0001,F,22,,,,,,", "names 'sub-0001'"), ("Sub0001_Ses1,1,22,,,,,,", "Sex has the code '1'")],
)
def test_gsp_refuses_what_it_does_not_know(row: str, message: str, gsp: Path) -> None:
    table(gsp / "GSP_list_140630.csv", GSP, row)
    with pytest.raises(G3nError, match=message):
        load_cohort("gsp").phenotypes(gsp, "clean")
    assert len(images("gsp", gsp)) == 4
