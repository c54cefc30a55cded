"""UCSF-PDGM and UPenn-GBM: ids of three and four digits, repeated exams, words for missing, survival."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from data_prep.cohorts.contract import Harmonise
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

UCSF = (
    "ID,Sex,Age at MRI,WHO CNS Grade,Final pathologic diagnosis (WHO 2021),MGMT status,MGMT index,1p/19q,IDH,1-dead 0-alive,OS,"
    "EOR,Biopsy prior to imaging,BraTS21 ID,BraTS21 Segmentation Cohort,BraTS21 MGMT Cohort"
)
UCSF_ROW = '-004,M,66,4,"Glioblastoma, IDH-wildtype",negative,0,intact,wildtype,1,1303,STR,Yes,,,'
UCSF_ROWS = [
    UCSF_ROW,
    '-541,F,35,2,"Oligodendroglioma, IDH-mutant, 1p/19q-codeleted",unknown,,Co-deletion,IDH2 p.Arg172Trp,0,10,GTR,No,,,',
    '-009,F,40,4,"Astrocytoma, IDH-mutant",indeterminate,,relative co-deletion,IDH1 p.Arg132His,0,,biopsy,No,,,',
    '-138,M,50,3,"Astrocytoma, IDH-wildtype",positive,5,,wildtype,0,90,GTR,No,,,',
    '-429,M,50,3,"Astrocytoma, IDH-wildtype",positive,5,,wildtype,0,90,GTR,No,,,',
]
SCAN = "UCSF-PDGM-v5/UCSF-PDGM-{0}_nifti/UCSF-PDGM-{0}_{1}.nii.gz"
PAIRS = {"0138": "0429", "0175": "0396", "0181": "0409", "0278": "0431", "0289": "0391", "0315": "0433"}


def ucsf_table(root: Path, *rows: str, version: int = 2) -> None:
    table(root / f"UCSF-PDGM-metadata_v{version}.csv", UCSF, *(f"UCSF-PDGM{row}" for row in rows))


@pytest.fixture
def ucsf(tmp_path: Path) -> Path:
    touch(tmp_path, *(SCAN.format("0004", m) for m in ("T1", "T1_bias", "T1c", "T1c_bias", "FLAIR_bias")))
    touch(tmp_path, *(SCAN.format("0004", m) for m in ("SWI", "SWI_bias", "DWI_bias", "ADC", "ASL", "DTI_eddy_FA")))
    touch(tmp_path, *(SCAN.format("0004", f"{m}_segmentation") for m in ("tumor", "brain", "brain_parenchyma")))
    touch(tmp_path, SCAN.format("0541", "T2"), SCAN.format("0009", "T1_bias"))
    touch(tmp_path, SCAN.format("0138", "T1_bias"), SCAN.format("0429", "T1_bias"))
    ucsf_table(tmp_path, *UCSF_ROWS)
    return tmp_path


def ucsf_values(root: Path, mode: Harmonise = "clean") -> dict[str, dict[str, str | float]]:
    return {j.image.subject[-4:]: j.values for j in joined("ucsf_pdgm", root, mode)[0].values()}


def test_ucsf_images(ucsf: Path) -> None:
    found = images("ucsf_pdgm", ucsf).values()
    assert {(i.subject[-4:], i.modality, Path(i.path).name.endswith("_bias.nii.gz")) for i in found} == {
        ("0004", "T1", True), ("0004", "T1c", True), ("0004", "FLAIR", True), ("0541", "T2", False), ("0009", "T1", True),
        ("0429", "T1", True),
    }  # fmt: skip
    assert len(found) == 6
    assert {i.space for i in found} == {"brats"}


@pytest.mark.parametrize("renamed", [False, True])
def test_ucsf_of_a_person_imaged_twice_the_later_exam_stays(renamed: bool, tmp_path: Path) -> None:
    """Older releases call the first exam 0138, newer ones 0429_FU003d, in the folders and (with four digits) in the table."""
    first = {old: f"{new}_FU{i:03d}d" if renamed else old for i, (old, new) in enumerate(PAIRS.items(), 1)}
    touch(tmp_path, *(SCAN.format(name, "T1_bias") for name in (*first.values(), *PAIRS.values())))
    ids = [*PAIRS.values(), *(first.values() if renamed else (name[1:] for name in first.values()))]
    rows = [
        UCSF_ROW.replace("-004,M,66", f"-{i if 'FU' in i else i[-3:]},M,{66 if i in PAIRS.values() else 65}")
        for i in ids
    ]
    ucsf_table(tmp_path, *rows, version=5 if renamed else 2)
    found = ucsf_values(tmp_path)
    assert {subject: values["age_years"] for subject, values in found.items()} == dict.fromkeys(PAIRS.values(), 66)
    assert set(images("ucsf_pdgm", tmp_path)) == {SCAN.format(subject, "T1_bias") for subject in PAIRS.values()}


def test_ucsf_folders_of_three_digits(tmp_path: Path) -> None:
    touch(tmp_path, "UCSF-PDGM-004/UCSF-PDGM-004_T1.nii.gz", "UCSF-PDGM-138/UCSF-PDGM-138_T1.nii.gz")
    ucsf_table(tmp_path, *UCSF_ROWS)
    assert list(ucsf_values(tmp_path)) == ["0004"]


@pytest.mark.parametrize("mode", ["clean", "paper"])  # no mutation is lost in either
def test_ucsf_values(mode: Harmonise, ucsf: Path) -> None:
    found = ucsf_values(ucsf, mode)
    order = ("0004", "0541", "0009", "0429")
    assert [found[i]["diagnosis"] for i in order] == ["GBM", "GLIOMA", "GBM", "GLIOMA"]
    assert [found[i]["idh"] for i in order] == ["wildtype", "mutant", "mutant", "wildtype"]
    assert [found[i].get("mgmt") for i in order] == ["unmethylated", None, None, "methylated"]
    assert [found[i].get("mgmt_index") for i in order] == [0, None, None, 5]
    assert [found[i].get("codel_1p19q") for i in order] == ["intact", "codeleted", None, None]
    assert (found["0004"]["os_days"], found["0004"]["os_event"], found["0004"]["resection"]) == (1303, 1, "STR")
    assert (found["0541"]["os_days"], found["0541"]["os_event"]) == (10, 0)  # censored
    assert (found["0541"]["who_grade"], found["0541"]["age_years"], found["0541"]["sex"]) == (2, 35, "F")
    assert found["0009"]["diagnosis_detail"] == "Astrocytoma IDH-mutant"  # tells it from a glioblastoma of WHO 2021
    assert found["0009"]["age_precision"] == "year"


@pytest.mark.parametrize(
    ("text", "idh"),
    [
        ("wildtype", "wildtype"), ("Wildtype", "wildtype"), ("", None), ("unknown", None),
        *((text, "mutant") for text in (
            "IDH1 p.R132H", "mutated (NOS)", "IDH1 p.R132C", "IDH1 p.R132G", "IDH1 p.R132S", "IDH2 p.R172K", "IDH2 p.Arg172Trp",
            "IDH1 p.Arg132His",
        )),
    ],
)  # fmt: skip
def test_ucsf_spellings_of_idh(text: str, idh: str | None, ucsf: Path) -> None:
    ucsf_table(ucsf, UCSF_ROW.replace(",wildtype,", f",{text},"), *UCSF_ROWS[1:])
    assert ucsf_values(ucsf)["0004"].get("idh") == idh


@pytest.mark.parametrize(
    ("text", "codeletion"),
    [
        ("intact", "intact"), ("co-deletion", "codeleted"), ("Co-deletion", "codeleted"), ("Relative co-deletion", None),
        ("", None), ("unknown", None),
    ],
)  # fmt: skip
def test_ucsf_codeletion(text: str, codeletion: str | None, ucsf: Path) -> None:
    ucsf_table(ucsf, UCSF_ROW.replace(",intact,", f",{text},"), *UCSF_ROWS[1:])
    assert ucsf_values(ucsf)["0004"].get("codel_1p19q") == codeletion


@pytest.mark.parametrize("missing", ["", "unknown"])  # older and newer releases
def test_ucsf_words_for_missing(missing: str, ucsf: Path) -> None:
    row = f"-004,M,{missing},{missing},{missing},{missing},{missing},{missing},{missing},{missing},{missing},{missing},No,,,"
    ucsf_table(ucsf, row, *UCSF_ROWS[1:])
    left = set(ucsf_values(ucsf)["0004"])
    assert left - {"diagnosis_detail"} == {"sex", "age_precision", "field_strength_t"}
    no_status = UCSF_ROW.replace(",negative,0,", ",,0,")
    ucsf_table(ucsf, no_status, *UCSF_ROWS[1:])
    found = ucsf_values(ucsf)["0004"]
    assert (found.get("mgmt"), found["mgmt_index"]) == (None, 0)  # an index is no status


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",negative,", ",perhaps,", "MGMT status has the code 'perhaps'"),
        (",wildtype,", ",VUS,", "IDH has the code 'VUS'"),
        (",66,4,", ",66,1,", "WHO CNS Grade has the code '1'"),
        (",intact,", ",partial,", "1p/19q has the code 'partial'"),
        (",1,1303,", ",2,1303,", "1-dead 0-alive has the code '2'"),
        (",STR,", ",PR,", "EOR has the code 'PR'"),
        ("-004,M,", "-004,X,", "Sex has the code 'X'"),
        ("-004,", "-4,", "has the ID 'UCSF-PDGM-4'"),
    ],
)
def test_ucsf_refuses_a_new_word(old: str, new: str, message: str, ucsf: Path) -> None:
    ucsf_table(ucsf, UCSF_ROW.replace(old, new), version=5)
    with pytest.raises(G3nError, match=message):
        load_cohort("ucsf_pdgm").phenotypes(ucsf, "clean")


@pytest.mark.parametrize("column", ["OS", "IDH", "1p/19q", "MGMT status", "WHO CNS Grade", "1-dead 0-alive", "EOR"])
def test_ucsf_needs_its_columns(column: str, ucsf: Path) -> None:
    table(ucsf / "UCSF-PDGM-metadata_v5.csv", UCSF.replace(f",{column},", ",other,"), f"UCSF-PDGM{UCSF_ROW}")
    with pytest.raises(G3nError, match=f"lacks the column {column}"):
        load_cohort("ucsf_pdgm").phenotypes(ucsf, "clean")


UPENN = (
    "ID,Gender,Age_at_scan_years,Survival_from_surgery_days_UPDATED,Survival_Status,Survival_Censor,IDH1,MGMT,KPS,"
    "GTR_over90percent,Time_since_baseline_preop,PsP_TP_score"
)
UPENN_ROW = "UPENN-GBM-00001_11,F,63.5,400,Deceased,Not Available,Mutated,Methylated,90,Y,0,NA"
NONE = "Not Available"
BASE = "NIfTI-files/images_structural"


def upenn_path(number: int, modality: str, folder: str = "") -> str:
    return f"{BASE}/UPENN-GBM-0000{number}_11/{folder}UPENN-GBM-0000{number}_11_{modality}.nii.gz"


@pytest.fixture
def upenn(tmp_path: Path) -> Path:
    touch(
        tmp_path, *(upenn_path(1, m) for m in ("T1", "T1GD", "T2", "FLAIR")), *(upenn_path(i, "T1") for i in (2, 3, 4))
    )
    touch(tmp_path, f"{BASE}/UPENN-GBM-00001_21/UPENN-GBM-00001_21_T1.nii.gz", upenn_path(2, "T1", "old/"))
    touch(tmp_path, f"{BASE}_unstripped/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1_unstripped.nii.gz")
    touch(tmp_path, "NIfTI-files/automated_segm/UPENN-GBM-00001_11_automated_approx_segm.nii.gz")
    touch(tmp_path, "NIfTI-files/images_segm/UPENN-GBM-00001_11_segm.nii.gz")
    rows = [
        UPENN_ROW,
        f"UPENN-GBM-00001_21,F,64.5,100,Deceased,{NONE},NOS/NEC,{NONE},{NONE},Not Applicable,400,4",
        f"UPENN-GBM-00002_11,M,50.1,{NONE},Alive,900,Wildtype,Indeterminate,{NONE},N,0,NA",
        f"UPENN-GBM-00003_11,M,50.1,77,Deceased - uncertain date of death,{NONE},NOS/NEC,Unmethylated,80,{NONE},0,NA",
        f"UPENN-GBM-00004_11,M,88.5,{NONE},Lost to Follow-up,12,Wildtype,{NONE},30,Y,0,NA",
    ]
    table(tmp_path / "UPENN-GBM_clinical_info_v2.1.csv", UPENN, *rows)
    table(tmp_path / "UPENN-GBM_acquisition.csv", "ID,Manufacturer", "UPENN-GBM-00001_11,SIEMENS")
    return tmp_path


def test_upenn_images(upenn: Path) -> None:
    found = images("upenn_gbm", upenn)
    assert {path: (i.modality, i.space) for path, i in found.items()} == {
        upenn_path(1, "T1"): ("T1", "brats"), upenn_path(1, "T1GD"): ("T1c", "brats"), upenn_path(1, "T2"): ("T2", "brats"),
        upenn_path(1, "FLAIR"): ("FLAIR", "brats"), **{upenn_path(i, "T1"): ("T1", "brats") for i in (2, 3, 4)},
    }  # fmt: skip


def test_upenn_values(upenn: Path) -> None:
    found = joined("upenn_gbm", upenn)[0]
    one, two, three, four = (found[upenn_path(i, "T1")].values for i in (1, 2, 3, 4))
    # Of the baseline, not of the second surgery.
    assert (one["os_days"], one["os_event"], one["idh"], one["mgmt"]) == (400, 1, "mutant", "methylated")
    assert (one["age_years"], one["sex"], one["kps"], one["resection"]) == (63.5, "F", 90, "GTR")
    assert (two["os_days"], two["os_event"], two["idh"], two["resection"]) == (900, 0, "wildtype", "STR")
    assert not {"mgmt", "kps"} & set(two)
    assert not {"os_days", "os_event", "idh", "resection"} & set(three)  # when they died is uncertain
    assert three["mgmt"] == "unmethylated"
    assert (four["os_days"], four["os_event"], four.get("mgmt")) == (12, 0, None)
    assert {(v["diagnosis"], v["who_grade"]) for v in (one, two, three, four)} == {("GBM", 4)}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",Deceased,", ",Gone,", "Survival_Status has the code 'Gone'"),
        (",Mutated,", ",R132H,", "IDH1 has the code 'R132H'"),
        (",Methylated,", ",Partly,", "MGMT has the code 'Partly'"),
        (",Y,", ",Maybe,", "GTR_over90percent has the code 'Maybe'"),
        (",F,", ",1,", "Gender has the code '1'"),
        (",63.5,", ",old,", "Age_at_scan_years is 'old'"),
    ],
)
def test_upenn_refuses_a_new_word(old: str, new: str, message: str, upenn: Path) -> None:
    table(upenn / "UPENN-GBM_clinical_info_v2.2.csv", UPENN, UPENN_ROW.replace(old, new))
    with pytest.raises(G3nError, match=message):
        load_cohort("upenn_gbm").phenotypes(upenn, "clean")


@pytest.mark.parametrize("column", ["Survival_from_surgery_days_UPDATED", "Survival_Censor", "IDH1", "MGMT", "KPS"])
def test_upenn_needs_its_columns(column: str, upenn: Path) -> None:
    table(upenn / "UPENN-GBM_clinical_info_v2.2.csv", UPENN.replace(column, "other"), UPENN_ROW)
    with pytest.raises(G3nError, match=f"lacks the column {column}"):
        load_cohort("upenn_gbm").phenotypes(upenn, "clean")
