"""ADNI: converters, sentinels, codes of three phases, visits without a date, several images of a day."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import load_cohort
from data_prep.cohorts.scores import cognition
from data_prep.schema import VALUES
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

XML = """<?xml version="1.0"?><idaxs xmlns="http://ida.loni.usc.edu"><project xmlns="">
<subject><subjectIdentifier>002_S_0001</subjectIdentifier><researchGroup>MCI</researchGroup><subjectSex>F</subjectSex>
<subjectInfo item="APOE A1">3</subjectInfo><subjectInfo item="APOE A2">4</subjectInfo>
<visit><assessment name="MMSE"><component><assessmentScore attribute="MMSCORE">26.0</assessmentScore></component></assessment>
<assessment name="GDSCALE"><component><assessmentScore attribute="GDTOTAL">3.0</assessmentScore></component></assessment></visit>
<study><subjectAge>75.3</subjectAge><series><dateAcquired>2010-05-04</dateAcquired>
<protocolTerm><protocol term="Manufacturer">SIEMENS</protocol><protocol term="Field Strength">1.5</protocol></protocolTerm>
</series></study></subject></project></idaxs>"""
PERSON = "002_S_0001"
MOCA_RIGHT = [
    *[
        "TRAILS",
        "CUBE",
        "CLOCKCON",
        "CLOCKNO",
        "CLOCKHAN",
        "LION",
        "RHINO",
        "CAMEL",
        "DIGFOR",
        "DIGBACK",
        "REPEAT1",
        "REPEAT2",
        "ABSTRAN",
        "ABSMEAS",
    ],
    *[
        "DATE",
        "MONTH",
        "YEAR",
        "DAY",
        "PLACE",
        "CITY",
        "SERIAL1",
        "SERIAL2",
        "SERIAL3",
        "SERIAL4",
        "SERIAL5",
        "DELW1",
        "DELW2",
        "DELW3",
        "DELW4",
        "DELW5",
    ],
]
PERFECT = dict.fromkeys(MOCA_RIGHT, "1") | {"LETTERS": "0", "FFLUENCY": "14"}


def scan(root: Path, desc: str, date: str, image: str) -> str:
    path = f"ADNI/{PERSON}/{desc}/{date}_10_00_00.0/{image}/ADNI_{PERSON}_MR_{desc}_{image}.nii"
    touch(root, path)
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Scans of 2010 and 2012, no table."""
    scan(tmp_path, "MPRAGE", "2010-05-04", "I11")
    scan(tmp_path, "MPRAGE", "2012-06-01", "I21")
    return tmp_path


@pytest.fixture
def adni(bare: Path) -> Path:
    scan(bare, "MT1__GradWarp__N3m", "2010-05-04", "I12")
    (bare / "ADNI_002_S_0001_MPRAGE_S10_I11.xml").write_text(XML)
    table(bare / "PTDEMOG_01Jan2026.csv", "PTID,PTGENDER,PTHAND,PTEDUCAT", f"{PERSON},2,1,16")
    visits = [f"{PERSON},bl,,2010-05-20,27", f"{PERSON},m06,2010-12-01,2010-12-01,-1", f"{PERSON},m24,2012-06-10,,19"]
    table(bare / "MMSE_01Jan2026.csv", "PTID,VISCODE,VISDATE,EXAMDATE,MMSCORE", *visits)
    diagnoses = [f"{PERSON},bl,2010-05-20,2", f"{PERSON},m24,2012-06-10,3"]
    table(bare / "DXSUM_01Jan2026.csv", "PTID,VISCODE,EXAMDATE,DIAGNOSIS", *diagnoses)
    return bare


def by_year(root: Path, harmonise: str = "clean") -> dict[str, dict[str, str | float]]:
    return {j.image.session[:4]: j.values for j in joined("adni", root, harmonise)[0].values()}  # type: ignore[arg-type]


def test_values_of_the_visit(adni: Path) -> None:
    assert {Path(p).name[-7:] for p in images("adni", adni)} == {"I21.nii", "I12.nii"}
    found, _ = joined("adni", adni)
    first, later = sorted(found.values(), key=lambda j: j.image.session)
    assert first.values["diagnosis"] == "MCI"
    assert later.values["diagnosis"] == "AD"  # a converter: not the label of enrollment
    assert later.values["diagnosis_source"] == "visit"
    assert (first.values["mmse"], later.values["mmse"]) == (27, 19)
    assert (first.delay_days, later.delay_days) == (16, 9)
    assert (first.values["sex"], first.values["apoe_e4_count"], first.values["education_years"]) == ("F", 1, 16)
    scanner = (first.values["age_years"], first.values["field_strength_t"], first.values["manufacturer"])
    assert scanner == (75.3, 1.5, "SIEMENS")
    assert (first.values["site"], first.values["handedness"]) == ("002", "R")
    assert not {"age_years", "field_strength_t", "manufacturer"} & set(later.values)  # of the other image's XML
    assert first.group == later.group == "adni:002_S_0001"


def test_paper_mode_keeps_the_group_at_enrollment(adni: Path) -> None:
    found = by_year(adni, "paper")
    assert [v["diagnosis"] for v in found.values()] == ["MCI", "MCI"]
    assert {v["diagnosis_source"] for v in found.values()} == {"baseline"}
    (adni / "ADNI_002_S_0001_MPRAGE_S10_I11.xml").unlink()
    table(adni / "ADNIMERGE_01Jan2026.csv", MERGE, f"{PERSON},bl,2010-05-20,LMCI,MCI,75.0,0,Female,1,27,1")
    assert [v["diagnosis"] for v in by_year(adni, "paper").values()] == ["MCI", "MCI"]


def test_xml_is_read_with_and_without_a_namespace(bare: Path) -> None:
    for text in (
        XML,
        XML.replace('<project xmlns="">', "<project>"),
        XML.replace(' xmlns="http://ida.loni.usc.edu"', ""),
    ):
        (bare / "ADNI_002_S_0001_MPRAGE_S10_I11.xml").write_text(text)
        found = by_year(bare)["2010"]
        assert (found["age_years"], found["sex"], found["field_strength_t"], found["mmse"]) == (75.3, "F", 1.5, 26)
        assert "diagnosis" not in found  # researchGroup is of the enrollment


def test_scores_of_the_archive_fill_in_for_tables(adni: Path) -> None:
    first = by_year(adni)["2010"]
    assert (first["mmse"], first["gds15"]) == (27, 3)  # the table of MMSE is there, that of GDSCALE is not
    (adni / "MMSE_01Jan2026.csv").unlink()
    assert by_year(adni)["2010"]["mmse"] == 26
    assert "mmse" not in by_year(adni)["2012"]


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ([("MPRAGE", "I1"), ("MT1__N3m", "I5"), ("MT1__GradWarp__N3m", "I9")], "I9"),
        ([("MPRAGE", "I1"), ("MPR__GradWarp__B1_Correction", "I2"), ("MT1__N3m", "I9")], "I9"),
        ([("MPR__GradWarp__B1_Correction", "I100"), ("MPRAGE_repeat", "I99")], "I99"),  # a number, not a text
        ([("Accelerated_SAG_IR-SPGR", "I8"), ("Axial_T2_FLAIR", "I1"), ("Axial_PD_T2_FSE", "I2")], "I8"),
        ([("MP-RAGE", "S7"), ("3_Plane_Localizer", "I1"), ("Resting_State_fMRI", "I2"), ("MPRAGE_Mask", "I3")], "S7"),
    ],
)
def test_one_t1_a_day(series: list[tuple[str, str]], expected: str, tmp_path: Path) -> None:
    for desc, image in series:
        scan(tmp_path, desc, "2010-05-04", image)
    [found] = images("adni", tmp_path).values()
    assert (found.path.split("/")[-2], found.modality, str(found.date)) == (expected, "T1", "2010-05-04")


def test_the_newest_table_counts_by_its_date(adni: Path) -> None:
    table(adni / "MMSE_31Dec2020.csv", "PTID,VISCODE,VISDATE,EXAMDATE,MMSCORE", f"{PERSON},bl,,2010-05-20,1")
    assert by_year(adni)["2010"]["mmse"] == 27


@pytest.mark.parametrize(
    ("text", "sex"), [("1", "M"), ("2", "F"), ("2.0", "F"), ("Female", "F"), ("-4", None), ("-1", None)]
)
def test_sex_is_a_code_or_text(text: str, sex: str | None, bare: Path) -> None:
    table(bare / "PTDEMOG_01Jan2026.csv", "PTID,PTGENDER,PTHAND,PTEDUCAT", f"{PERSON},{text},2,12")
    assert by_year(bare)["2010"].get("sex") == sex


@pytest.mark.parametrize("missing", ["-1", "-4", "-4.0", ""])
def test_sentinels_are_missing(missing: str, bare: Path) -> None:
    table(bare / "PTDEMOG_01Jan2026.csv", "PTID,PTGENDER,PTHAND,PTEDUCAT", f"{PERSON},{missing},{missing},{missing}")
    for name, column in (("MMSE", "MMSCORE"), ("CDR", "CDGLOBAL"), ("MOCA", "MOCA"), ("GDSCALE", "GDTOTAL")):
        table(bare / f"{name}_01Jan2026.csv", f"PTID,VISCODE,VISDATE,{column}", f"{PERSON},bl,2010-05-04,{missing}")
    table(bare / "DXSUM_01Jan2026.csv", "PTID,VISCODE,EXAMDATE,DIAGNOSIS", f"{PERSON},bl,2010-05-04,{missing}")
    table(bare / "APOERES_01Jan2026.csv", "PTID,APGEN1,APGEN2", f"{PERSON},{missing},{missing}")
    table(
        bare / "ADNIMERGE_01Jan2026.csv", MERGE, f"{PERSON},bl,2010-05-04,,,{missing},{missing},,{missing},{missing},"
    )
    assert by_year(bare)["2010"] == {"site": "002"}


@pytest.mark.parametrize(
    ("header", "cells", "count"),
    [
        ("APGEN1,APGEN2", "3,4", 1), ("APGEN1,APGEN2", "4.0,4.0", 2), ("APGEN1,APGEN2", "3.0,2.0", 0),
        ("APGEN1,APGEN2", "-4,4", None), ("GENOTYPE", "3/4", 1), ("GENOTYPE", "34.0", 1), ("GENOTYPE", "E4/E4", 2),
    ],
)  # fmt: skip
def test_apoe(header: str, cells: str, count: int | None, bare: Path) -> None:
    table(bare / "APOERES_01Jan2026.csv", f"PTID,{header}", f"{PERSON},{cells}")
    assert by_year(bare)["2010"].get("apoe_e4_count") == count


@pytest.mark.parametrize(
    ("column", "text", "diagnosis"),
    [
        *(("DXCHANGE", str(i + 1), d) for i, d in enumerate(["HC", "MCI", "AD", "MCI", "AD", "AD", "HC", "MCI", "HC"])),
        *(("DXCURREN", str(i + 1), d) for i, d in enumerate(["HC", "MCI", "AD"])),
        *(("DIAGNOSIS", str(i + 1), d) for i, d in enumerate(["HC", "MCI", "AD"])),
    ],
)
def test_diagnoses_of_all_phases(column: str, text: str, diagnosis: str, bare: Path) -> None:
    """The old table names people by RID and visits by VISCODE alone: REGISTRY has the dates."""
    table(bare / "REGISTRY_01Jan2020.csv", "RID,VISCODE,VISCODE2,EXAMDATE", "1,v21,m24,2012-06-03")
    columns = {"DIAGNOSIS": "-4", "DXCURREN": "-4", "DXCHANGE": "-4"} | {column: text}
    header = f"Phase,RID,VISCODE,EXAMDATE,{','.join(columns)}"
    stranger = f"ADNI2,999,v21,,{','.join(columns.values())}"
    table(bare / "DXSUM_PDXCONV_ADNIALL.csv", header, f"ADNI2,1,v21,,{','.join(columns.values())}", stranger)
    found = by_year(bare)
    assert (found["2012"]["diagnosis"], found["2012"]["diagnosis_source"]) == (diagnosis, "visit")
    assert "diagnosis" not in found["2010"]  # more than 180 days from the visit


@pytest.mark.parametrize(
    ("name", "header", "cells", "message"),
    [
        ("DXSUM", "PTID,VISCODE,EXAMDATE,DIAGNOSIS", f"{PERSON},bl,2010-05-20,7", "DXSUM DIAGNOSIS has the code '7'"),
        ("DXSUM", "PTID,VISCODE,EXAMDATE,DXCURREN", f"{PERSON},bl,2010-05-20,5", "DXSUM DXCURREN has the code '5'"),
        ("DXSUM", "PTID,VISCODE,EXAMDATE,DX", f"{PERSON},bl,2010-05-20,1", "DXSUM lacks the column DIAGNOSIS"),
        ("GDSCALE", "PTID,VISCODE,VISDATE,TOTAL", f"{PERSON},bl,2010-05-20,1", "lacks the column GDTOTAL"),
        ("MMSE", "SUBJECT,VISCODE,VISDATE,MMSCORE", "1,bl,2010-05-20,1", "lacks the columns PTID and RID"),
        ("CDR", "PTID,VISCODE,VISDATE,CDGLOBAL", f"{PERSON},bl,,1", "no visit of table CDR has a date"),
        ("MOCA", "PTID,VISCODE,VISDATE,TRAILS", f"{PERSON},bl,2010-05-20,1", "MOCA has neither the total MOCA nor"),
        ("APOERES", "PTID,APGEN1,APGEN2", f"{PERSON},3,5", "genotype '3/5'"),
        ("APOERES", "PTID,APOE", f"{PERSON},3", "lacks the column APGEN1"),
        ("PTDEMOG", "PTID,PTGENDER,PTHAND,PTEDUCAT", f"{PERSON},3,1,12", "PTDEMOG PTGENDER has the code '3'"),
    ],
)
def test_what_is_not_known_is_refused(name: str, header: str, cells: str, message: str, bare: Path) -> None:
    table(bare / f"{name}_01Jan2026.csv", header, cells)
    with pytest.raises(G3nError, match=message):
        load_cohort("adni").phenotypes(bare, "clean")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "not one of the archive's descriptions"),
        ("<!DOCTYPE a><a/>", "not one of the archive's descriptions"),
        ("<project>", "damaged XML"),
        (XML.replace("<subjectSex>F", "<subjectSex>2.5"), "XML subjectSex has the code '2.5'"),
    ],
)
def test_xml_that_is_not_the_archives_is_refused(text: str, message: str, bare: Path) -> None:
    (bare / "ADNI_x.xml").write_text(text)
    with pytest.raises(G3nError, match=message):
        load_cohort("adni").phenotypes(bare, "clean")
    (bare / "ADNI_x.xml").write_text(XML.replace(">MCI<", ">Phantom<"))
    with pytest.raises(G3nError, match="XML researchGroup has the code 'Phantom'"):
        load_cohort("adni").phenotypes(bare, "paper")


MERGE = "PTID,VISCODE,EXAMDATE,DX_bl,DX,AGE,Years_bl,PTGENDER,APOE4,MMSE,CDRSB"


def test_merge_gives_the_age_at_the_visit(bare: Path) -> None:
    first = f"{PERSON},bl,2010-05-02,LMCI,MCI,75.0,,Female,1,28,1.5"
    later = f"{PERSON},m24,2012-06-02,LMCI,Dementia,75.0,2.1,Female,1,20,4.5"
    table(bare / "ADNIMERGE_01Jan2026.csv", MERGE, first, later)
    found = by_year(bare)
    assert [v["age_years"] for v in found.values()] == [75.0, 77.1]
    assert [v["diagnosis"] for v in found.values()] == ["MCI", "AD"]
    assert (found["2012"]["cdr_sb"], found["2012"]["apoe_e4_count"], found["2012"]["sex"]) == (4.5, 1, "F")
    table(bare / "ADNIMERGE_01Jan2026.csv", MERGE, first, later.replace(",2.1,", ",,"))
    assert "age_years" not in by_year(bare)["2012"]  # never the age at baseline


@pytest.mark.parametrize(
    ("group", "diagnosis"),
    [("CN", "HC"), ("SMC", "HC"), ("EMCI", "MCI"), ("LMCI", "MCI"), ("MCI", "MCI"), ("AD", "AD")],
)
def test_groups_at_enrollment(group: str, diagnosis: str, bare: Path) -> None:
    row = f"{PERSON},bl,2010-05-02,{group},Dementia,75.0,0,Female,1,28,1.5"
    table(bare / "ADNIMERGE_01Jan2026.csv", MERGE, row)
    assert by_year(bare, "paper")["2012"]["diagnosis"] == diagnosis  # years later too
    assert by_year(bare)["2010"]["diagnosis"] == "AD"
    assert "diagnosis" not in by_year(bare)["2012"]


def test_moca_without_its_total_is_summed() -> None:
    def score(**change: str) -> float | None:
        return cognition(PERFECT | change, ("-1", "-4"))

    assert score() == 30
    assert score(LETTERS="1", FFLUENCY="11") == 30
    assert score(LETTERS="2", FFLUENCY="10") == 28  # errors, words
    assert [score(**{f"SERIAL{i}": "0" for i in range(n, 6)}) for n in (5, 4, 3, 2, 1)] == [30, 29, 29, 28, 27]
    assert score(DELW1="2", DELW2="3", DELW3="0") == 27  # with a cue is not without
    assert score(TRAILS="-4") is None
    assert score(MOCA="22") == 22
    assert score(MOCA="") == 30
    assert cognition({"MOCA": "-1"}, ("-1", "-4")) is None
    with pytest.raises(G3nError, match="MOCA LION has the code '3'"):
        score(LION="3")
    assert VALUES["moca"].high == 30  # type: ignore[union-attr]
