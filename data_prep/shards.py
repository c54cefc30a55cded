"""Writing shard folders: tar files of (zstd .npy, JSON) samples and their index, the same bytes for the same samples.

``pack`` (volumes) and ``encode`` (latents) share this; ``g3n.stream`` reads what it writes. A folder is written in this
order: ``start``, then ``write_split`` (or ``write_shard``) for each split, then ``write_index``, which makes it valid.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from g3n.config import G3nError
from g3n.stream.files import checksum_of

FORMAT = "g3n-shards-1"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_PLAN = ".plan"
INDEX_VERSION = 2  # part of each plan: 2 has the variables of each sample


@dataclass(frozen=True)
class PackedSample:
    """``array`` goes to <key>.npy.zst as it is; ``meta`` to <key>.json, with ``xxh3`` of the array's bytes added."""

    key: str
    subject: str  # keyed hash, never a label
    modality: str
    visits: int
    array: np.ndarray
    meta: dict[str, Any]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as bytes, ready to be written: what workers hand back."""

    key: str
    subject: str
    modality: str
    visits: int
    members: dict[str, bytes]
    variables: tuple[dict[str, Any], ...]  # of each visit


def encode_sample(sample: PackedSample) -> EncodedSample:
    """Compress a sample. Raises ValueError for a key or subject that is not a plain name."""
    for name in (sample.key, sample.subject, sample.modality):
        if not _PLAIN.fullmatch(name):
            raise ValueError(f"{name!r} is not a plain name of at most 80 letters, digits, - and _")
    array = np.ascontiguousarray(sample.array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    checksum = xxhash.xxh3_64_hexdigest(array.data)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    payload = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(buffer.getbuffer())
    text = canonical_json({**sample.meta, "xxh3": checksum}).encode()
    members = {"npy.zst": payload, "json": text}
    variables = tuple(visit["variables"] for visit in sample.meta.get("visits", [sample.meta]))
    return EncodedSample(sample.key, sample.subject, sample.modality, sample.visits, members, variables)


def start(output: Path, plan: str) -> bool:
    """Open ``output`` for writing; True where it already holds the finished shards of this ``plan``.

    ``plan`` is a fingerprint of everything that determines the shards. Raises G3nError for a folder that holds
    anything else than this plan's shards, finished or begun.
    """
    index, mark = output / "index.json", output / _PLAN
    if index.is_file():
        try:
            found = json.loads(index.read_text()).get("plan")
        except (ValueError, AttributeError, OSError):
            found = None
        if found == plan:
            return True
        raise G3nError(f"'{output}' holds other shards; give an empty folder or remove this one")
    if output.exists() and not output.is_dir():
        raise G3nError(f"'{output}' is a file; expected a folder to write shards to")
    begun = mark.read_text().strip() if mark.is_file() else None
    if output.is_dir() and any(output.iterdir()) and begun != plan:
        raise G3nError(f"'{output}' is not empty and was not begun by this call; give an empty folder")
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, plan + "\n")
    return False


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def finished_shard(output: Path, name: str) -> dict[str, Any] | None:
    """The index entry of a shard that an earlier, interrupted call of the same plan finished."""
    try:
        entry = json.loads((output / f".{name}.json").read_text())
        return entry if (output / name).stat().st_size == entry["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shard(output: Path, name: str, samples: Iterable[EncodedSample]) -> dict[str, Any]:
    """Write one tar (nothing of the machine or the moment in it) and return its entry in the index."""
    part = output / f".{name}.part"
    entries: list[dict[str, Any]] = []
    with open(part, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            members = {}
            for suffix, payload in sample.members.items():
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
                padding = -len(payload) % tarfile.BLOCKSIZE
                members[suffix] = [tar.offset - padding - len(payload), len(payload)]
            entries.append(
                {
                    "key": sample.key,
                    "members": members,
                    "subject": sample.subject,
                    "modality": sample.modality,
                    "visits": sample.visits,
                    "variables": list(sample.variables),
                    "xxh3": checksum_of(sample.members),
                }
            )
    digest = xxhash.xxh3_64()
    with open(part, "rb") as whole:
        while chunk := whole.read(1 << 22):
            digest.update(chunk)
    entry = {"name": name, "bytes": part.stat().st_size, "xxh3": digest.hexdigest(), "samples": entries}
    os.replace(part, output / name)
    write_text(output / f".{name}.json", canonical_json(entry))
    return entry


def write_split(output: Path, split: str, shards: Iterable[list[PackedSample]]) -> list[dict[str, Any]]:
    """Write one tar a list; the index entries of the split's shards."""
    return [write_shard(output, shard_name(split, i), map(encode_sample, samples)) for i, samples in enumerate(shards)]


def write_index(
    output: Path, header: Mapping[str, Any], splits: Mapping[str, list[dict[str, Any]]], plan: str | None = None
) -> str:
    """Write index.json, which makes the folder valid, and return the fingerprint of header and sample checksums.

    ``header`` has kind, recipe, grid, variables and whatever else the kind of shard needs. ``plan`` is what was given to
    ``start``, if it was called.
    """
    checksums = sorted(
        (s["key"], s["xxh3"], split) for split, e in splits.items() for shard in e for s in shard["samples"]
    )
    fingerprint = fingerprint_of({"header": dict(header), "samples": checksums})
    tree = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        **({} if plan is None else {"plan": plan}),
        **header,
        "splits": splits,
    }
    write_text(output / "index.json", json.dumps(tree, sort_keys=True) + "\n")
    for mark in (output / _PLAN, *(output / f".{e['name']}.json" for entries in splits.values() for e in entries)):
        mark.unlink(missing_ok=True)
    return fingerprint


def fingerprint_of(tree: Any) -> str:
    """Hex xxh3_64 of the canonical JSON of ``tree``."""
    return xxhash.xxh3_64_hexdigest(canonical_json(tree).encode())


def canonical_json(tree: Any) -> str:
    """Sorted keys, no spaces; NaN is refused with ValueError."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(f".{path.name.lstrip('.')}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
