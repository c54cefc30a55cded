"""UCSF-PDGM and UPenn-GBM: ids of three and four digits, repeated exams, words for missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

UCSF = (
    "ID,Sex,Age at MRI,WHO CNS Grade,Final pathologic diagnosis (WHO 2021),MGMT status,MGMT index,1p/19q,IDH,1-dead 0-alive,OS,"
    "EOR,Biopsy prior to imaging"
)


@pytest.fixture
def ucsf(tmp_path: Path) -> Path:
    base = "UCSF-PDGM-v5/UCSF-PDGM-"
    touch(
        tmp_path,
        *(f"{base}0004_nifti/UCSF-PDGM-0004_{m}.nii.gz" for m in ("T1", "T1_bias", "T1c", "T1c_bias", "FLAIR_bias")),
    )
    touch(
        tmp_path, *(f"{base}0004_nifti/UCSF-PDGM-0004_{m}.nii.gz" for m in ("SWI", "tumor_segmentation", "DTI_eddy_FA"))
    )
    touch(tmp_path, f"{base}0541_nifti/UCSF-PDGM-0541_T2.nii.gz", f"{base}0009_nifti/UCSF-PDGM-0009_T1_bias.nii.gz")
    touch(
        tmp_path, f"{base}0138_nifti/UCSF-PDGM-0138_T1_bias.nii.gz", f"{base}0429_nifti/UCSF-PDGM-0429_T1_bias.nii.gz"
    )
    touch(tmp_path, f"{base}0175_FU003d_nifti/UCSF-PDGM-0175_FU003d_T1_bias.nii.gz")
    rows = ['UCSF-PDGM-004,M,66,4,"Glioblastoma, IDH-wildtype",negative,0,intact,wildtype,1,1303,STR,Yes']
    rows += [
        'UCSF-PDGM-541,F,35,2,"Oligodendroglioma, IDH-mutant, 1p/19q-codeleted",unknown,,Co-deletion,IDH2 p.Arg172Trp,0,10,GTR,No'
    ]
    rows += [
        'UCSF-PDGM-009,F,40,4,"Astrocytoma, IDH-mutant",indeterminate,,relative co-deletion,IDH1 p.Arg132His,0,,biopsy,No'
    ]
    rows += ['UCSF-PDGM-138,M,50,3,"Astrocytoma, IDH-wildtype",positive,5,,wildtype,0,90,GTR,No']
    rows += ['UCSF-PDGM-429,M,50,3,"Astrocytoma, IDH-wildtype",positive,5,,wildtype,0,90,GTR,No']
    table(tmp_path / "UCSF-PDGM-metadata_v2.csv", UCSF, *rows)
    return tmp_path


def test_ucsf_images(ucsf: Path) -> None:
    found = images("ucsf_pdgm", ucsf).values()
    assert {(i.subject[-4:], i.modality, Path(i.path).name.endswith("_bias.nii.gz")) for i in found} == {
        ("0004", "T1", True), ("0004", "T1c", True), ("0004", "FLAIR", True), ("0541", "T2", False), ("0009", "T1", True),
        ("0429", "T1", True),
    }  # fmt: skip
    assert {i.space for i in found} == {"brats"}


def test_ucsf_values(ucsf: Path) -> None:
    found = {j.image.subject[-4:]: j.values for j in joined("ucsf_pdgm", ucsf)[0].values()}
    assert [found[i]["diagnosis"] for i in ("0004", "0541", "0009", "0429")] == ["GBM", "GLIOMA", "GBM", "GLIOMA"]
    assert [found[i]["idh"] for i in ("0004", "0541", "0009")] == ["wildtype", "mutant", "mutant"]
    assert [found[i].get("mgmt") for i in ("0004", "0541", "0009", "0429")] == [
        "unmethylated",
        None,
        None,
        "methylated",
    ]
    assert [found[i].get("codel_1p19q") for i in ("0004", "0541", "0009")] == ["intact", "codeleted", None]
    assert (found["0004"]["os_days"], found["0004"]["os_event"], found["0004"]["resection"]) == (1303, 1, "STR")
    assert (found["0541"]["who_grade"], found["0541"]["age_years"], found["0541"]["sex"]) == (2, 35, "F")


def test_ucsf_refuses_a_new_word(ucsf: Path) -> None:
    table(ucsf / "UCSF-PDGM-metadata_v9.csv", UCSF, "UCSF-PDGM-004,M,66,4,x,perhaps,0,intact,wildtype,1,1,STR,Yes")
    with pytest.raises(G3nError, match="MGMT status has the code 'perhaps'"):
        load_cohort("ucsf_pdgm").phenotypes(ucsf, "clean")


UPENN = (
    "ID,Gender,Age_at_scan_years,Survival_from_surgery_days_UPDATED,Survival_Status,Survival_Censor,IDH1,MGMT,KPS,"
    "GTR_over90percent,Time_since_baseline_preop,PsP_TP_score"
)


def test_upenn(tmp_path: Path) -> None:
    base = "NIfTI-files/images_structural"
    touch(
        tmp_path, *(f"{base}/UPENN-GBM-00001_11/UPENN-GBM-00001_11_{m}.nii.gz" for m in ("T1", "T1GD", "T2", "FLAIR"))
    )
    touch(tmp_path, f"{base}/UPENN-GBM-00001_21/UPENN-GBM-00001_21_T1.nii.gz")
    touch(
        tmp_path, "NIfTI-files/images_structural_unstripped/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1_unstripped.nii.gz"
    )
    touch(tmp_path, f"{base}/UPENN-GBM-00002_11/old/UPENN-GBM-00002_11_T1.nii.gz")
    touch(tmp_path, *(f"{base}/UPENN-GBM-0000{i}_11/UPENN-GBM-0000{i}_11_T1.nii.gz" for i in (2, 3)))
    rows = ["UPENN-GBM-00001_11,F,63.5,400,Deceased,Not Available,Mutated,Methylated,90,Y,0,NA"]
    rows += [
        "UPENN-GBM-00001_21,F,64.5,100,Deceased,Not Available,NOS/NEC,Not Available,Not Available,Not Applicable,400,4"
    ]
    rows += ["UPENN-GBM-00002_11,M,50.1,Not Available,Alive,900,Wildtype,Indeterminate,Not Available,N,0,NA"]
    rows += [
        "UPENN-GBM-00003_11,M,50.1,77,Deceased - uncertain date of death,Not Available,NOS/NEC,Unmethylated,80,Y,0,NA"
    ]
    table(tmp_path / "UPENN-GBM_clinical_info_v2.1.csv", UPENN, *rows)
    found = joined("upenn_gbm", tmp_path)[0]
    assert sorted(Path(p).name for p in found) == [
        "UPENN-GBM-00001_11_FLAIR.nii.gz", "UPENN-GBM-00001_11_T1.nii.gz", "UPENN-GBM-00001_11_T1GD.nii.gz",
        "UPENN-GBM-00001_11_T2.nii.gz", "UPENN-GBM-00002_11_T1.nii.gz", "UPENN-GBM-00003_11_T1.nii.gz",
    ]  # fmt: skip
    one, two, three = (found[f"{base}/UPENN-GBM-0000{i}_11/UPENN-GBM-0000{i}_11_T1.nii.gz"].values for i in (1, 2, 3))
    assert found[f"{base}/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1GD.nii.gz"].image.modality == "T1c"
    assert (one["os_days"], one["os_event"], one["idh"], one["mgmt"], one["kps"]) == (
        400,
        1,
        "mutant",
        "methylated",
        90,
    )
    assert (two["os_days"], two["os_event"], two["resection"]) == (900, 0, "STR")
    assert not {"os_days", "os_event", "idh"} & set(three)
    assert {one["diagnosis"], two["diagnosis"]} == {"GBM"}
