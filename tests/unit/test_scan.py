"""scan: what counts as a scan, whose it is, and in which split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_prep.bids import scan_bids
from data_prep.manifest import Scan, read_manifest
from data_prep.phantom import draw_subject, make_phantom
from data_prep.scan import Shares, split_subjects
from g3n.config import G3nError
from g3n.names import modality_of


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    root = tmp_path / "bids"
    touch(
        root,
        "sub-A/ses-pre/anat/sub-A_ses-pre_T1w.nii.gz",
        "sub-A/ses-pre/anat/sub-A_ses-pre_ce-gd_T1w.nii",
        "sub-A/ses-post/anat/sub-A_ses-post_T1w.nii.gz",
        "sub-A/ses-post/anat/sub-A_ses-post_run-1_FLAIR.nii.gz",
        "sub-A/ses-post/anat/sub-A_ses-post_run-2_FLAIR.nii.gz",
        "sub-A/ses-post/func/sub-A_ses-post_task-rest_bold.nii.gz",
        "sub-B/anat/sub-B_T2w.nii.gz",
        "sub-B/anat/sub-B_T2starw.nii.gz",
        "sub-C/anat/sub-C_T1w.nii.gz",
        "derivatives/x/sub-A/anat/sub-A_T1w.nii.gz",
    )
    (root / "participants.tsv").write_text(
        "\ufeffparticipant_id\tAge\tGender\tGroup\tStudy\n"
        "sub-A\t60\tfemale\tHealthy Control\tX1\nsub-B\t042Y\tmale\tAlzheimer's disease\tX2\nsub-C\ttall\tn/a\tn/a\tn/a\nD\t1\tM\tHC\tX\n"
    )
    (root / "sessions.tsv").write_text(
        "participant_id\tsession_id\tdays_from_first\nsub-A\tses-post\t731\nsub-A\tses-pre\t0\n"
    )
    (root / "sub-B/anat/sub-B_T2w.json").write_text('{"MagneticFieldStrength": 3, "PatientName": "x"}')
    return root


def scanned(
    root: Path, seed: int = 0, val: float = 0.15, test: float = 0.15
) -> tuple[dict[tuple[str, ...], Scan], dict]:
    output = root.parent / "work" / "manifest.tsv"
    scan_bids(root, output, Shares(val, test, seed))
    manifest = read_manifest(output)
    assert manifest.root == root.resolve()
    scans = {(s.subject, s.session, s.modality): s for s in manifest.scans if s.run == 1}
    return scans, json.loads(output.with_suffix(".json").read_text())


def test_finds_scans_and_variables(bids: Path) -> None:
    scans, about = scanned(bids)
    assert set(scans) == {
        ("A", "pre", "T1"),
        ("A", "pre", "T1c"),
        ("A", "post", "T1"),
        ("A", "post", "FLAIR"),
        ("B", "01", "T2"),
        ("C", "01", "T1"),
    }
    pre, post, b, c = (
        scans[k] for k in (("A", "pre", "T1"), ("A", "post", "T1"), ("B", "01", "T2"), ("C", "01", "T1"))
    )
    assert (pre.age_years, pre.days_from_baseline, post.days_from_baseline) == (60, 0, 731)
    assert post.age_years == pytest.approx(62, abs=0.01)
    assert (pre.sex, pre.diagnosis, pre.cohort, pre.field_strength_t) == ("F", "HC", "X1", None)
    assert (b.age_years, b.sex, b.diagnosis, b.field_strength_t, b.days_from_baseline) == (42, "M", "AD", 3, 0)
    assert (c.age_years, c.sex, c.diagnosis, c.cohort) == (None, None, None, None)
    assert scans["A", "post", "FLAIR"].path == "sub-A/ses-post/anat/sub-A_ses-post_run-1_FLAIR.nii.gz"
    assert len({s.split for s in scans.values() if s.subject == "A"}) == 1
    skipped = about["skipped"]
    assert set(skipped) == {
        "sub-A/ses-post/func/sub-A_ses-post_task-rest_bold.nii.gz",
        "sub-B/anat/sub-B_T2starw.nii.gz",
    }
    notes = "\n".join(about["notes"])
    assert "age is 'tall'" in notes
    assert "'D' of the table of participants has no scan" in notes
    assert about["seed"] == 0
    assert about["shares"]["val"] == 0.15


def test_age_of_each_session_wins(bids: Path) -> None:
    (bids / "sub-A/sub-A_sessions.tsv").write_text("session_id\tage\nses-pre\t60.5\nses-post\t63.5\n")
    scans, _ = scanned(bids)
    assert [scans["A", s, "T1"].age_years for s in ("pre", "post")] == [60.5, 63.5]
    (bids / "sessions.tsv").unlink()
    scans, _ = scanned(bids)
    assert scans["A", "post", "T1"].days_from_baseline == round(3 * 365.25)


def test_runs_and_acquisitions_are_rows_and_versions_are_not(tmp_path: Path) -> None:
    """Nothing of a session is lost, nothing counts twice, a scout is no scan."""
    anat = "sub-A/anat/sub-A"
    touch(
        tmp_path / "b",
        *(f"{anat}_{name}.nii.gz" for name in (
            "run-2_T1w", "run-10_T1w", "acq-hires_run-1_T1w", "acq-scout_T1w", "rec-norm_run-2_T1w", "inv-1_T1w",
            "part-phase_T1w", "part-mag_T2w", "space-MNI152NLin2009cAsym_desc-preproc_FLAIR", "desc-preproc_FLAIR",
            "desc-brain_mask", "space-MNI152NLin2009cAsym_desc-brain_mask",
        )),
    )  # fmt: skip
    scan_bids(tmp_path / "b", tmp_path / "m.tsv", Shares(0, 0, 0))
    rows = [(s.modality, s.run, s.path.removeprefix(anat), s.mask) for s in read_manifest(tmp_path / "m.tsv").scans]
    assert rows == [
        ("FLAIR", 1, "_desc-preproc_FLAIR.nii.gz", f"{anat}_desc-brain_mask.nii.gz"),
        ("T1", 1, "_acq-hires_run-1_T1w.nii.gz", None),
        ("T1", 2, "_run-2_T1w.nii.gz", None),
        ("T1", 3, "_run-10_T1w.nii.gz", None),
        ("T2", 1, "_part-mag_T2w.nii.gz", None),
    ]
    (tmp_path / f"b/{anat}_desc-preproc_FLAIR.nii.gz").unlink()
    scan_bids(tmp_path / "b", tmp_path / "m.tsv", Shares(0, 0, 0))
    flair = read_manifest(tmp_path / "m.tsv").scans[0]
    mask = f"{anat}_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz"
    assert (flair.space, flair.mask) == ("mni", mask)


def test_numbers_for_sexes_need_a_codebook(tmp_path: Path) -> None:
    """1 is a man in IXI and a woman in CoRR: without Levels or --sex-codes nobody can know."""
    root = tmp_path / "b"
    touch(root, *(f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(4)))
    rows = ["0\t120\t1\t1", "1\t132\t2\t2", "2\t144\tF\tHC", "3\t150\t3\tn/a"]
    (root / "participants.tsv").write_text(
        "\n".join(["participant_id\tage\tsex\tdx", *(f"sub-{r}" for r in rows)]) + "\n"
    )

    def found(sex_codes: str | None = None) -> tuple[list, list]:
        scan_bids(root, tmp_path / "m.tsv", Shares(0, 0, 0), sex_codes)
        scans = read_manifest(tmp_path / "m.tsv").scans
        notes = json.loads((tmp_path / "m.json").read_text())["notes"]
        return [(s.sex, s.age_years, s.diagnosis) for s in scans], notes

    plain, notes = found()
    assert [sex for sex, _, _ in plain] == [None, None, "F", None]
    assert sum("--sex-codes" in note for note in notes) == 1
    assert [sex for sex, _, _ in found("1=F,2=M")[0]] == ["F", "M", "F", None]
    with pytest.raises(G3nError, match="1=M,2=F"):
        found("1:F")
    levels = {"sex": {"Levels": {"1": "Male", "2": {"Description": "female"}}}, "age": {"Units": "months"}}
    levels["dx"] = {"Levels": {"1": "Alzheimer's disease", "2": "healthy"}}
    (root / "participants.json").write_text(json.dumps(levels))
    coded, _ = found()
    assert coded == [("M", 10, "AD"), ("F", 11, "HC"), ("F", 12, "HC"), (None, 12.5, None)]
    (root / "participants.json").write_text("[" * 100_000)
    assert "is not JSON" in found()[1][0]


def test_relatives_and_one_person_under_two_labels_share_a_split(tmp_path: Path) -> None:
    root = tmp_path / "b"
    touch(root, *(f"sub-{i}/anat/sub-{i}_T1w.nii.gz" for i in range(40)))
    rows = [f"sub-{i}\tf{i // 4}\t{'same' if i in (0, 39) else 'n/a'}" for i in range(40)]
    (root / "participants.tsv").write_text("\n".join(["participant_id\tFamily_ID\tdup_group", *rows]) + "\n")
    scan_bids(root, tmp_path / "m.tsv", Shares(0.3, 0.3, 0))
    scans = {s.subject: s for s in read_manifest(tmp_path / "m.tsv").scans}
    assert scans["0"].split == scans["39"].split
    assert scans["0"].group == "same"
    splits = [{scans[str(i)].split for i in range(first, first + 4) if i not in (0, 39)} for first in range(0, 40, 4)]
    assert all(len(s) == 1 for s in splits)
    assert len({s for found in splits for s in found}) == 3


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("sub-1_T1w.nii.gz", "T1"),
        ("sub-1_ses-2_acq-x_T1W.nii", "T1"),
        ("sub-1_ce-gadolinium_T1w.nii.gz", "T1c"),
        ("sub-1_T1ce.nii.gz", "T1c"),
        ("sub-1_space-MNI_flair.nii.gz", "FLAIR"),
        ("sub-1_T2w.nii.gz", "T2"),
        ("sub-1_ce-gd_T2w.nii.gz", None),
        ("sub-1_label-lesion_mask.nii.gz", None),
        ("sub-1_T1w.json", None),
    ],
)
def test_modality_of(name: str, modality: str | None) -> None:
    assert modality_of(name) == modality


def test_split_is_by_subject_seeded_and_stable() -> None:
    subjects = [f"S{i}" for i in range(2000)]
    split = split_subjects(subjects, 0, 0.15, 0.15)
    counts = Counter(split.values())
    assert counts["val"] == pytest.approx(300, abs=50)
    assert counts["test"] == pytest.approx(300, abs=50)
    assert split_subjects(subjects[::2], 0, 0.15, 0.15) == {s: split[s] for s in subjects[::2]}
    assert split_subjects(subjects, 1, 0.15, 0.15) != split
    for n in range(3, 12):  # few subjects still fill each split
        assert set(split_subjects(subjects[:n], 0, 0.15, 0.15).values()) == {"train", "val", "test"}
    assert set(split_subjects(subjects, 0, 0, 0).values()) == {"train"}


def test_phantom_comes_through_whole(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    make_phantom(tmp_path / "bids", 5, 8.0, 0, workers=1)
    scans, about = scanned(tmp_path / "bids")
    assert not about["skipped"]
    assert not about["notes"]
    for i in range(5):
        subject = draw_subject(0, i)
        for v, visit in enumerate(subject.visits, 1):
            for modality in subject.modalities:
                scan = scans.pop((subject.label, f"{v:02d}", modality))
                assert scan.variables == {
                    "modality": modality,
                    "age_years": visit.age_years,
                    "sex": subject.sex,
                    "diagnosis": subject.diagnosis,
                    "cohort": subject.cohort.name,
                    "field_strength_t": subject.field_strength_t,
                }
                assert scan.days_from_baseline == visit.days
    assert not scans


def test_errors(bids: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for root, val, words in (
        (tmp_path / "empty", 0.1, "has no T1w"),
        (tmp_path / "none", 0.1, "does not exist"),
        (bids, 0.9, "something to train on"),
    ):
        with pytest.raises(G3nError, match=words):
            scan_bids(root, tmp_path / "m.tsv", Shares(val, 0.1, 0))
        assert not (tmp_path / "m.tsv").exists()


def test_bad_manifests_are_named_by_line(bids: Path) -> None:
    scanned(bids)
    path = bids.parent / "work" / "manifest.tsv"
    text = path.read_text()
    for old, new, words in (
        ("\tFLAIR\t", "\tPD\t", "line .*modality is 'PD'"),
        ("\t60\t", "\tsixty\t", "line .*age_years is 'sixty'"),
        ("\tsub-B/", "\t../sub-B/", "leaves the root"),
        ("\tsub-B/", "\t/sub-B/", "leaves the root"),
        ("days_from_baseline", "days", "lacks days_from_baseline"),
        ("\tpost\tT1\t", "\tpre\tT1\t", "same scan"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(G3nError, match=words):
            read_manifest(path)
    first = text.splitlines()[1]
    split = next(word for word in ("train", "val", "test") if f"\t{word}\t" in first)
    path.write_text(text.replace(first, first.replace(f"\t{split}\t", "\ttest\t" if split == "val" else "\tval\t"), 1))
    with pytest.raises(G3nError, match="two splits"):
        read_manifest(path)


def test_command_line(bids: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data_prep", "scan", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=60)

    good = run(str(bids), "--output", str(bids.parent / "m.tsv"))
    assert good.returncode == 0
    assert "7 scans of 3 subjects" in good.stdout
    assert "left out: 1 files, not in an anat folder" in good.stdout
    bad = run(str(bids / "sub-A"), "--output", str(bids.parent / "m2.tsv"))
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1
