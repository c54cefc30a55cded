"""SchizConnect: one row a scan, schizoaffective disorder, and COBRE as INDI gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohort_scan import scan_cohort
from data_prep.cohorts import load_cohort
from data_prep.manifest import read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

HEADER = "eid\tstudy\tage\tsex\tdx"
DIAGNOSES = {
    "No_Known_Disorder": "HC",
    "Schizophrenia_Strict": "SCZ",
    "Schizophrenia_Broad": "SCZ",
    "Schizoaffective": "SZA",
    "Bipolar_Disorder": "BP",
    "Bipolar_Disorder_Strict": "BP",
    "Bipolar_Disorder_Broad": "BP",
}


@pytest.mark.parametrize("mode", ["clean", "paper"])
def test_diagnoses(mode: str, tmp_path: Path) -> None:
    touch(tmp_path, *(f"A0000030{i}/T1.nii.gz" for i in range(len(DIAGNOSES))))
    rows = [f"A0000030{i}\tMCICShare\t40\tmale\t{dx}" for i, dx in enumerate(DIAGNOSES)]
    table(tmp_path / "SCHIZO_metadata.tsv", HEADER, *rows)
    found = joined("schizconnect", tmp_path, mode)[0]  # type: ignore[arg-type]
    assert [found[path].values["diagnosis"] for path in sorted(found)] == list(DIAGNOSES.values())
    assert [found[path].values["diagnosis_detail"] for path in sorted(found)] == list(DIAGNOSES)
    values = found["A00000300/T1.nii.gz"].values
    assert (values["site"], values["age_precision"], values["diagnosis_source"]) == ("MCICShare", "year", "baseline")
    table(tmp_path / "SCHIZO_metadata.tsv", HEADER, "A00000300\tCOBRE\t40\tmale\tDisenrolled")
    with pytest.raises(G3nError, match="dx has the code 'Disenrolled'"):
        load_cohort("schizconnect").phenotypes(tmp_path, mode)  # type: ignore[arg-type]


def test_rows_of_one_subject_count_once_or_must_agree(tmp_path: Path) -> None:
    """One row a scan; the first hit is not simply taken."""
    touch(tmp_path, "A00000300/T1.nii.gz", "A00000300/T2.nii.gz", "A00000541/T1.nii.gz")
    header = "source,study,subjectid,age,sex,dx,imaging_protocol"
    rows = [f"SchizConnect,COBRE,A00000300,40,male,Schizophrenia_Strict,{p}" for p in ("T1", "T1", "T2")]
    rows += ["SchizConnect,COBRE,a00000541,31,female,Schizoaffective,T1"]
    rows += ["SchizConnect,COBRE,A00000541,33,female,No_Known_Disorder,T2"]
    table(tmp_path / "SchizConnect_metaData.csv", header, *rows)
    found, report = joined("schizconnect", tmp_path)
    first, second = found["A00000300/T2.nii.gz"].values, found["A00000541/T1.nii.gz"].values
    assert (first["diagnosis"], first["age_years"], first["sex"]) == ("SCZ", 40, "M")
    assert not {"diagnosis", "age_years"} & set(second)
    assert second["sex"] == "F"
    assert "'A00000541': 2 rows disagree on diagnosis; taken as missing" in report.notes
    table(tmp_path / "SchizConnect_metaData.csv", header.replace("subjectid", "Subject_ID"), *rows)
    assert joined("schizconnect", tmp_path)[0] == found
    table(tmp_path / "SchizConnect_metaData.csv", header.replace("subjectid", "person"), *rows)
    with pytest.raises(G3nError, match="lacks the column eid, subjectid or Subject_ID"):
        joined("schizconnect", tmp_path)


def test_t1_and_t2_of_one_session_belong_together(tmp_path: Path) -> None:
    root = tmp_path / "s"
    touch(root, *(f"A00000300/ses-{s}/{m}.nii.gz" for s in (1, 2) for m in ("T1", "T2")), "A00000300/ses-1/mask.nii.gz")
    table(root / "SCHIZO_metadata.tsv", HEADER, "A00000300\tCOBRE\t40\tmale\tSchizophrenia_Broad")
    scan_cohort(root, "schizconnect", tmp_path / "m.tsv", "clean", Shares(0, 0, 0))
    scans = read_manifest(tmp_path / "m.tsv").scans
    assert sorted((s.session, s.modality) for s in scans) == [(s, m) for s in "12" for m in ("T1", "T2")]
    assert {(s.space, s.license, s.group) for s in scans} == {("native_stripped", "dua", "schizconnect:A00000300")}


COBRE = "ID,Current Age,Gender,Handedness,Subject Type,Diagnosis"


def test_cobre_as_indi_gives_it(tmp_path: Path) -> None:
    codes = {"295.3": "SCZ", "295.92": "SCZ", "295.70 bipolar": "SZA", "295.7": "SZA", "296.4": "BP", "311": None}
    codes |= {"290.3": None, "295.4": None, "296.26": None, "None": None, "296.90": None}
    codes |= dict.fromkeys(("296.0", "296.53", "296.6", "296.7", "296.89"), "BP")
    hands = ["Right", "Left", *["Both"] * (len(codes) - 2)]
    rows = [f"00400{i:02d},30,Male,{h},Patient,{dx}" for i, (dx, h) in enumerate(zip(codes, hands, strict=True))]
    rows += ["40016,25,Female,,Control,None", "40017,Disenrolled,Disenrolled,Disenrolled,Disenrolled,Disenrolled"]
    table(tmp_path / "COBRE_phenotypic_data.csv", COBRE, *rows)
    heads = [f"COBRE_scan_data/00400{i:02d}/session_1/anat_1/mprage.nii.gz" for i in range(17)]
    touch(tmp_path, *heads)
    found = joined("schizconnect", tmp_path)[0]
    assert [found[head].values.get("diagnosis") for head in heads] == [*codes.values(), "HC"]
    assert [found[head].values.get("handedness") for head in heads] == ["R", "L", *["A"] * 14, None]
    assert [found[head].values["sex"] for head in heads] == ["M"] * 16 + ["F"]
    assert found[heads[16]].values == {
        "sex": "F", "age_years": 25, "age_precision": "year", "diagnosis": "HC", "diagnosis_source": "baseline", "site": "COBRE"
    }  # fmt: skip
    assert {(j.image.modality, j.image.space, j.image.session, j.image.run) for j in found.values()} == {
        ("T1", "native", "1", 1)
    }
    assert "40017" not in {row.subject for row in load_cohort("schizconnect").phenotypes(tmp_path, "clean")}
    for cells, words in (
        ("30,Male,Right,Relative,None", "Subject Type has the code 'Relative'"),
        ("30,Male,Right,Patient,psychosis", "Diagnosis is 'psychosis'; expected a code of DSM-IV"),
        ("30,male?,Right,Control,None", "Gender has the code 'male"),
    ):
        table(tmp_path / "COBRE_phenotypic_data.csv", COBRE, f"40000,{cells}")
        with pytest.raises(G3nError, match=words):
            joined("schizconnect", tmp_path)
    touch(tmp_path, "A00000300/T1.nii.gz")  # the same people under ids that cannot be linked
    with pytest.raises(G3nError, match="holds COBRE of SchizConnect and of INDI"):
        images("schizconnect", tmp_path)
