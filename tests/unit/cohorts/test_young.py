"""HCP, GSP and SchizConnect: binned ages, families, visits in ids, schizoaffective disorder."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import NAMES, load_cohort
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import joined, table, touch


def hcp_tree(root: Path) -> None:
    for subject in ("100206", "100307"):
        touch(root, *(f"{subject}/T1w/{m}_acpc_dc_restore_brain.nii.gz" for m in ("T1w", "T2w")))
        touch(root, f"{subject}/T1w/T1w_acpc_dc_restore.nii.gz")
    table(root / "unrestricted_x.csv", "Subject,Gender,Age,MMSE_Score", "100206,M,26-30,29", "100307,F,36+,30")


def test_hcp_ages_are_bins(tmp_path: Path) -> None:
    hcp_tree(tmp_path)
    found = {(j.image.subject, j.image.modality): j for j in joined("hcp_ya", tmp_path)[0].values()}
    assert len(found) == 4
    values = found["100206", "T2"].values
    assert (values["age_years"], values["age_precision"], values["sex"]) == (28, "bin5", "M")
    assert found["100206", "T1"].group != found["100307", "T1"].group
    assert {j.values["age_precision"] for j in joined("hcp_ya", tmp_path, "paper")[0].values()} == {"exact"}


def test_hcp_families_share_a_group(tmp_path: Path) -> None:
    hcp_tree(tmp_path)
    rows = ["100206,51,-95,27,14", "100307,51,60,37,16"]
    table(tmp_path / "RESTRICTED_x.csv", "Subject,Family_ID,Handedness,Age_in_Yrs,SSAGA_Educ", *rows)
    found = {j.image.subject: j for j in joined("hcp_ya", tmp_path)[0].values()}
    assert found["100206"].group == found["100307"].group
    assert (found["100206"].values["handedness"], found["100206"].values["age_years"]) == ("L", 27)
    table(tmp_path / "unrestricted_x.csv", "Subject,Gender,Age", "100206,M,40-45")
    with pytest.raises(G3nError, match="Age is '40-45'"):
        load_cohort("hcp_ya").phenotypes(tmp_path, "clean")


def test_gsp(tmp_path: Path) -> None:
    touch(tmp_path, "sub-0001_ses-01/anatomical_brain/x.nii.gz", "sub-0002_ses-02/anatomical_brain/x.nii.gz")
    touch(tmp_path, "sub-0001_ses-01/functional/x.nii.gz", "Sub0003_Ses1/anat/NIfTI/Sub0003_T1.nii.gz")
    table(tmp_path / "GSP_list_140630.csv", "Subject_ID,Sex,Age_Bin", "Sub0001_Ses1,F,22", "Sub0002_Ses1,M,24")
    table(tmp_path / "GSP_retest_140630.csv", "Subject_ID,Sex,Age_Bin,Delay", "Sub0002_Ses2,M,24,70")
    (tmp_path / "Sub0003_Ses1/anat/NIfTI/Sub0003_T1.nii.gz").unlink()
    found = {j.image.subject: j for j in joined("gsp", tmp_path)[0].values()}
    assert (found["0001"].values["age_years"], found["0001"].values["age_precision"]) == (22, "bin2")
    assert (found["0002"].image.session, found["0002"].values["sex"]) == ("2", "M")


def test_schizconnect(tmp_path: Path) -> None:
    for eid in ("A00000300", "A00000541", "A00000838"):
        touch(tmp_path, f"{eid}/T1.nii.gz", f"{eid}/T2.nii.gz")
    rows = ["A00000300\tCOBRE\t40\tmale\tSchizophrenia_Strict", "A00000300\tCOBRE\t40\tmale\tSchizophrenia_Strict"]
    rows += ["A00000541\tMCICShare\t31\tfemale\tSchizoaffective", "a00000838\tCOBRE\t25\tfemale\tNo_Known_Disorder"]
    table(tmp_path / "SCHIZO_metadata.tsv", "eid\tstudy\tage\tsex\tdx", *rows)
    found = {j.image.subject: j.values for j in joined("schizconnect", tmp_path)[0].values()}
    assert [found[e]["diagnosis"] for e in sorted(found)] == ["SCZ", "SZA", "HC"]
    assert found["A00000541"]["site"] == "MCICShare"
    table(tmp_path / "SCHIZO_metadata.tsv", "eid\tstudy\tage\tsex\tdx", "A00000300\tCOBRE\t40\tmale\tMania")
    with pytest.raises(G3nError, match="dx has the code 'Mania'"):
        load_cohort("schizconnect").phenotypes(tmp_path, "clean")


def test_every_cohort_keeps_the_contract() -> None:
    cohorts = [load_cohort(name) for name in NAMES]
    assert len(cohorts) == 18
    assert [c.name for c in cohorts] == list(NAMES)
    assert {c.license for c in cohorts} <= {"open", "nc", "dua"}
    assert all(0.3 < c.min_match <= 1 for c in cohorts)
    with pytest.raises(G3nError, match="cohort 'brats' is not known"):
        load_cohort("brats")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_tables_or_images_is_named(name: str, tmp_path: Path) -> None:
    cohort = load_cohort(name)
    assert cohort.discover(tmp_path) == []
    if name != "adni":  # its tables are many, none of them always there
        with pytest.raises(G3nError, match="has no table"):
            cohort.phenotypes(tmp_path, "clean")
