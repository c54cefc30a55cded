"""ABIDE, ADHD-200, CoRR, FCON1000, HBN, NKI: opposite sex codes, sentinels, ids that repeat or lose their zeros."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch


def test_abide1(tmp_path: Path) -> None:
    touch(tmp_path, "NYU/sub-0050952/anat/sub-0050952_T1w.nii.gz", "CMU_a/sub-0050642/anat/sub-0050642_T1w.nii.gz")
    header = "SITE_ID,SUB_ID,DX_GROUP,DSM_IV_TR,AGE_AT_SCAN,SEX,HANDEDNESS_CATEGORY,FIQ"
    rows = ["NYU,50952,1,0,11.2,1,-9999,-9999", "CMU,50642,2,0,-9999,2,Ambi,110"]
    table(tmp_path / "Phenotypic_V1_0b.csv", header, *rows)
    nyu, cmu = (joined("abide1", tmp_path)[0][p].values for p in sorted(images("abide1", tmp_path), reverse=True))
    assert (nyu["diagnosis"], nyu["sex"], nyu["age_years"], nyu["site"]) == ("ASD", "M", 11.2, "NYU")
    assert "handedness" not in nyu
    assert (cmu["diagnosis"], cmu["sex"], cmu["handedness"], cmu["site"]) == ("HC", "F", "A", "CMU")
    assert "age_years" not in cmu


def test_abide2(tmp_path: Path) -> None:
    base = "ABIDEII-UCLA_Long/sub-28675"
    touch(tmp_path, *(f"{base}/ses-{s}/anat/sub-28675_ses-{s}_run-1_T1w.nii.gz" for s in (1, 2)))
    touch(
        tmp_path,
        f"{base}/ses-1/anat/sub-28675_ses-1_acq-x_run-2_T1w.nii.gz",
        f"{base}/ses-1/dwi/sub-28675_ses-1_dwi.nii.gz",
    )
    header = "SITE_ID,SUB_ID,SESSION,DX_GROUP,AGE_AT_SCAN ,SEX,HANDEDNESS_CATEGORY,AGE_AT_MPRAGE,NOTE"
    table(tmp_path / "ABIDEII_Composite_Phenotypic.csv", header, "U,28675,Baseline,1,9.0,2,3,9.2,é", encoding="latin-1")
    table(
        tmp_path / "ABIDEII_Long_Composite_Phenotypic.csv",
        header,
        "U,28675,Followup_1,1,12.5,2,3,,x",
        encoding="latin-1",
    )
    found = {(j.image.session, j.image.run): j for j in joined("abide2", tmp_path)[0].values()}
    assert set(found) == {("1", 1), ("1", 2), ("2", 1)}
    assert [found[k].values["age_years"] for k in (("1", 1), ("2", 1))] == [9.2, 12.5]
    assert found["1", 1].values["handedness"] == "A"
    assert (found["1", 1].values["sex"], found["1", 1].values["diagnosis"]) == ("F", "ASD")


def test_adhd200(tmp_path: Path) -> None:
    prep = "fmriprep/sub-0010001/anat/sub-0010001_space-MNI152NLin2009cAsym_desc"
    touch(tmp_path, f"{prep}-preproc_T1w.nii.gz", f"{prep}-brain_mask.nii.gz")
    touch(tmp_path, "Brown/sub-0026001/ses-1/anat/sub-0026001_ses-1_T1w.nii.gz")
    header = "ScanDir ID,Site,Gender,Age,Handedness,DX,Secondary Dx ,ADHD Index"
    rows = ["10001,5,0,12.3,0.85,3,-999,-999", "26001,2,1,-999,1,pending,,-999", "10001,5,0,12.3,0.85,3,-999,-999"]
    table(tmp_path / "adhd200_preprocessed_phenotypics.csv", header, *rows, encoding="latin-1")
    found = joined("adhd200", tmp_path)[0]
    nyu, brown = found[f"{prep}-preproc_T1w.nii.gz"], found["Brown/sub-0026001/ses-1/anat/sub-0026001_ses-1_T1w.nii.gz"]
    assert (nyu.values["sex"], nyu.values["diagnosis"], nyu.values["site"]) == ("F", "ADHD", "NYU")
    assert "handedness" not in nyu.values  # a score there
    assert (nyu.image.space, nyu.image.mask) == ("mni", f"{prep}-brain_mask.nii.gz")
    assert load_cohort("adhd200").plan(nyu.image).use_mask
    assert (brown.values["sex"], brown.values["handedness"]) == ("M", "R")
    assert not {"diagnosis", "age_years"} & set(brown.values)


CORR = "SITE,SUBID,SESSION,SEX,AGE_AT_SCAN_1,HANDEDNESS"


def corr_tree(root: Path) -> None:
    for subject in ("0025001", "0025002", "0025003"):
        touch(root, *(f"sub-{subject}/ses-{s}/anat/sub-{subject}_ses-{s}_run-1_T1w.nii.gz" for s in (1, 2)))


def test_corr_codes_women_as_1(tmp_path: Path) -> None:
    corr_tree(tmp_path)
    rows = ["UM,25001,Baseline,1,64.0,R", "UM,25001,Retest_1,1,#,R", "Utah_1,25002,Baseline,2,20.5,#"]
    rows += ["MRN_1,25003,Baseline,1,30.0,R", "MRN_1,25003,Retest_1,1,31.0,R"]
    table(tmp_path / "CoRR_AggregatedPhenotypicData.csv", CORR, *rows)
    found = {(j.image.subject, j.image.session): j.values for j in joined("corr", tmp_path)[0].values()}
    assert (found["25001", "1"]["sex"], found["25002", "1"]["sex"], found["25003", "1"]["sex"]) == ("F", "M", "M")
    assert found["25001", "2"]["age_years"] == 64.0  # known at baseline alone
    assert [found["25003", s]["age_years"] for s in "12"] == [30.0, 31.0]


def test_corr_stops_where_utah_has_women(tmp_path: Path) -> None:
    corr_tree(tmp_path)
    table(
        tmp_path / "CoRR_AggregatedPhenotypicData.csv",
        CORR,
        "Utah_1,25002,Baseline,1,20.5,#",
        "Utah_1,25001,Baseline,2,20,#",
    )
    with pytest.raises(G3nError, match="1 of 2 subjects of Utah read as women"):
        load_cohort("corr").phenotypes(tmp_path, "clean")


def test_fcon_ids_repeat_between_sites(tmp_path: Path) -> None:
    for site in ("Beijing_Zang", "Leiden_2180"):
        touch(
            tmp_path,
            f"{site}/derivatives/x/sub-01018_T1w_brain.nii.gz",
            f"{site}/sub-01018/anat/mprage_anonymized.nii.gz",
        )
    table(tmp_path / "Beijing_Zang_participants.tsv", "participant_id\tage\tsex\thanded", "sub-01018\t22\tF\tR")
    table(tmp_path / "Leiden_2180_participants.tsv", "participant_id\tage\tsex", "1018\t9999\tmale")
    found = list(joined("fcon1000", tmp_path)[0].values())
    assert len(found) == 2
    beijing, leiden = sorted(found, key=lambda j: j.image.path)
    assert (beijing.values["age_years"], beijing.values["sex"], beijing.values["site"]) == (22, "F", "Beijing_Zang")
    assert leiden.values["sex"] == "M"
    assert "age_years" not in leiden.values
    assert beijing.group != leiden.group


def test_hbn_codes_women_as_1_and_its_tsv_may_be_csv(tmp_path: Path) -> None:
    touch(tmp_path, "Site-SI/sub-NDARAA123BCD/anat/sub-NDARAA123BCD_acq-HCP_run-02_T1w.nii.gz")
    touch(tmp_path, "qsiprep/sub-NDARBB456CDE/anat/sub-NDARBB456CDE_desc-preproc_T1w.nii.gz")
    header = "participant_id,Sex,Age,EHQ_Total,Commercial_Use,Full_Pheno"
    table(
        tmp_path / "participants-SI.tsv",
        header,
        "sub-NDARAA123BCD,0,9.5,-60,Yes,Yes",
        "sub-NDARBB456CDE,1,12.25,10,No,Yes",
    )
    found = {j.image.subject: j for j in joined("hbn", tmp_path)[0].values()}
    boy, girl = found["sub-NDARAA123BCD"], found["sub-NDARBB456CDE"]
    assert (boy.values["sex"], boy.values["handedness"], boy.values["commercial_use"]) == ("M", "L", "yes")
    assert (boy.image.acq, boy.image.run, boy.values["field_strength_t"]) == ("HCP", 2, 1.5)
    assert (girl.values["sex"], girl.values["handedness"], girl.image.space) == ("F", "A", "mni")
    assert boy.values["diagnosis"] == "PED_MIXED"


def test_nki_and_nki2_share_people(tmp_path: Path) -> None:
    one, two = tmp_path / "nki", tmp_path / "nki2"
    name = "sub-A00012345/ses-{0}/anat/sub-A00012345_ses-{0}_T1w.nii.gz"
    touch(one, name.format("BAS1"), name.format("FLU1"))
    touch(two, name.format("MRI1"))
    rows = ["A00012345\t33.5\tFEMALE\tRIGHT"]
    for root in (one, two):
        table(root / "participants.tsv", "participant_id\tage\tsex\thandedness", *rows)
    first, second = joined("nki", one)[0], joined("nki2", two)[0]
    groups = {j.group for j in (*first.values(), *second.values())}
    assert groups == {"nki:A00012345"}
    values = first[name.format("FLU1")].values
    assert (values["age_years"], values["age_precision"], values["sex"]) == (33.5, "enrol", "F")
    assert values["diagnosis_source"] == "cohort_default"
    assert {j.image.space for j in second.values()} == {"mni"}


def test_nki_tolerates_orphans_up_to_its_floor(tmp_path: Path) -> None:
    for i in range(5):
        touch(tmp_path, f"sub-A0000000{i}/ses-BAS1/anat/sub-A0000000{i}_ses-BAS1_T1w.nii.gz")
    known = [f"A0000000{i}\t30\tMALE\tLEFT" for i in range(3)]
    table(tmp_path / "participants.tsv", "participant_id\tage\tsex\thandedness", *known)
    assert sum(j.matched for j in joined("nki", tmp_path)[0].values()) == 3
    table(tmp_path / "participants.tsv", "participant_id\tage\tsex\thandedness", *known[:2])
    with pytest.raises(G3nError, match="only 2 of 5 images found a row"):
        joined("nki", tmp_path)
