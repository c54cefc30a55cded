"""Proof that an output folder names nobody: every file is read whole and held against the whitelist."""

from __future__ import annotations

import gzip
import io
import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from data_prep import whitelist
from data_prep.manifest import read_table
from data_prep.progress import run_all
from g3n.config import G3nError
from g3n.nifti import canonical_header, read_exactly_as_stored, write_volume

_MAX_BYTES = 1 << 31
_MAX_TEXT = 1 << 28
_MAX_MEMBER = 1 << 30
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"pHYs")
_SHORTEST_NAME = 4


@dataclass(frozen=True)
class Scrubbed:
    """``problems`` has a line for each thing that may name someone, ``rewritten`` the files whose header was replaced."""

    files: int
    rewritten: tuple[str, ...]
    problems: tuple[str, ...]


def scrub(folder: Path, verify: bool, names: Sequence[str] = (), workers: int | None = None) -> Scrubbed:
    """Hold every file below ``folder`` (derivatives, shards, latents or a QC page) against data_prep/whitelist.py.

    Unless ``verify``, NIfTI files with anything in their header beyond shape, type, scale and affine are rewritten without
    it, voxels untouched. ``names`` are looked for in names of files and all that is not voxels or pixels, whatever the case. Raises G3nError for
    a folder that does not exist.
    """
    if not folder.is_dir():
        raise G3nError(f"folder '{folder}' does not exist")
    paths = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    needles = tuple(sorted({n.lower().encode() for n in names if len(n) >= _SHORTEST_NAME}))
    work = partial(examine, str(folder), verify, needles)
    found = list(run_all(work, [p.relative_to(folder).as_posix() for p in paths], workers, "scrub"))
    rewritten = tuple(p.relative_to(folder).as_posix() for p, (done, _) in zip(paths, found, strict=True) if done)
    return Scrubbed(len(paths), rewritten, tuple(line for _, lines in found for line in lines))


def read_names(path: Path) -> list[str]:
    """What must not be found: a line each, or labels and file names of preprocess's subjects.tsv."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise G3nError(f"'{path}' cannot be read ({error}); give a text file with a name a line") from error
    if not lines or not lines[0].startswith("subject\tsession\tpath"):
        return [line.strip() for line in lines if line.strip()]
    found: set[str] = set()
    for row in read_table(path):
        label, session = row["subject"], row["session"]
        words = {label, session, Path(row["path"]).name.partition(".")[0]}
        found |= {w for w in words if not w.isdigit()}  # a number alone would be found anywhere
    return sorted(found)


def examine(folder: str, verify: bool, needles: tuple[bytes, ...], where: str) -> tuple[bool, list[str]]:
    """Whether the file ``where`` below ``folder`` was rewritten, and a line for each finding."""
    path = Path(folder) / where
    problems: list[str] = []
    rewritten = False
    blobs = [where.encode()]
    try:
        if path.is_symlink():
            raise G3nError("is a link; its target is not looked at: copy it")
        if path.stat().st_size > _MAX_BYTES:
            raise G3nError(f"is larger than {_MAX_BYTES >> 30} GiB")
        kind = next((k for pattern, k in _KINDS if re.fullmatch(pattern, where)), None)
        if kind is None:
            raise G3nError("is no file that data_prep writes, or has another name; remove it")
        if where.endswith(".nii.gz") and not verify and list(_nifti(path, [])):
            _rewrite(path)
            rewritten = True
        problems += list(kind(path, blobs))
    except (G3nError, OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, *_BAD_BYTES) as error:
        problems.append(" ".join(str(error).split())[:200])
    lower = [blob.lower() for blob in blobs] if needles else []
    problems += [f"holds the name '{n.decode()}'" for n in needles if any(n in blob for blob in lower)]
    return rewritten, [f"{where}: {problem}" for problem in problems]


_BAD_BYTES = (zlib.error, gzip.BadGzipFile, zstandard.ZstdError, tarfile.TarError, struct.error)


def _nifti(path: Path, blobs: list[bytes]) -> Iterator[str]:
    """The gzip header without name and time, the NIfTI header as g3n writes it, and nothing after the voxels."""
    with open(path, "rb") as file:
        raw = file.read(10)
    if len(raw) < 10 or raw[:2] != b"\x1f\x8b":
        raise G3nError("is not gzipped")
    if raw[3] or any(raw[4:8]):
        yield "its gzip header holds a file's name, a comment or a time"
    stored, affine, whole, rest = read_exactly_as_stored(path)
    expected = canonical_header(stored, affine)
    blobs.append(whole[: len(expected)])
    if whole[: len(expected)] != expected:
        yield "its header holds more than shape, type, scale and affine"
    if rest:
        yield f"{rest} bytes follow its voxels"


def _rewrite(path: Path) -> None:
    stored, affine, _, _ = read_exactly_as_stored(path)
    write_volume(path, stored, affine)


def _json_by(schema: Any) -> Callable[[Path, list[bytes]], Iterator[str]]:
    def look(path: Path, blobs: list[bytes]) -> Iterator[str]:
        text = _text(path, blobs)
        yield from whitelist.findings(_load(text), schema, "")

    return look


def _load(text: str | bytes) -> Any:
    """JSON in which no key stands twice: the first could hide."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            raise ValueError("a key of its JSON stands twice")
        return tree

    return json.loads(text, object_pairs_hook=once)


def _text(path: Path, blobs: list[bytes]) -> str:
    with open(path, "rb") as file:
        raw = file.read(_MAX_TEXT + 1)
    if len(raw) > _MAX_TEXT:
        raise G3nError(f"is larger than {_MAX_TEXT >> 20} MiB")
    blobs.append(raw)
    return raw.decode("utf-8")


def _table(path: Path, blobs: list[bytes]) -> Iterator[str]:
    _text(path, blobs)
    yield from whitelist.table_findings(path.name, read_table(path))


def _shard(path: Path, blobs: list[bytes]) -> Iterator[str]:
    """Plain members one after the other, no field of theirs filled but name and size, zeros between and after."""
    end = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            where = f"member '{member.name[:120]}'"
            key, _, suffix = member.name.partition(".")
            if not whitelist.SAMPLE_KEY.fullmatch(key) or suffix not in ("npy.zst", "json"):
                yield f"{where} is not named as a sample"
            plain = tarfile.TarInfo(member.name)
            plain.size = member.size
            with open(path, "rb") as file:
                file.seek(member.offset)
                gap = file.read(member.offset_data - member.offset)
            if gap != plain.tobuf(tarfile.USTAR_FORMAT) or member.offset != end:
                yield f"{where}: its tar header holds more than a name and a size"
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if member.size > _MAX_MEMBER:
                raise G3nError(f"{where} is larger than {_MAX_MEMBER >> 20} MiB")
            handle = tar.extractfile(member)
            payload = handle.read() if handle else b""
            blobs.append(member.name.encode())
            if suffix == "json":
                blobs.append(payload)
                yield from (f"{where}: {line}" for line in whitelist.findings(_load(payload), whitelist.SAMPLE, ""))
            else:
                yield from (f"{where}: {line}" for line in _array(payload, blobs))
    with open(path, "rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if any(chunk):
                yield f"something follows its last member at byte {end}"
                break


def _array(payload: bytes, blobs: list[bytes]) -> Iterator[str]:
    """One zstd frame of one .npy file and nothing else."""
    size = zstandard.frame_content_size(payload)
    if not 0 < size <= _MAX_MEMBER:
        raise G3nError(f"zstd frame of {size} bytes")
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    raw = decompressor.decompress(payload)
    if decompressor.unused_data or len(raw) != size:
        yield "bytes follow its zstd frame"
    stream = io.BytesIO(raw)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise G3nError("is not a version 1.0 .npy file")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # on damaged bytes also tokenize's and the compiler's errors
        raise G3nError(f"has no .npy header: {' '.join(str(error).split())[:100]}") from error
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": shape, "fortran_order": fortran, "descr": np.lib.format.dtype_to_descr(dtype)}
    )
    blobs.append(raw[: stream.tell()])
    if raw[: stream.tell()] != header.getvalue() or len(raw) - stream.tell() != int(np.prod(shape)) * dtype.itemsize:
        yield "its .npy file holds more than an array"


def _statistics(path: Path, blobs: list[bytes]) -> Iterator[str]:
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        text = file.read(min(size, 1 << 20))
    blobs.append(text)
    tree = _load(text)
    for name, entry in tree.items():
        if name not in ("mean", "scale") or set(entry) != {"dtype", "shape", "data_offsets"}:
            yield f"has the key '{name[:60]}', which is not allowed"


def _png(path: Path, blobs: list[bytes]) -> Iterator[str]:
    raw = path.read_bytes()
    if not raw.startswith(_PNG):
        raise G3nError("is not a PNG file")
    position = len(_PNG)
    while position + 8 <= len(raw):
        (size,) = struct.unpack(">I", raw[position : position + 4])
        kind = raw[position + 4 : position + 8]
        if kind not in _PNG_CHUNKS:
            yield f"has a chunk {kind!r}"
        position += 12 + size
        if kind == b"IEND":
            break
    if position != len(raw):
        yield "bytes follow its picture"


def _page(path: Path, blobs: list[bytes]) -> Iterator[str]:
    text = _text(path, blobs)
    before, after = files("data_prep").joinpath("qc_page.html").read_text(encoding="utf-8").split("__DATA__")
    if not (text.startswith(before) and text.endswith(after)):
        raise G3nError("is not the page that data_prep qc writes")
    data = text[len(before) : len(text) - len(after)]
    yield from whitelist.findings(_load(data), whitelist.PAGE, "")


_SIDECARS = whitelist.DERIVATIVE.pattern
_KINDS: tuple[tuple[str, Callable[[Path, list[bytes]], Iterator[str]]], ...] = (
    (rf"{_SIDECARS}(?<=\.nii\.gz)", _nifti),
    (rf"{_SIDECARS}(?<=\.json)", _json_by(whitelist.SIDECAR)),
    (r"recipe\.json", _json_by(whitelist.RECIPE)),
    (r"manifest\.json", _json_by(whitelist.MANIFEST_ABOUT)),
    (r"(manifest|failures)\.tsv", _table),
    (r"index\.json", _json_by(whitelist.INDEX)),
    (whitelist.SHARD.pattern, _shard),
    (r"statistics\.safetensors", _statistics),
    (r"index\.html", _page),
    (rf"thumbs/{whitelist.SAMPLE_KEY.pattern}\.png", _png),
)
