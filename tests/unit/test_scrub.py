"""scrub: whatever may name someone is found, wherever it hides."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import zstandard
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.manifest import Scan, write_manifest
from data_prep.pack import Packing, pack_all
from data_prep.preprocess import preprocess_all
from data_prep.qc import write_page
from data_prep.recipe import Recipe
from data_prep.scrub import read_names, scrub
from g3n.config import G3nError
from g3n.nifti import write_volume


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scrub")
    rng = np.random.default_rng(0)
    scans = []
    affine = np.diag([-8.0, -8.0, 8.0, 1.0])
    affine[:3, 3] = np.array([0, -22.1, 9.5]) + 4 * np.array([21, 25, -21])
    for i in range(4):
        volume = np.pad(rng.integers(1, 900, (16, 20, 16)).astype(np.int16), 3)
        write_volume(root / f"raw/{i}.nii.gz", volume, affine)
        facts = {"site": "UCL", "mmse": 28.0}
        scans.append(
            Scan(f"Erika{i}", "1", "T1", f"{i}.nii.gz", 40.0, "F", "HC", "X", 3.0, 0.0, "train", phenotypes=facts)
        )
    write_manifest(root / "manifest.tsv", root / "raw", scans, {})
    preprocess_all(root / "manifest.tsv", root / "out/derivatives", Recipe((22, 26, 22), 8.0), workers=1)
    pack_all(root / "out/derivatives/manifest.tsv", root / "out/shards", Packing(allow_faces=True), 1)
    write_page(root / "out/derivatives", root / "out/qc", 1)
    return root


@pytest.fixture
def out(clean: Path, tmp_path: Path) -> Path:
    shutil.copytree(clean / "out", tmp_path / "out")
    return tmp_path / "out"


def found(folder: Path, **more: object) -> list[str]:
    return list(scrub(folder, True, workers=1, **more).problems)  # type: ignore[arg-type]


def volume_of(out: Path) -> Path:
    return min((out / "derivatives").rglob("*.nii.gz"))


def test_our_own_outputs_are_clean(clean: Path) -> None:
    for folder in ("derivatives", "shards", "qc"):
        done = scrub(clean / "out" / folder, True, read_names(clean / "subjects.tsv"), workers=1)
        assert (done.problems, done.rewritten) == ((), ())
        assert done.files > 4
    assert "Erika0" in read_names(clean / "subjects.tsv")


def change_json(path: Path, **more: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def header(out: Path, change: Callable[[nib.Nifti1Header], object]) -> None:
    path = volume_of(out)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
    change(image.header)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 3, file, mtime=0) as stream:
        stream.write(image.to_bytes())


def extend(h: nib.Nifti1Header) -> None:
    h.extensions.append(nib.nifti1.Nifti1Extension(6, b"Erika"))


def rezip(out: Path, name: str, mtime: int, tail: bytes = b"") -> None:
    content = gzip.decompress(volume_of(out).read_bytes())
    with open(volume_of(out), "wb") as file, gzip.GzipFile(name, "wb", 3, file, mtime=mtime) as stream:
        stream.write(content + tail)


def sidecar(out: Path) -> Path:
    return volume_of(out).with_name(volume_of(out).name.replace(".nii.gz", ".json"))


def retar(
    out: Path, change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes]], tail: bytes = b""
) -> None:
    path = out / "shards/train-00000.tar"
    with tarfile.open(path) as tar:
        members = [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, payload in members:
            new, content = change(info, payload)
            new.size = len(content)
            tar.addfile(new, io.BytesIO(content))
    path.write_bytes(buffer.getvalue() + tail)


def named(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info.uname = "erika"
    return info, payload


def paxed(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info.pax_headers = {"comment": "Erika"}
    return info, payload


def renamed(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info.name = "erika." + info.name.partition(".")[2]
    return info, payload


def told(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return info, payload[:-1] + b',"name":"Erika"}' if info.name.endswith(".json") else payload


def hidden_twice(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return info, b'{"group":"Erika",' + payload[1:-1] + b',"group":null}' if info.name.endswith(".json") else payload


def skippable(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return info, payload + struct.pack("<II", 0x184D2A50, 5) + b"Erika" if info.name.endswith(".zst") else payload


def padded(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    if info.name.endswith(".json"):
        return info, payload
    return info, zstandard.compress(zstandard.decompress(payload) + b"Erika")


def same(info: tarfile.TarInfo, payload: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return info, payload


def png_text(out: Path) -> None:
    path = min((out / "qc/thumbs").iterdir())
    raw = path.read_bytes()
    text = b"tEXtAuthor\0Erika"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path.write_bytes(raw[:33] + chunk + raw[33:])


def page(out: Path) -> None:
    path = out / "qc/index.html"
    path.write_text(path.read_text().replace('"route":', '"who":"Erika","route":', 1))


def page_comment(out: Path) -> None:
    path = out / "qc/index.html"
    path.write_text(path.read_text() + "<!-- Erika -->")


def cell(out: Path, old: str, new: str) -> None:
    path = out / "derivatives/manifest.tsv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


LEAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "descrip": (lambda o: header(o, lambda h: h.__setitem__("descrip", b"Erika")), "header holds more"),
    "db_name": (lambda o: header(o, lambda h: h.__setitem__("db_name", b"Erika")), "header holds more"),
    "toffset": (lambda o: header(o, lambda h: h.__setitem__("toffset", 1961)), "header holds more"),
    "extension": (lambda o: header(o, extend), "header holds more"),
    "after the voxels": (lambda o: rezip(o, "", 0, b"Erika"), "5 bytes follow its voxels"),
    "gzip name": (lambda o: rezip(o, "Erika.nii", 0), "gzip header"),
    "gzip time": (lambda o: rezip(o, "", 1_600_000_000), "gzip header"),
    "sidecar key": (lambda o: change_json(sidecar(o), PatientName="Erika"), "the key 'PatientName'"),
    "sidecar value": (lambda o: change_json(sidecar(o), align="Erika"), "align is 'Erika'"),
    "sidecar inside": (lambda o: change_json(sidecar(o), quality={"p1": "Erika"}), "quality.p1 is 'Erika'"),
    "recipe": (lambda o: change_json(o / "derivatives/recipe.json", strip_command="/home/erika/bet"), "strip_command"),
    "root": (lambda o: change_json(o / "derivatives/manifest.json", root="/data/erika"), "root is '/data/erika'"),
    "index": (lambda o: change_json(o / "shards/index.json", source="/data/erika"), "the key 'source'"),
    "level is a date": (lambda o: cell(o, "\tUCL", "\t1961-04-05"), "site is '1961-04-05'"),
    "column": (lambda o: cell(o, "\tmmse", "\tname"), "name is not an allowed column"),
    "source path": (lambda o: cell(o, "\tn/a\tn/a\tn/a\tskull", "\tn/a\tn/a\terika/mask.nii\tskull"), "mask is 'erika/mask.nii'"),
    "tar owner": (lambda o: retar(o, named), "tar header holds more"),
    "tar comment": (lambda o: retar(o, paxed), "tar header holds more"),
    "member name": (lambda o: retar(o, renamed), "not named as a sample"),
    "sample key": (lambda o: retar(o, told), "the key 'name'"),
    "sample key twice": (lambda o: retar(o, hidden_twice), "stands twice"),
    "zstd frame": (lambda o: retar(o, skippable), "bytes follow its zstd frame"),
    "npy": (lambda o: retar(o, padded), "more than an array"),
    "after the tar": (lambda o: retar(o, same, b"Erika"), "follows its last member"),
    "png": (png_text, "chunk b'tEXt'"),
    "page data": (page, "the key 'who'"),
    "page": (page_comment, "not the page"),
    "file": (lambda o: (o / "derivatives/erika.txt").write_text("x"), "no file that data_prep writes"),
    "hidden file": (lambda o: (o / "shards/.train-00000.tar.part").write_text("x"), "no file that data_prep writes"),
    "link": (lambda o: (o / "derivatives/x.nii.gz").symlink_to("/data/erika.nii.gz"), "is a link"),
}  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS)
def test_each_leak_is_found(leak: str, out: Path) -> None:
    plant, words = LEAKS[leak]
    plant(out)
    problems = [line for folder in ("derivatives", "shards", "qc") for line in found(out / folder)]
    assert problems
    assert any(words in line for line in problems), problems


def test_a_name_that_the_whitelist_lets_pass_is_found_by_the_list(out: Path) -> None:
    """A level of a variable is free text: only the list of names tells that this one is somebody."""
    cell(out, "\tUCL", "\tDoctor Erika")
    assert found(out / "derivatives") == []
    [line] = found(out / "derivatives", names=["erika", "Max"])
    assert line == "manifest.tsv: holds the name 'erika'"


def test_headers_are_rewritten_and_voxels_are_not(out: Path) -> None:
    before = nib.load(volume_of(out))
    voxels = np.asarray(before.dataobj)
    header(out, lambda h: h.__setitem__("descrip", b"Erika"))
    done = scrub(out / "derivatives", False, ("erika",), workers=1)
    assert done.rewritten == (volume_of(out).relative_to(out / "derivatives").as_posix(),)
    assert done.problems == ()
    after = nib.load(volume_of(out))
    np.testing.assert_array_equal(np.asarray(after.dataobj), voxels)
    np.testing.assert_array_equal(after.affine, before.affine)


def test_exit_codes(out: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["scrub", "--verify", str(out / "shards"), "--workers", "1"]).exit_code == 0
    (out / "shards/notes.txt").write_text("x")
    done = CliRunner().invoke(app, ["scrub", "--verify", str(out / "shards"), "--workers", "1"])
    assert done.exit_code == 1
    assert "notes.txt" in done.stdout
    with pytest.raises(G3nError, match="does not exist"):
        scrub(tmp_path / "none", True)
    (tmp_path / "names.txt").write_text("Erika\n\n Max \n")
    assert read_names(tmp_path / "names.txt") == ["Erika", "Max"]
