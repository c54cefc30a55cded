"""ABIDE, ADHD-200, CoRR, FCON1000, HBN, NKI: opposite sex codes, sentinels, ids that repeat or lose their zeros."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_prep.cohort_scan import scan_cohort
from data_prep.cohorts import load_cohort
from data_prep.manifest import Scan, read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import images, joined, table, touch

# Of each cohort a table, its header, a row of person {n} and sex {sex}, that person's image, and the codes of man and woman.
SMALL = {
    "abide1": (
        "Phenotypic_V1_0b.csv", "SITE_ID,SUB_ID,DX_GROUP,AGE_AT_SCAN,SEX,DSM_IV_TR,HANDEDNESS_CATEGORY",
        "NYU,509{n},1,11.2,{sex},1,R", "NYU/sub-00509{n}/anat/sub-00509{n}_T1w.nii.gz", "1", "2",
    ),
    "abide2": (
        "ABIDEII_Composite_Phenotypic.csv", "SUB_ID,SITE_ID,DX_GROUP,AGE_AT_SCAN ,SEX,HANDEDNESS_CATEGORY",
        "286{n},ABIDEII-BNI_1,2,9.5,{sex},1",
        "ABIDEII-BNI_1/sub-286{n}/ses-1/anat/sub-286{n}_ses-1_run-1_T1w.nii.gz", "1", "2",
    ),
    "adhd200": (
        "adhd200_preprocessed_phenotypics.csv", "ScanDir ID,Site,Gender,Age,Handedness,DX",
        "100{n},1,{sex},10.5,1,0", "Peking_1/sub-00100{n}/ses-1/anat/sub-00100{n}_ses-1_T1w.nii.gz", "1", "0",
    ),
    "corr": (
        "CoRR_AggregatedPhenotypicData.csv", "SITE,SUBID,SESSION,SEX,AGE_AT_SCAN_1,HANDEDNESS",
        "UM,250{n},Baseline,{sex},64.0,R", "sub-00250{n}/ses-1/anat/sub-00250{n}_ses-1_run-1_T1w.nii.gz", "2", "1",
    ),
    "fcon1000": (
        "Oulu_participants.tsv", "participant_id\tage\tsex\thanded", "sub-010{n}\t22\t{sex}\tR",
        "Oulu/derivatives/sub-010{n}_T1w_brain.nii.gz", "M", "F",
    ),
    "hbn": (
        "participants-SI.tsv", "participant_id\tSex\tAge\tEHQ_Total\tCommercial_Use\tFull_Pheno",
        "sub-NDARAA{n}BCDE\t{sex}\t9.5\t60\tYes\tYes", "sub-NDARAA{n}BCDE/anat/sub-NDARAA{n}BCDE_desc-preproc_T1w.nii.gz",
        "0", "1",
    ),
    "nki": (
        "participants.tsv", "participant_id\tage\tsex\thandedness", "A000000{n}\t33.5\t{sex}\tRIGHT",
        "sub-A000000{n}/ses-BAS1/anat/sub-A000000{n}_ses-BAS1_T1w.nii.gz", "MALE", "FEMALE",
    ),
    "schizconnect": (
        "SCHIZO_metadata.tsv", "eid\tstudy\tage\tsex\tdx", "A000000{n}\tCOBRE\t40\t{sex}\tSchizoaffective",
        "A000000{n}/T1.nii.gz", "male", "female",
    ),
}  # fmt: skip
SHARES = {"abide1": 0.15, "abide2": 0.22, "adhd200": 0.39, "hbn": 0.36}


def fill(name: str, root: Path, sexes: list[str]) -> None:
    """Images and a table of as many people."""
    file, header, row, image, *_ = SMALL[name]
    touch(root, *(image.format(n=i) for i in range(10, 10 + len(sexes))))
    table(root / file, header, *(row.format(n=i, sex=sex) for i, sex in enumerate(sexes, 10)))


def manifest(name: str, root: Path) -> list[Scan]:
    scan_cohort(root, name, root.parent / "m.tsv", "clean", Shares(0, 0, 0))
    return list(read_manifest(root.parent / "m.tsv").scans)


@pytest.mark.parametrize("name", SMALL)
def test_sexes_are_read_by_the_cohorts_own_codes_and_a_new_code_stops(name: str, tmp_path: Path) -> None:
    *_, man, woman = SMALL[name]
    fill(name, tmp_path, [man, woman])
    found = joined(name, tmp_path)[0]
    assert [found[path].values["sex"] for path in sorted(found)] == ["M", "F"]
    fill(name, tmp_path, [man, "7"])
    with pytest.raises(G3nError, match=r"(?i)(sex|gender) has the code '7'"):
        joined(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "space"),
    [("abide1", "native_defaced"), ("abide2", "native_defaced"), ("adhd200", "native_defaced"), ("corr", "native_defaced"),
     ("fcon1000", "native_stripped"), ("hbn", "mni"), ("nki", "native_defaced"), ("schizconnect", "native_stripped")],
)  # fmt: skip
def test_images_and_tables_with_the_needed_columns_alone(name: str, space: str, tmp_path: Path) -> None:
    fill(name, tmp_path, [SMALL[name][4]])
    [image] = images(name, tmp_path).values()
    assert (image.modality, image.session, image.run, image.space) == ("T1", "BAS1" if name == "nki" else "1", 1, space)
    needed = {"adhd200": 1, "fcon1000": 1, "hbn": 1, "nki": 1}.get(name, 5)
    file = tmp_path / SMALL[name][0]
    split = "\t" if "\t" in SMALL[name][1] else ","
    table(file, *(split.join(line.split(split)[:needed]) for line in file.read_text().splitlines()))
    [found] = joined(name, tmp_path)[0].values()
    assert found.matched
    assert "handedness" not in found.values


# Of each cohort a column, what it tells, and every code with its meaning.
_NONE = {"-9999": None, "": None}
CODES = [
    ("abide1", "SEX", "sex", {"1": "M", "2": "F", **_NONE}),
    ("abide1", "DX_GROUP", "diagnosis", {"1": "ASD", "2": "HC"}),
    ("abide1", "AGE_AT_SCAN", "age_years", {"-9999": None, "-9999.0": None, "": None, "64.0": 64}),
    ("abide1", "HANDEDNESS_CATEGORY", "handedness", {"R": "R", "L": "L", "Ambi": "A", "Mixed": "A", "L->R": "A", **_NONE}),
    ("abide1", "DSM_IV_TR", "diagnosis_detail",
     {"0": None, "1": "autism", "2": "Asperger", "3": "PDD-NOS", "4": "Asperger or PDD-NOS", **_NONE}),
    ("abide2", "SEX", "sex", {"1": "M", "2": "F", **_NONE}),
    ("abide2", "DX_GROUP", "diagnosis", {"1": "ASD", "2": "HC"}),
    ("abide2", "AGE_AT_SCAN ", "age_years", {"-9999": None, "": None, "5.13": 5.13}),
    ("abide2", "HANDEDNESS_CATEGORY", "handedness", {"1": "R", "2": "L", "3": "A", "3.0": "A", **_NONE}),
    ("adhd200", "Gender", "sex", {"0": "F", "1": "M", "Female": "F", "Male": "M", "-999": None, "": None}),
    ("adhd200", "DX", "diagnosis",
     {"0": "HC", "1": "ADHD", "2": "ADHD", "3": "ADHD", "pending": None, "withheld": None, "-999": None, "": None,
      "Typically Developing Children": "HC", "ADHD-Combined": "ADHD", "ADHD-Hyperactive/Impulsive": "ADHD",
      "ADHD-Inattentive": "ADHD"}),
    ("adhd200", "Age", "age_years", {"-999": None, "-999.0": None, "": None, "7.17": 7.17}),
    ("adhd200", "Handedness", "handedness",
     {"0": "L", "1": "R", "2": "A", "3": None, "L": "L", "R": "R", "Left": "L", "Right": "R", "Ambidextrous": "A",
      "-999": None, "": None}),
    ("adhd200", "Site", "site",
     {"1": "Peking", "2": "Brown", "3": "KKI", "4": "NeuroIMAGE", "5": "NYU", "6": "OHSU", "7": "Pittsburgh",
      "8": "WashU", "Peking_1": "Peking", "Peking_2": "Peking", "Peking_3": "Peking", "NYU": "NYU", "-999": None}),
    ("corr", "SEX", "sex", {"1": "F", "2": "M", "M": "M", "F": "F", "#": None}),
    ("corr", "AGE_AT_SCAN_1", "age_years", {"#": None, "": None, "6.5": 6.5}),
    ("fcon1000", "age", "age_years", {"9999": None, "-1": None, "20-25": None, "n/a": None, "22": 22, "22.5": 22.5}),
    ("fcon1000", "sex", "sex", {"M": "M", "F": "F", "male": "M", "female": "F", "Female": "F", "n/a": None}),
    ("fcon1000", "handed", "handedness",
     {"R": "R", "right": "R", "L": "L", "left": "L", "A": "A", "ambidextrous": "A", "9999": None}),
    ("hbn", "Sex", "sex", {"0": "M", "1": "F", "1.0": "F", "male": "M", "female": "F", "M": "M", "F": "F", "": None}),
    ("hbn", "EHQ_Total", "handedness", {"100": "R", "40.1": "R", "40": "A", "0": "A", "-40": "A", "-40.1": "L", "": None}),
    ("hbn", "Commercial_Use", "commercial_use",
     {"Yes": "yes", "No": "no", "TRUE": "yes", "False": "no", "1": "yes", "0": "no", "": None}),
    ("nki", "sex", "sex", {"MALE": "M", "FEMALE": "F", "M": "M", "F": "F", "n/a": None}),
    ("nki", "handedness", "handedness",
     {"RIGHT": "R", "LEFT": "L", "AMBIDEXTROUS": "A", "R": "R", "L": "L", "A": "A", "n/a": None}),
    ("schizconnect", "sex", "sex", {"male": "M", "female": "F", "": None}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "column", "variable", "meaning"), [pytest.param(*c, id=f"{c[0]}-{c[1].strip()}") for c in CODES]
)
def test_every_code(name: str, column: str, variable: str, meaning: dict[str, object], tmp_path: Path) -> None:
    """A sentinel is missing, not a value that its range drops: nothing is noted. An unknown code stops."""
    file, header, row, image, man, _ = SMALL[name]
    path = image.format(n=10)
    touch(tmp_path, path)
    split = "\t" if "\t" in header else ","
    cells = row.format(n=10, sex=man).split(split)
    where = header.split(split).index(column)
    for code, value in meaning.items():
        cells[where] = code
        table(tmp_path / file, header, split.join(cells))
        found, report = joined(name, tmp_path)
        assert found[path].values.get(variable) == value, code
        assert not [note for note in report.notes if "missing" in note]
    cells[where] = "?what"
    table(tmp_path / file, header, split.join(cells))
    if column == "handed":  # written in many ways, and no label
        assert "handedness" not in joined(name, tmp_path)[0][path].values
    else:
        with pytest.raises(G3nError, match=rf"{column.strip()}.* '\?what'"):
            joined(name, tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_the_published_mode_changes_nothing_here(name: str, tmp_path: Path) -> None:
    """Sexes of CoRR, schizoaffective disorder, FCON's ids and first hits are never read as they were published."""
    *_, man, woman = SMALL[name]
    fill(name, tmp_path, [man, woman])
    assert joined(name, tmp_path, "paper")[0] == joined(name, tmp_path, "clean")[0]


@pytest.mark.parametrize("name", SHARES)
def test_inverted_sexes_are_noticed(name: str, tmp_path: Path) -> None:
    *_, man, woman = SMALL[name]
    women = round(60 * SHARES[name])
    fill(name, tmp_path, [woman] * women + [man] * (60 - women))
    assert joined(name, tmp_path)[1].warnings == []
    fill(name, tmp_path, [man] * women + [woman] * (60 - women))
    assert f"expected about {SHARES[name]:.0%}; are the sex codes" in joined(name, tmp_path)[1].warnings[0]


@pytest.mark.parametrize(
    ("name", "floor", "license_tag"),
    [("abide1", 0.99, "nc"), ("abide2", 0.92, "nc"), ("adhd200", 0.96, "nc"), ("corr", 0.8, "open"),
     ("fcon1000", 0.97, "open"), ("hbn", 0.99, "nc"), ("nki", 0.6, "nc"), ("schizconnect", 0.99, "dua")],
)  # fmt: skip
def test_too_few_rows_for_the_images_stop(name: str, floor: float, license_tag: str, tmp_path: Path) -> None:
    cohort = load_cohort(name)
    assert (cohort.min_match, cohort.license) == (floor, license_tag)
    *_, image, man, _ = SMALL[name]
    fill(name, tmp_path, [man])
    touch(tmp_path, image.format(n=98), image.format(n=99))
    with pytest.raises(G3nError, match=f"{name}: only 1 of 3 images found a row"):
        joined(name, tmp_path)


@pytest.mark.parametrize("name", ["abide1", "abide2", "adhd200", "corr"])
def test_an_id_or_age_that_is_no_number_is_named(name: str, tmp_path: Path) -> None:
    file, header, row, *_ = SMALL[name]
    table(tmp_path / file, header, row.format(n="x", sex="1"))
    with pytest.raises(G3nError, match=rf"{file} .*ID is '\w+x'; expected a subject's number"):
        load_cohort(name).phenotypes(tmp_path, "clean")
    table(tmp_path / file, header, re.sub(r"\d+\.\d", "old", row.format(n=10, sex="1")))
    with pytest.raises(G3nError, match=rf"{file} A\w+ is 'old', which is not a number"):
        load_cohort(name).phenotypes(tmp_path, "clean")


ABIDE1 = "SITE_ID,SUB_ID,FILE_ID,DX_GROUP,DSM_IV_TR,AGE_AT_SCAN,SEX,HANDEDNESS_CATEGORY,FIQ"


def test_abide1(tmp_path: Path) -> None:
    nyu, cmu = "NYU/sub-0050952/anat/sub-0050952_T1w.nii.gz", "CMU_a/sub-0050642/anat/sub-0050642_T1w.nii.gz"
    touch(tmp_path, nyu, cmu)
    rows = ["NYU,50952,no_filename,1,0,11.2,1,-9999,-9999", "CMU,50642,CMU_a_0050642,2,0,-9999,2,Ambi,110"]
    rows += ["UCLA_1,51201,no_filename,1,,12,1,,"]  # ten people have no T1
    table(tmp_path / "Phenotypic_V1_0b.csv", ABIDE1, *rows)
    found, report = joined("abide1", tmp_path)
    assert not [note for note in report.notes if "missing" in note]
    assert found[nyu].values == {
        "diagnosis": "ASD",  # by DX_GROUP: DSM_IV_TR is 0
        "diagnosis_source": "visit",
        "sex": "M",
        "age_years": 11.2,
        "site": "NYU",
    }
    values = found[cmu].values
    assert (values["diagnosis"], values["sex"], values["handedness"], values["site"]) == ("HC", "F", "A", "CMU")
    assert "age_years" not in values
    assert found[cmu].image.space == "native_defaced"
    assert "1 subjects of the tables have no image here" in report.notes


def test_abide_as_nitrc_packs_it(tmp_path: Path) -> None:
    nitrc = "MaxMun_a_0051318/session_1/anat/NIfTI/mprage.nii.gz"
    bids = "RawDataBIDS/NYU/sub-0050952/ses-2/anat/sub-0050952_ses-2_run-2_T1w.nii.gz"
    raw = "RawDataBIDS/NYU/sub-0050953/anat/sub-0050953_T1w.nii.gz"
    touch(tmp_path, nitrc, bids, raw, "NYU_0050953/anat/NIfTI/mprage.nii.gz", "NYU_0050953/rest/NIfTI/rest.nii.gz")
    found = images("abide1", tmp_path)
    assert {(p, i.subject, i.site, i.modality, i.session, i.run) for p, i in found.items()} == {
        (nitrc, "51318", "MaxMun_a", "T1", "1", 1),
        (bids, "50952", "NYU", "T1", "2", 2),
        (raw, "50953", "NYU", "T1", "1", 1),  # NITRC's is the same head
    }
    second = tmp_path / "two"
    touch(second, *(f"BNI_29006_{n}/{m}_1/NIfTI-1/{m}.nii.gz" for n in (1, 2) for m in ("anat", "flair", "rest")))
    keys = [(i.subject, i.site, i.modality, i.session, i.run) for i in images("abide2", second).values()]
    assert sorted(keys) == [("29006", "BNI", m, s, 1) for m in ("FLAIR", "T1") for s in "12"]


ABIDE2 = (
    "SITE_ID,SUB_ID,NDAR_GUID,DX_GROUP,PDD_DSM_IV_TR,ASD_DSM_5,AGE_AT_SCAN ,SEX,HANDEDNESS_CATEGORY,AGE_AT_MPRAGE,NOTE"
)
ABIDE2_LONG = ABIDE2.replace("NDAR_GUID", "NDAR_GUID,SESSION")


def test_abide2(tmp_path: Path) -> None:
    base = "ABIDEII-BNI_1/sub-28675/ses-1/anat/sub-28675_ses-1"
    touch(tmp_path, *(f"{base}_{name}.nii.gz" for name in ("run-1_T1w", "acq-x_run-2_T1w", "run-1_FLAIR", "dwi")))
    touch(tmp_path, "ABIDEII-BNI_1/sub-28676/ses-1/anat/sub-28676_ses-1_run-1_T1w.nii.gz")
    rows = ["ABIDEII-BNI_1,28675,x,1,1,1,9.0,2,3,9.2,é", "ABIDEII-BNI_1,28676,x,2,0,0,10.5,1,,,"]
    table(tmp_path / "ABIDEII_Composite_Phenotypic.csv", ABIDE2, *rows, encoding="latin-1")
    found = joined("abide2", tmp_path)[0]
    assert {(i.modality, i.run, i.acq) for i in images("abide2", tmp_path).values() if i.subject == "28675"} == {
        ("T1", 1, ""), ("T1", 2, "x"), ("FLAIR", 1, "")
    }  # fmt: skip
    values = found[f"{base}_run-1_T1w.nii.gz"].values
    assert (values["age_years"], values["sex"], values["diagnosis"]) == (9.2, "F", "ASD")  # the age at this scan
    assert (values["handedness"], values["site"]) == ("A", "BNI_1")
    other = found["ABIDEII-BNI_1/sub-28676/ses-1/anat/sub-28676_ses-1_run-1_T1w.nii.gz"].values
    assert (other["age_years"], other["sex"], other["diagnosis"]) == (10.5, "M", "HC")
    assert "handedness" not in other


def test_abide2_follow_ups(tmp_path: Path) -> None:
    base = "ABIDEII-UCLA_Long/sub-51234"
    touch(tmp_path, *(f"{base}/ses-{s}/anat/sub-51234_ses-{s}_run-1_T1w.nii.gz" for s in (1, 2)))
    table(tmp_path / "ABIDEII_Composite_Phenotypic.csv", ABIDE2, "ABIDEII-BNI_1,28675,x,1,,,9,1,1,,")
    rows = [f"ABIDEII-UCLA_Long,51234,x,{s},1,1,1,{age},1,2,," for s, age in (("Baseline", 9.5), ("Followup_1", 12.5))]
    table(tmp_path / "ABIDEII_Long_Composite_Phenotypic.csv", ABIDE2_LONG, *rows, encoding="latin-1")
    found = {j.image.session: j for j in joined("abide2", tmp_path)[0].values()}
    assert [found[s].values["age_years"] for s in "12"] == [9.5, 12.5]
    assert {j.values["handedness"] for j in found.values()} == {"L"}
    assert {j.group for j in found.values()} == {"abide:51234"}
    first = tmp_path / "one"
    touch(first, "UCLA_1/sub-0051234/anat/sub-0051234_T1w.nii.gz")
    assert [i.person for i in images("abide1", first).values()] == ["abide:51234"]  # who came in ABIDE I
    table(tmp_path / "ABIDEII_Long_Composite_Phenotypic.csv", ABIDE2_LONG, rows[0].replace("Baseline", "Visit 2"))
    with pytest.raises(G3nError, match="SESSION is 'Visit 2'; expected Baseline or Followup_<n>"):
        joined("abide2", tmp_path)
    table(tmp_path / "ABIDEII_Long_Composite_Phenotypic.csv", ABIDE2_LONG, rows[0].replace(",1,2,,", ",1,R,,"))
    with pytest.raises(G3nError, match="HANDEDNESS_CATEGORY has the code 'R'"):
        joined("abide2", tmp_path)


ADHD = "ScanDir ID, Site,Gender ,Age,Handedness,DX,Secondary Dx ,ADHD Index,Inattentive,Hyper/Impulsive,Med Status,QC_Anatomical_1"


def adhd_values(root: Path, *rows: str, file: str = "adhd200_preprocessed_phenotypics.csv") -> dict[str, dict]:
    """Values of each subject named in ``rows``."""
    table(root / file, ADHD, *rows, encoding="latin-1")
    for number in (row.split(",")[0].zfill(7) for row in rows):
        touch(root, f"raw/sub-{number}/ses-1/anat/sub-{number}_ses-1_T1w.nii.gz")
    return {j.image.subject: j.values for j in joined("adhd200", root)[0].values()}


def test_adhd200(tmp_path: Path) -> None:
    rows = ["10001,5,0,12.3,0.85,3,é,-999,,,,1", "26001,2,1,-999,1,pending,,-999,,,,", "10002,5,1,9,1,1,,,,,,"]
    rows += ["1018959,3,1,9.5,2,0,,,,,,", "16000,6,-999,8,-999,2,,,,,,", "15001,8,0,9,L,-999,,,,,,"]
    found = adhd_values(tmp_path, *rows, rows[0])  # NYU, Peking and Pittsburgh list test subjects twice
    nyu, brown = found["10001"], found["26001"]
    assert (nyu["sex"], nyu["diagnosis"], nyu["site"], nyu["age_years"]) == ("F", "ADHD", "NYU", 12.3)
    assert (brown["sex"], brown["handedness"], brown["site"]) == ("M", "R", "Brown")
    assert not {"diagnosis", "age_years"} & set(brown)
    assert not any("handedness" in found[s] for s in ("10001", "10002"))  # scores from -1 to 1 at NYU, 1 too
    assert (found["1018959"]["handedness"], found["1018959"]["diagnosis"], found["1018959"]["site"]) == (
        "A",
        "HC",
        "KKI",
    )
    assert not {"sex", "handedness"} & set(found["16000"])
    assert (found["15001"]["handedness"], found["15001"]["site"]) == ("L", "WashU")
    assert "diagnosis" not in found["15001"]
    assert found["16000"]["diagnosis"] == found["10002"]["diagnosis"] == "ADHD"


def test_adhd200_with_the_table_of_the_published_set(tmp_path: Path) -> None:
    touch(tmp_path, "sub-0010001/anat/sub-0010001_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz")
    table(tmp_path / "adhd200_preprocessed_phenotypics.tsv", ADHD.replace(",", "\t"), "10001\t3\t1\t9\t1\t2" + "\t" * 6)
    [found] = joined("adhd200", tmp_path)[0].values()
    assert (found.values["diagnosis"], found.values["site"], found.values["age_years"]) == ("ADHD", "KKI", 9)


def test_adhd200_labels_of_the_test_set_come_in_another_table(tmp_path: Path) -> None:
    touch(tmp_path, "NYU/sub-0021001/ses-1/anat/sub-0021001_ses-1_T1w.nii.gz")
    touch(tmp_path, "Peking_3/sub-1050345/ses-1/anat/sub-1050345_ses-1_acq-2_T1w.nii.gz")
    table(tmp_path / "NYU_TestRelease_phenotypic.csv", ADHD, "21001,5,1,10,0.2,withheld,,,,,,")
    table(tmp_path / "allSubs_testSet_phenotypic_dx.csv", "ID,Site,Gender,Age,Handedness,DX", "0021001,5,1,10,0.2,3")
    bids = "participant_id\tgender\tage\tdx\thandedness"
    table(tmp_path / "Peking_3/participants.tsv", bids, "1050345\tFemale\t11.5\tTypically Developing Children\tRight")
    found = {j.image.subject: j.values for j in joined("adhd200", tmp_path)[0].values()}
    assert (found["21001"]["diagnosis"], found["21001"]["sex"], found["21001"]["site"]) == ("ADHD", "M", "NYU")
    assert found["1050345"] == {
        "diagnosis": "HC", "diagnosis_source": "visit", "sex": "F", "age_years": 11.5, "handedness": "R", "site": "Peking"
    }  # fmt: skip
    for dx in ("ADHD-Combined", "ADHD-Hyperactive/Impulsive", "ADHD-Inattentive"):
        table(tmp_path / "Peking_3/participants.tsv", bids, f"1050345\tFemale\t11.5\t{dx}\tL")
        assert {j.values["diagnosis"] for j in joined("adhd200", tmp_path)[0].values()} == {"ADHD"}


def test_adhd200_site_numbers_must_fit_the_name_of_a_table(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="Site '1' is Peking here, but the table is named after KKI"):
        adhd_values(tmp_path, "10001,1,0,12,1,1,,,,,,", file="KKI_phenotypic.csv")
    (tmp_path / "KKI_phenotypic.csv").unlink()
    assert adhd_values(tmp_path, "10001,6,0,12,1,1,,,,,,", file="OHSU_phenotypic.csv")["10001"]["site"] == "OHSU"
    touch(tmp_path, "raw/sub-0010002/ses-1/anat/sub-0010002_ses-1_T1w.nii.gz")
    bids = "participant_id\tgender\tage\tdx\thandedness"
    table(tmp_path / "NYU/participants.tsv", bids, "sub-0010002\tMale\t11.5\tADHD-Combined\t1")
    found = {j.image.subject: j.values for j in joined("adhd200", tmp_path)[0].values()}["10002"]
    assert (found["site"], found.get("handedness")) == ("NYU", None)  # a score, here too


@pytest.mark.parametrize("name", ["adhd200", "corr"])
def test_fmriprep_keeps_the_skull_so_its_mask_goes_along(name: str, tmp_path: Path) -> None:
    prep, raw = "fmriprep/sub-0010001/anat/sub-0010001", "raw/sub-0010001/ses-1/anat/sub-0010001_ses-1"
    mni = f"{prep}_space-MNI152NLin2009cAsym"
    touch(tmp_path, f"{mni}_desc-preproc_T1w.nii.gz", f"{mni}_desc-brain_mask.nii.gz")
    touch(tmp_path, f"{mni}_res-2_desc-preproc_T1w.nii.gz", f"{prep}_desc-preproc_T1w.nii.gz")
    touch(tmp_path, f"{prep}_desc-brain_mask.nii.gz", f"{raw}_T1w.nii.gz", f"{mni}_label-GM_probseg.nii.gz")
    [image] = images(name, tmp_path).values()  # one head, once
    assert (image.path, image.subject, image.space) == (f"{mni}_desc-preproc_T1w.nii.gz", "10001", "mni")
    assert image.mask == f"{mni}_desc-brain_mask.nii.gz"
    plan = load_cohort(name).plan(image)
    assert (plan.use_mask, plan.space) == (True, "mni")
    for path in tmp_path.glob("fmriprep/*/anat/*MNI*"):
        path.unlink()
    [image] = images(name, tmp_path).values()
    assert (image.space, image.mask) == ("native_defaced", f"{prep}_desc-brain_mask.nii.gz")
    for path in tmp_path.glob("fmriprep/*/anat/*"):
        path.unlink()
    touch(tmp_path, f"{raw}_acq-2_run-2_T1w.nii.gz")
    found = [(i.path, i.run, i.acq, i.mask) for i in images(name, tmp_path).values()]
    assert sorted(found) == [(f"{raw}_T1w.nii.gz", 1, "", None), (f"{raw}_acq-2_run-2_T1w.nii.gz", 2, "2", None)]


CORR = "SITE,SUBID,SESSION,SEX,AGE_AT_SCAN_1,HANDEDNESS,RETEST_DESIGN,RETEST_DURATION"


def corr_values(root: Path, *rows: str) -> dict[tuple[str, str], dict]:
    """Values of the sessions 1 and 2 of each subject."""
    for subject in {row.split(",")[1] for row in rows}:
        name = f"sub-{subject.zfill(7)}"
        touch(root, *(f"{name}/ses-{s}/anat/{name}_ses-{s}_run-1_T1w.nii.gz" for s in (1, 2)))
    table(root / "CoRR_AggregatedPhenotypicData.csv", CORR, *(f"{row},,," for row in rows))
    return {(j.image.subject, j.image.session): j.values for j in joined("corr", root)[0].values()}


def test_corr_codes_women_as_1(tmp_path: Path) -> None:
    rows = ["UM,25001,Baseline,1,64.0", "UM,25001,Retest_1,1,#", "Utah_1,25002,Baseline,2,20.5"]
    rows += ["MRN_1,25003,Baseline,1,30.0", "MRN_1,25003,Retest_1,1,31.0", "KKI,25006,Baseline,F,22"]
    rows += ["Templeton114,25004,Baseline,1,30", "MRN-114,25005,Baseline,2,30", "NYU_1,25007,Baseline,#,#"]
    found = corr_values(tmp_path, *rows)
    sexes = [found[f"2500{i}", "1"].get("sex") for i in range(1, 8)]
    assert sexes == ["F", "M", "F", "M", "F", "F", None]  # two samples of Templeton are the other way round
    assert "age_years" not in found["25007", "1"]
    assert {v["diagnosis_source"] for v in found.values()} == {"cohort_default"}


def test_corr_ages_of_retests(tmp_path: Path) -> None:
    """The second row is not the first: authors who joined by subject alone gave every scan one age."""
    rows = ["UM,25001,Baseline,1,64.0", "UM,25001,Retest_1,1,#", "UM,25002,Baseline,1,30", "UM,25002,Retest_1,1,31.5"]
    found = corr_values(tmp_path, *rows, "UM,25003,Baseline,2,#", "UM,25003,Retest_1,2,50")
    ages = {key: (v.get("age_years"), v.get("age_precision")) for key, v in found.items()}
    assert ages == {
        ("25001", "1"): (64, "exact"), ("25001", "2"): (64, "enrol"),
        ("25002", "1"): (30, "exact"), ("25002", "2"): (31.5, "exact"),
        ("25003", "1"): (None, None), ("25003", "2"): (50, "exact"),
    }  # fmt: skip
    with pytest.raises(G3nError, match="SESSION is 'Followup'; expected Baseline or Retest_<n>"):
        corr_values(tmp_path, "UM,25001,Followup,1,64.0")


def test_corr_stops_where_sexes_are_inverted(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="1 of 2 subjects of Utah read as women"):
        corr_values(tmp_path, "Utah_1,25002,Baseline,1,20.5", "Utah_2,25001,Baseline,2,20")
    um = [f"UM,250{i},Baseline,{1 if i < 39 else 2},64" for i in range(10, 50)]  # 29 women of 40
    assert corr_values(tmp_path, *um)["25010", "2"]["sex"] == "F"
    inverted = [row.replace(",1,", ",0,").replace(",2,", ",1,").replace(",0,", ",2,") for row in um]
    with pytest.raises(G3nError, match="corr site UM: 28% of 40 subjects are women, expected about 72%"):
        corr_values(tmp_path, *inverted)
    swu = [
        f"SWU_{i % 4 + 1},250{i},Baseline,{1 if i < 33 else 2},20" for i in range(10, 60)
    ]  # 46 %: too near for an error
    corr_values(tmp_path, *swu)
    assert "corr site SWU: 46% of 50 subjects are women, expected about 54%" in joined("corr", tmp_path)[1].warnings[0]


def test_corr_as_nitrc_packs_it(tmp_path: Path) -> None:
    touch(tmp_path, *(f"BNU_1_0025864_{s}/anat_1/NIfTI/anat.nii.gz" for s in ("baseline", "retest_1", "retest_10")))
    found = [(i.subject, i.modality, i.session, i.run, i.space) for i in images("corr", tmp_path).values()]
    assert found == [("25864", "T1", s, 1, "native_defaced") for s in ("1", "2", "11")]


def test_fcon_ids_repeat_between_sites(tmp_path: Path) -> None:
    root = tmp_path / "fcon"
    for site in ("Beijing_Zang", "Leiden_2180"):
        derived = f"{site}/outputs/derivatives/skullstripping/sub-01018"
        touch(root, f"{derived}/sub-01018_T1w_brain.nii.gz", f"{derived}/sub-01018_T1w.nii.gz")
        touch(root, *(f"{site}/sub-01018/anat/mprage_{k}.nii.gz" for k in ("skullstripped", "anonymized")))
    table(root / "Beijing_Zang_participants.tsv", "participant_id\tage\tsex\thanded", "sub-01018\t22\tF\tR")
    table(root / "Leiden_2180/participants.tsv", "participant_id\tage\thandedness", "1018\t9999\tLeft")
    for mode in ("clean", "paper"):
        beijing, leiden = sorted(joined("fcon1000", root, mode)[0].values(), key=lambda j: j.image.path)
        assert (beijing.values["age_years"], beijing.values["sex"], beijing.values["site"]) == (22, "F", "Beijing_Zang")
        assert (beijing.values["handedness"], leiden.values["handedness"]) == ("R", "L")
        assert not {"age_years", "sex"} & set(leiden.values)  # a site without sexes
        assert beijing.group != leiden.group
        assert beijing.image.path.endswith("_T1w_brain.nii.gz")
    assert [s.subject for s in manifest("fcon1000", root)] == ["BeijingZang01018", "Leiden218001018"]


def test_fcon_ages_sexes_and_raw_images(tmp_path: Path) -> None:
    touch(tmp_path, *(f"ICBM/sub-0000{i}/anat/mprage_anonymized.nii.gz" for i in range(7)))
    touch(tmp_path, "ICBM/sub-00001/anat/mprage_skullstripped.nii.gz")
    rows = ["sub-00000\t9999\tM", "00001\t-1\tF", "2\t20-25\tmale", "sub3\t20.5\tfemale", "sub-00004\t130\tM"]
    table(tmp_path / "per_site/ICBM_participants.tsv", "participant_id\tage\tsex", *rows, "5\tn/a\tn/a", "6\t42\tM")
    found = {j.image.subject: j for j in joined("fcon1000", tmp_path)[0].values()}
    assert [found[f"0000{i}"].values.get("age_years") for i in range(7)] == [None, None, None, 20.5, None, None, 42]
    assert [found[f"0000{i}"].values.get("sex") for i in range(7)] == ["M", "F", "M", "F", "M", None, "M"]
    assert [found[f"0000{i}"].image.space for i in (0, 1)] == ["native_defaced", "native_stripped"]
    table(tmp_path / "per_site/ICBM_participants.tsv", "Subject\tage\tsex", *rows, "5\tn/a\tn/a", "6\t42\tM")
    assert all(j.matched for j in joined("fcon1000", tmp_path)[0].values())
    table(tmp_path / "per_site/ICBM_participants.tsv", "age\tsex", "20\tM")
    with pytest.raises(G3nError, match="lacks the column participant_id"):
        joined("fcon1000", tmp_path)


HBN = "participant_id,Sex,Age,EHQ_Total,Commercial_Use,Full_Pheno"
POD2 = "subject_id\tscan_site_id\tsex\tage\tehq_total\tcommercial_use\tfull_pheno\texpert_qc_score\txgb_qc_score\tdl_qc_score"


def test_hbn_codes_women_as_1_and_its_tsv_may_be_csv(tmp_path: Path) -> None:
    raw = "Site-SI/sub-NDARAA123BCD/anat/sub-NDARAA123BCD_acq-HCP_run-02_T1w.nii.gz"
    prep = "qsiprep/sub-NDARBB456CDE/anat/sub-NDARBB456CDE_desc"
    touch(tmp_path, raw, f"{prep}-preproc_T1w.nii.gz", f"{prep}-brain_mask.nii.gz")
    table(tmp_path / "participants-SI.tsv", HBN, "sub-NDARAA123BCD,0,9.5,-60,Yes,Yes")
    table(tmp_path / "participants-RU.tsv", HBN.replace(",", "\t"), "sub-NDARBB456CDE\t1\t12.25\t10\tNo\tYes")
    found = {j.image.subject: j for j in joined("hbn", tmp_path)[0].values()}
    boy, girl = found["sub-NDARAA123BCD"], found["sub-NDARBB456CDE"]
    assert boy.values == {
        "sex": "M", "age_years": 9.5, "handedness": "L", "commercial_use": "yes", "site": "SI", "field_strength_t": 1.5,
        "diagnosis": "PED_MIXED", "diagnosis_source": "cohort_default",
    }  # fmt: skip
    assert (boy.image.acq, boy.image.run, boy.image.space) == ("HCP", 2, "native_defaced")
    assert (girl.values["sex"], girl.values["handedness"], girl.values["commercial_use"]) == ("F", "A", "no")
    assert (girl.values["site"], girl.values["field_strength_t"]) == ("RU", 3)
    assert (girl.image.space, girl.image.mask) == ("mni", f"{prep}-brain_mask.nii.gz")


def test_hbn_with_qsipreps_table(tmp_path: Path) -> None:
    name = "sub-NDARAA123BCD"
    touch(tmp_path, f"{name}/anat/{name}_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz")
    touch(tmp_path, f"raw/{name}/ses-HBNsiteCBIC/anat/{name}_ses-HBNsiteCBIC_acq-HCP_T1w.nii.gz")
    table(tmp_path / "participants.csv", POD2, f"{name}\tCBIC\tfemale\t8.1\t50\tTrue\t1\t\t0.9\t0.8")
    [only] = joined("hbn", tmp_path)[0].values()  # what qsiprep made, not the raw head too
    assert only.image.space == "mni"
    assert (only.values["sex"], only.values["site"], only.values["field_strength_t"]) == ("F", "CBIC", 3)
    assert (only.values["handedness"], only.values["commercial_use"]) == ("R", "yes")
    for header, cells, words in (
        (POD2, "XX\tmale\t8\t\tTrue", "scan_site_id has the code 'XX'"),
        (POD2, "RU\tmale\told\t\tTrue", "Age is 'old'"),
        (POD2.replace("subject_id", "who"), "RU\tmale\t8\t\tTrue", "lacks the column participant_id or subject_id"),
    ):
        table(tmp_path / "participants.csv", header, f"{name}\t{cells}\t1\t\t\t")
        with pytest.raises(G3nError, match=words):
            joined("hbn", tmp_path)


def test_hbn_counts_acq_hcp_before_vnav(tmp_path: Path) -> None:
    root, name = tmp_path / "hbn", "sub-NDARAA123BCD"
    for acq in ("VNav", "VNavNorm", "HCP_run-01", "HCP_run-02"):
        touch(root, f"Site-CUNY/{name}/anat/{name}_acq-{acq}_T1w.nii.gz")
    table(root / "participants-CUNY.tsv", HBN, f"{name},0,9.5,,,")
    scans = sorted(manifest("hbn", root), key=lambda s: s.run)
    assert [s.path.split("_acq-")[1] for s in scans] == [
        "HCP_run-01_T1w.nii.gz", "HCP_run-02_T1w.nii.gz", "VNav_T1w.nii.gz", "VNavNorm_T1w.nii.gz"
    ]  # fmt: skip
    assert [s.run for s in scans] == [1, 2, 3, 4]
    assert "commercial_use" not in scans[0].phenotypes
    assert {(s.phenotypes["site"], s.field_strength_t) for s in scans} == {("CUNY", 3)}


NKI = "participant_id\tage\tsex\thandedness"


def test_nki_and_nki2_share_people(tmp_path: Path) -> None:
    one, two = tmp_path / "nki", tmp_path / "nki2"
    name = "sub-A00012345/ses-{0}/anat/sub-A00012345_ses-{0}_T1w.nii.gz"
    touch(one, name.format("BAS1"), name.format("FLU1"), name.format("BAS1").replace("_T1w", "_desc-preproc_T1w"))
    touch(two, name.format("MRI1"), name.format("MRI1").replace("A00012345", "A00099999"))
    table(one / "participants.tsv", NKI, "A00012345\t33.5\tFEMALE\tRIGHT")
    table(two / "nki_participants.tsv", NKI, "A00012345\t33.5\tFEMALE\tRIGHT")
    table(two / "participants.tsv", "participant_id", "sub-A00012345", "sub-A00099999")  # ids alone
    first, second = joined("nki", one)[0], joined("nki2", two)[0]
    assert {j.group for j in first.values()} == {"nki:A00012345"}
    assert {j.group for j in second.values()} == {"nki:A00012345", "nki:A00099999"}
    assert set(first) == {name.format("BAS1"), name.format("FLU1")}
    values = first[name.format("FLU1")].values
    assert (values["age_years"], values["age_precision"], values["sex"]) == (33.5, "enrol", "F")
    assert (values["diagnosis"], values["diagnosis_source"]) == ("HC", "cohort_default")
    assert {j.image.space for j in first.values()} == {"native_defaced"}
    assert {j.image.space for j in second.values()} == {"mni"}
    assert second[name.format("MRI1")].values["age_years"] == 33.5
    blank = second[name.format("MRI1").replace("A00012345", "A00099999")].values
    assert (blank["diagnosis_source"], blank.get("age_years"), blank.get("sex")) == ("cohort_default", None, None)


def test_nki_ages_of_visits_where_a_table_has_them(tmp_path: Path) -> None:
    root = tmp_path / "nki"
    name = "sub-A00012345/ses-{0}/anat/sub-A00012345_ses-{0}_acq-x_run-1_T1w.nii.gz"
    touch(root, *(name.format(s) for s in ("BAS1", "FLU1", "FLU2")))
    table(root / "participants.tsv", NKI, "A00012345\t9.5\tM\tAMBIDEXTROUS")
    table(root / "sub-A00012345/sub-A00012345_sessions.tsv", "session_id\tage", "ses-FLU1\t11.0", "ses-FLU2\tn/a")
    found = {j.image.session: j.values for j in joined("nki", root)[0].values()}
    assert {s: (v["age_years"], v["age_precision"]) for s, v in found.items()} == {
        "BAS1": (9.5, "enrol"), "FLU1": (11.0, "exact"), "FLU2": (9.5, "enrol")
    }  # fmt: skip
    assert {(v["sex"], v["handedness"], v["field_strength_t"]) for v in found.values()} == {("M", "A", 3)}
    assert {s.days_from_baseline for s in manifest("nki", root)} == {None}  # from an age reused no time can be told
    (root / "sub-A00012345/sub-A00012345_sessions.tsv").unlink()
    table(root / "sessions.tsv", "participant_id\tsession_id\tage", "A00012345\tFLU2\t12.5")
    assert {j.image.session: j.values["age_years"] for j in joined("nki", root)[0].values()} == {
        "BAS1": 9.5, "FLU1": 9.5, "FLU2": 12.5
    }  # fmt: skip
    (root / "sessions.tsv").unlink()
    for column in ("visit", "session"):
        table(root / "visits.tsv", f"participant_id\t{column}\tage", "sub-A00012345\tFLU1\t11")
        ages = {j.image.session: j.values["age_years"] for j in joined("nki", root)[0].values()}
        assert ages == {"BAS1": 9.5, "FLU1": 11, "FLU2": 9.5}
    table(root / "visits.tsv", "who\tvisit\tage", "sub-A00012345\tFLU1\t11")
    with pytest.raises(G3nError, match=r"visits\.tsv' lacks the column participant_id"):
        joined("nki", root)
    (root / "visits.tsv").unlink()
    (root / "participants.tsv").rename(root / "sessions.tsv")
    with pytest.raises(G3nError, match="has no table"):
        joined("nki", root)
    table(root / "participants.tsv", NKI, "A00012345\t9.5\tM\tBOTH")
    with pytest.raises(G3nError, match="handedness has the code 'BOTH'"):
        joined("nki", root)


def test_nki2_takes_the_image_in_mni_space(tmp_path: Path) -> None:
    name = "sub-A00012345/ses-MRI1/anat/sub-A00012345_ses-MRI1"
    touch(tmp_path, f"{name}_T1w.nii.gz", f"{name}_space-MNI152_desc-preproc_T1w.nii.gz")
    touch(tmp_path, f"{name}_space-MNI152_desc-brain_mask.nii.gz")
    [image] = images("nki2", tmp_path).values()
    assert (image.path, image.space) == (f"{name}_space-MNI152_desc-preproc_T1w.nii.gz", "mni")
    assert image.mask == f"{name}_space-MNI152_desc-brain_mask.nii.gz"
    cohort = load_cohort("nki2")
    assert (cohort.name, cohort.license, cohort.min_match) == ("nki2", "nc", 0.35)  # 114 of 256 people are known


def test_nki_tolerates_orphans_up_to_its_floor(tmp_path: Path) -> None:
    for i in range(5):
        touch(tmp_path, f"sub-A0000000{i}/ses-BAS1/anat/sub-A0000000{i}_ses-BAS1_T1w.nii.gz")
    known = [f"A0000000{i}\t30\tMALE\tLEFT" for i in range(3)]
    table(tmp_path / "participants.tsv", NKI, *known)
    assert sum(j.matched for j in joined("nki", tmp_path)[0].values()) == 3
    table(tmp_path / "participants.tsv", NKI, *known[:2])
    with pytest.raises(G3nError, match="only 2 of 5 images found a row"):
        joined("nki", tmp_path)
