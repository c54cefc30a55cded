"""scan of any folder: files by a table's rows, by ids in paths, or one folder a subject."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.fields import modality_of_words
from data_prep.loose import scan_loose
from data_prep.manifest import Scan, read_manifest
from data_prep.scan import Shares
from g3n.config import G3nError
from tests.unit.cohorts.fixtures import table, touch

SHARES = Shares(0, 0, 0)


def scanned(root: Path, people: Path | None = None, sex_codes: str | None = None) -> tuple[dict[str, Scan], dict]:  # type: ignore[type-arg]
    output = root.parent / "m.tsv"
    scan_loose(root, output, SHARES, people, sex_codes)
    return {s.path: s for s in read_manifest(output).scans}, json.loads(output.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("text", "modality"),
    [
        ("MPRAGE_GRAPPA2.nii", "T1"), ("t1_mpr_sag_p2_iso_s3.nii.gz", "T1"), ("IR-FSPGR.mgz", "T1"), ("x_t1n.nii", "T1"),
        ("AX T1+C", "T1c"), ("sub-1_ce-GD_T1w.nii.gz", "T1c"), ("T1GD.nii.gz", "T1c"), ("t1_mprage_sag_KM_s7", "T1c"),
        ("T1_post_op.nii", "T1"), ("t2_tse_tra.nii", "T2"), ("Sag_FSE.hdr", "T2"), ("t2_flair.nii", "FLAIR"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"), ("t2_spc_da-fl_sag", "FLAIR"), ("x_t2f.nii", "FLAIR"),
        ("T2*_gre", ""), ("t2_star.nii", ""), ("T1_lesion_mask.nii", ""), ("PD_TSE.nii", ""), ("brain.nii", None),
    ],
)  # fmt: skip
def test_words_of_modalities(text: str, modality: str | None) -> None:
    assert modality_of_words(text) == modality


def test_a_row_a_file(tmp_path: Path) -> None:
    root = tmp_path / "r"
    touch(root, "a/x.nii.gz", "a/y_T2.hdr", "b/z.mgz", "b/T1_old.nii")
    table(
        tmp_path / "t.csv",
        "File,Subject ID,Visit,Modality,Age,Gender,Dx,Days,Study,Tesla",
        "a/x.nii.gz,P_01,base,T1,70.5,1,CN,0,S1,3",
        "a/y_T2.hdr,P_01,base,,70.5,1,CN,0,S1,3",
        "b/z.mgz,P_01,late,mprage,71.5,1,AD,365,S1,1.5",
        encoding="latin-1",
    )
    scans, _ = scanned(root, tmp_path / "t.csv", "1=F,2=M")
    assert set(scans) == {"a/x.nii.gz", "a/y_T2.hdr", "b/z.mgz"}
    first, other, late = (scans[p] for p in ("a/x.nii.gz", "a/y_T2.hdr", "b/z.mgz"))
    assert (first.subject, first.session, first.modality, other.modality) == ("P01", "base", "T1", "T2")
    assert (first.age_years, first.sex, first.diagnosis, first.cohort, first.field_strength_t) == (
        70.5,
        "F",
        "HC",
        "S1",
        3,
    )
    assert (late.session, late.diagnosis, late.days_from_baseline, late.field_strength_t) == ("late", "AD", 365, 1.5)
    table(tmp_path / "bad.csv", "path,subject", "../secret.nii,P1")
    with pytest.raises(G3nError, match="is not below"):
        scan_loose(root, tmp_path / "m2.tsv", SHARES, tmp_path / "bad.csv")


def test_a_row_a_subject_is_found_by_its_id_in_the_path(tmp_path: Path) -> None:
    root = tmp_path / "r"
    touch(
        root,
        "site1/OAS_12/v1/T1.nii.gz", "site1/OAS_12/v2/T1.nii.gz", "site1/OAS_12/v2/FLAIR/img.nii",
        "flat/OAS-123_t2w.img", "flat/OAS-123_t2w.hdr", "flat/OAS-123_mprage_a.nii", "flat/OAS-123_mprage_b.nii",
        "flat/OAS-9_T1.nii", "flat/OAS-12_OAS-33_T1.nii", "OAS_12/brain.nii", "OAS_12/T1_mask.nii",
    )  # fmt: skip
    table(tmp_path / "t.tsv", "id\tage\tsex", "OAS_12\t60\tF", "OAS_123\t50\tM", "OAS_33\t40\tM")
    scans, about = scanned(root, tmp_path / "t.tsv")
    assert {p: (s.subject, s.session, s.modality, s.run) for p, s in scans.items()} == {
        "site1/OAS_12/v1/T1.nii.gz": ("OAS12", "v1", "T1", 1),
        "site1/OAS_12/v2/T1.nii.gz": ("OAS12", "v2", "T1", 1),
        "site1/OAS_12/v2/FLAIR/img.nii": ("OAS12", "v2", "FLAIR", 1),
        "flat/OAS-123_t2w.hdr": ("OAS123", "01", "T2", 1),
        "flat/OAS-123_mprage_a.nii": ("OAS123", "01", "T1", 1),
        "flat/OAS-123_mprage_b.nii": ("OAS123", "01", "T1", 2),
    }
    assert (scans["flat/OAS-123_t2w.hdr"].age_years, scans["flat/OAS-123_t2w.hdr"].sex) == (50, "M")
    assert about["skipped"]["flat/OAS-9_T1.nii"].startswith("no id")
    assert about["skipped"]["flat/OAS-12_OAS-33_T1.nii"].startswith("no id, or more than one")
    assert set(about["skipped"]) >= {"OAS_12/brain.nii", "OAS_12/T1_mask.nii"}


def test_without_a_table_the_first_folder_is_the_subject(tmp_path: Path) -> None:
    root = tmp_path / "r"
    touch(root, "Ann/2001/T1_s2.nii.gz", "Ann/2003/T1_s2.nii.gz", "Bob/T1_s2.nii.gz", "T1_nobody.nii")
    (root / "Bob/T1_s2.json").write_text('{"ContrastBolusAgent": "GADAVIST", "MagneticFieldStrength": 1.5}')
    (root / "Ann/2001/T1_s2.json").write_text('{"ContrastBolusAgent": "No contrast"}')
    scans, about = scanned(root)
    found = {p: (s.subject, s.session, s.modality, s.field_strength_t) for p, s in scans.items()}
    assert found == {
        "Ann/2001/T1_s2.nii.gz": ("Ann", "2001", "T1", None),
        "Ann/2003/T1_s2.nii.gz": ("Ann", "2003", "T1", None),
        "Bob/T1_s2.nii.gz": ("Bob", "01", "T1c", 1.5),
    }
    assert list(about["skipped"]) == ["T1_nobody.nii"]


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "r", "a_1/T1.nii", "x/y.nii")
    table(tmp_path / "t.csv", "id,age", "a_1,3", "a-1,4")
    with pytest.raises(G3nError, match="'a_1' and 'a-1' differ in signs alone"):
        scan_loose(tmp_path / "r", tmp_path / "m.tsv", SHARES, tmp_path / "t.csv")
    table(tmp_path / "t.csv", "who,age", "a_1,3")
    done = CliRunner().invoke(
        app, ["scan", str(tmp_path / "r"), "--table", str(tmp_path / "t.csv"), "--output", str(tmp_path / "m.tsv")]
    )
    assert isinstance(done.exception, G3nError)
    assert "rows without a subject" in str(done.exception)
    assert not (tmp_path / "m.tsv").exists()
