"""Shard folders of a few bytes a sample, for tests of order and damage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import PackedSample, write_index, write_split
from g3n.stream.index import ShardIndex, load_index

SHAPE = (4, 6, 8)
AFFINE = [[-1.0, 0, 0, 2], [0, -1.0, 0, 2], [0, 0, 1.0, -3], [0, 0, 0, 1]]
TOKENS, CHANNELS = 6, 3


def volume_sample(number: int, array: np.ndarray | None = None) -> PackedSample:
    """Volume ``number``: its voxels and age say which one it is."""
    rng = np.random.default_rng(number)
    array = rng.integers(1, 1000, SHAPE).astype(np.int16) if array is None else array
    meta = {
        "shape": list(SHAPE),
        "scale": 0.5,
        "brain_mean": float(array.mean()) if array.dtype == np.int16 else 0.0,
        "brain_std": float(array.std()) if array.dtype == np.int16 else 1.0,
        "affine": AFFINE,
        "days_from_baseline": 0,
        "variables": {"modality": "T1", "age_years": float(number)},
    }
    subject = f"{number:016x}"
    return PackedSample(f"sub-{subject}_ses-01_T1", subject, "T1", 1, array, meta)


def latent_sample(number: int, visits: int, dated: bool = True) -> PackedSample:
    """Subject ``number`` with a visit a year."""
    tokens = np.random.default_rng(number).standard_normal((visits, TOKENS, CHANNELS)).astype(np.float16)
    days = [round(365.25 * i) if dated else None for i in range(visits)]
    facts = [
        {"days_from_baseline": d, "variables": {"modality": "T1", "age_years": 50.0 + i}} for i, d in enumerate(days)
    ]
    subject = f"{number:016x}"
    return PackedSample(f"sub-{subject}_T1", subject, "T1", visits, tokens, {"visits": facts})


def write(folder: Path, kind: str, **splits: Sequence[list[PackedSample]]) -> ShardIndex:
    """Write the shards of each split and open them as a user would."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        "kind": kind,
        "recipe": {},
        "grid": {"shape": list(SHAPE), "affine": AFFINE},
        "variables": {"modality": ["T1"], "age_years": [0, 100]},
    }
    write_index(folder, header, {name: write_split(folder, name, shards) for name, shards in splits.items()})
    return load_index(str(folder))


def volumes(folder: Path, counts: Sequence[int], val: Sequence[int] = (), first: int = 0) -> ShardIndex:
    """Volume shards of ``counts`` training samples and ``val`` validation samples, numbered through from ``first``."""
    numbers = itertools.count(first)
    train, held_out = ([[volume_sample(next(numbers)) for _ in range(n)] for n in ns] for ns in (counts, val))
    return write(folder, "volume", train=train, val=held_out)


def flip(index: ShardIndex, split: str, shard: int, sample: int) -> str:
    """Flip one byte in the middle of a sample's array; the name the stream must give it."""
    entry = index.shards(split)[shard]
    offset, size = entry.samples[sample].members["npy.zst"]
    path = Path(index.url) / entry.name
    content = bytearray(path.read_bytes())
    content[offset + size // 2] ^= 0x40
    path.write_bytes(content)
    return f"shard '{entry.url}' sample '{entry.samples[sample].key}' at byte {offset}"
