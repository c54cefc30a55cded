"""Shards: tar files of (compressed array, JSON) pairs, and the index that says at which byte each begins."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

FORMAT = "g3n-shards-1"


@dataclass(frozen=True)
class PackedSample:
    """One sample. ``array`` int16 [X, Y, Z] or float16 [visits, N, C]; ``meta`` becomes its JSON."""

    key: str
    subject: str
    modality: str
    visits: int
    array: np.ndarray
    meta: dict[str, Any]


def checksum(array: np.ndarray) -> str:
    """Hex xxh3_64 of an array's bytes in C order."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(array))


def write_split(output: Path, split: str, shards: Iterable[list[PackedSample]]) -> list[dict[str, Any]]:
    """Write ``<split>-00000.tar`` and on, each under a temporary name first; returns the split's entries of index.json."""
    output.mkdir(parents=True, exist_ok=True)
    return [_write_shard(output / f"{split}-{i:05d}.tar", samples) for i, samples in enumerate(shards)]


def write_index(output: Path, header: Mapping[str, Any], splits: Mapping[str, list[dict[str, Any]]]) -> str:
    """Write index.json, the last file of a pack; returns the fingerprint of header and samples."""
    content = [[s["key"], s["checksum"]] for name in sorted(splits) for shard in splits[name] for s in shard["samples"]]
    text = json.dumps({"header": dict(header), "samples": content}, sort_keys=True)
    fingerprint = xxhash.xxh3_64_hexdigest(text.encode())
    entries = {
        name: [
            {**shard, "samples": [{k: v for k, v in s.items() if k != "checksum"} for s in shard["samples"]]}
            for shard in shards
        ]
        for name, shards in splits.items()
    }
    tree = {"format": FORMAT, **header, "fingerprint": fingerprint, "splits": entries}
    part = output / ".index.json.part"
    part.write_text(json.dumps(tree))
    os.replace(part, output / "index.json")
    return fingerprint


def _write_shard(path: Path, samples: list[PackedSample]) -> dict[str, Any]:
    part = path.with_name(f".{path.name}.part")
    entries = []
    with open(part, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            payloads = {"npy.zst": _compressed(sample.array), "json": json.dumps(sample.meta, sort_keys=True).encode()}
            members = {}
            for suffix, payload in payloads.items():
                info = tarfile.TarInfo(f"{sample.key}.{suffix}")
                info.size = len(payload)
                info.mode = 0o644
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
                    "checksum": sample.meta["xxh3"],
                }
            )
    content = part.read_bytes()
    os.replace(part, path)
    return {"name": path.name, "bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content), "samples": entries}


def _compressed(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return zstandard.ZstdCompressor(level=1).compress(buffer.getvalue())
