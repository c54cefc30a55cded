"""A name, a date and an id in every place of the input where one can stand: none in anything that comes out."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zstandard
from nibabel.nifti1 import Nifti1Extension

from tests.launch import ROOT, environment

NAME, DATE, ID = "Mustermann", "19610405", "MRN20931"
CANARIES = (NAME, DATE, "1961-04-05", ID, "Erika")


def plant(root: Path) -> None:
    """Six subjects of one to two sessions; the last one's scan is damaged, so that its failure is reported too."""
    rng = np.random.default_rng(0)
    affine = np.diag([-6.0, -6.0, 6.0, 1.0])
    affine[:3, 3] = np.array([0, -22.1, 9.5]) + 3 * np.array([29, 35, -29])
    people = ["participant_id\tname\tbirth\tage\tsex\tdiagnosis\tcohort\tfamily_id\tdup_group"]
    for i in range(6):
        label = f"{NAME}{ID}x{i}"
        people.append(
            f"sub-{label}\tErika {NAME}\t1961-04-05\t{50 + i}\tF\tseen 1961-04-05\tX{i % 2}\t{NAME}{i}\t{ID}person{i}"
        )
        for v in range(1 + i % 2):
            session = f"ses-{NAME}{DATE}v{v}"
            for suffix in ("T1w", "FLAIR"):
                volume = np.zeros((30, 36, 30), np.float32)
                volume[4:-4, 4:-4, 4:-4] = rng.gamma(9, 100, (22, 28, 22))
                image = nib.Nifti1Image(volume, affine)
                header = image.header
                for key, size in (
                    ("descrip", 80),
                    ("db_name", 18),
                    ("aux_file", 24),
                    ("intent_name", 16),
                    ("data_type", 10),
                ):
                    header[key] = f"{NAME} {ID}"[:size].encode()
                for code in (0, 4, 6, 44):
                    header.extensions.append(Nifti1Extension(code, f"Erika^{NAME} {DATE} {ID}".encode()))
                folder = root / f"sub-{label}/{session}/anat"
                folder.mkdir(parents=True, exist_ok=True)
                stem = f"sub-{label}_{session}_acq-{NAME}_{suffix}"
                content = image.to_bytes()
                if i == 5 and suffix == "T1w":
                    content = content[:5000]
                with gzip.GzipFile(folder / f"{stem}.nii.gz", "wb", mtime=1_600_000_000) as file:  # stores the name
                    file.write(content)
                sidecar = {"PatientName": f"Erika^{NAME}", "PatientBirthDate": DATE, "PatientID": ID}
                sidecar |= {"MagneticFieldStrength": 3, "InstitutionName": NAME, "SeriesDescription": f"{ID}_{DATE}"}
                (folder / f"{stem}.json").write_text(json.dumps(sidecar))
    (root / "participants.tsv").write_text("\n".join(people) + "\n")
    (root / "dataset_description.json").write_text(json.dumps({"Name": NAME, "License": f"CC0 {NAME}"}))


def command(*words: str) -> str:
    """Everything it printed."""
    line = [sys.executable, "-m", "data_prep", *words]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def unpacked(path: Path) -> list[bytes]:
    """A file's name and bytes, and what is compressed in them."""
    raw = path.read_bytes()
    blobs = [path.name.encode(), raw]
    if raw[:2] == b"\x1f\x8b":
        blobs.append(gzip.decompress(raw))
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            for member in tar:
                payload = tar.extractfile(member).read()  # type: ignore[union-attr]
                blobs += [member.name.encode(), payload]
                blobs += [zstandard.decompress(payload)] if member.name.endswith(".zst") else []
    return blobs


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("canary")
    source = root / f"raw-{NAME}-{ID}" / "bids"
    plant(source)
    private, out = root / f"private-{NAME}", root / "out"
    log = command("scan", str(source), "--output", f"{private}/manifest.tsv", "--val", "0.3", "--test", "0")
    log = log.replace(str(private), "PRIVATE")
    grid = ("--spacing-mm", "6", "--shape", "30,36,30", "--align", "header", "--bias", "none", "--strip", "none")
    log += command("preprocess", f"{private}/manifest.tsv", "--output", f"{out}/derivatives", *grid)
    log += command("qc", f"{out}/derivatives", "--output", f"{out}/qc")
    log += command("pack", f"{out}/derivatives/manifest.tsv", "--output", f"{out}/shards", "--allow-faces")
    log += command("verify", f"{out}/shards")
    (out / "log.txt").write_text(log)
    return root


def test_no_canary_leaves_a_trace(work: Path) -> None:
    found = [path for path in (work / "out").rglob("*") if path.is_file()]
    kinds = {"".join(path.suffixes[-2:]) for path in found}
    assert kinds >= {".nii.gz", ".json", ".tsv", ".png", ".html", ".tar", ".txt"}
    for path in found:
        for blob in unpacked(path):
            lower = blob.lower()
            assert not [c for c in CANARIES if c.lower().encode() in lower], path
            assert not [c for c in CANARIES if c.lower().encode("utf-16-le") in lower], path
    text = (work / "out/log.txt").read_text()
    assert "2 failed" in text  # the damaged scan was reported, without its name
    assert "the file is truncated" in (work / "out/derivatives/failures.tsv").read_text()


def test_scrub_proves_it(work: Path) -> None:
    names = str(work / f"private-{NAME}" / "subjects.tsv")
    for folder in ("derivatives", "qc", "shards"):
        text = command("scrub", "--verify", str(work / "out" / folder), "--names", names)
        assert "no findings" in text


def test_the_private_side_is_private(work: Path) -> None:
    private = work / f"private-{NAME}"
    for name in ("subjects.key", "subjects.tsv"):
        assert (private / name).stat().st_mode & 0o077 == 0
    assert NAME in (private / "subjects.tsv").read_text()
