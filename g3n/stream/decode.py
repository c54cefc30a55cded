"""From the bytes of a sample to checked arrays. An allow-list: zstd, then .npy of one known type and shape, and JSON."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from g3n.stream.files import checksum_of, read_members, shard_path
from g3n.stream.index import Sample, Shard, ShardIndex

_MAX_HEADER_BYTES = 4096
MAX_LATENT_NUMBERS = 1 << 20  # N * C of one visit; the published model has 38,400


class Damage(Exception):
    """A sample that is not what its index and checksum promise; the message names shard, key and offset."""


@dataclass(frozen=True)
class Volume:
    """``voxels`` int16 [X, Y, Z] in stored units (stored * scale = raw intensity); mean and std of the brain in them."""

    voxels: np.ndarray
    brain_mean: float
    brain_std: float
    scale: float
    days_from_baseline: float | None
    variables: dict[str, Any]


@dataclass(frozen=True)
class Visit:
    """What is known of one visit beside its latent."""

    days_from_baseline: float | None
    variables: dict[str, Any]


@dataclass(frozen=True)
class Latents:
    """``tokens`` float16 [visits, N, C], raw projected tokens in time order."""

    tokens: np.ndarray
    visits: tuple[Visit, ...]


def read_volume_sample(index: ShardIndex, shard: Shard, sample: Sample, cache: str | Path | None = None) -> Volume:
    """Raises Damage for a bad sample, G3nError for a missing shard."""
    payload, meta, where = _read(index, shard, sample, cache)
    try:
        shape = index.grid.shape
        _need(tuple(meta["shape"]) == shape, f"JSON says shape {meta['shape']}, the index's grid is {list(shape)}")
        voxels = decode_array(payload, np.dtype("<i2"), shape, shape)
        _check_hash(voxels, meta)
        mean, std, scale = (_number(meta[name], name) for name in ("brain_mean", "brain_std", "scale"))
        _need(std > 0, f"brain_std {std} is not positive")
        return Volume(voxels, mean, std, scale, _days(meta), _variables(meta))
    except _BAD as error:
        raise Damage(f"{where}: {_reason(error)}") from error


def read_latent_sample(index: ShardIndex, shard: Shard, sample: Sample, cache: str | Path | None = None) -> Latents:
    """Raises Damage for a bad sample, G3nError for a missing shard."""
    payload, meta, where = _read(index, shard, sample, cache)
    try:
        visits = tuple(Visit(_days(v), _variables(v)) for v in meta["visits"])
        _need(len(visits) == sample.visits, f"JSON says {len(visits)} visits, the index {sample.visits}")
        tokens = decode_array(payload, np.dtype("<f2"), (len(visits), None, None), (len(visits), MAX_LATENT_NUMBERS))
        _check_hash(tokens, meta)
        return Latents(tokens, visits)
    except _BAD as error:
        raise Damage(f"{where}: {_reason(error)}") from error


def decode_array(
    payload: bytes, dtype: np.dtype[Any], shape: tuple[int | None, ...], largest: tuple[int, ...]
) -> np.ndarray:
    """The C-ordered array in one zstd frame of a .npy file.

    ``shape`` is what it must have (None: any), ``largest`` bounds the bytes allocated before anything is decoded.
    The header is parsed by numpy's own parser and only ``dtype`` is taken, so objects (pickles) never get anywhere.
    Raises ValueError or zstandard.ZstdError.
    """
    limit = math.prod(largest) * dtype.itemsize + _MAX_HEADER_BYTES
    size = zstandard.frame_content_size(payload)
    _need(0 < size <= limit, f"zstd frame of {size} bytes, at most {limit} expected")
    buffer = np.empty(size, np.uint8)
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload) as reader:
        _need(reader.readinto(buffer.data) == size, "zstd frame ends early")
    header = io.BytesIO(buffer[:_MAX_HEADER_BYTES].tobytes())
    try:
        _need(np.lib.format.read_magic(header) == (1, 0), "not a version 1.0 .npy file")
        found_shape, fortran, found = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # on damaged bytes also tokenize's and the compiler's errors
        raise ValueError(f"not a .npy header: {_reason(error)}") from error
    _need(found == dtype, f"array of {found}, expected {dtype}")
    _need(not fortran, "array in Fortran order, expected C order")
    fits = len(found_shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found_shape, strict=True))
    _need(fits and min(found_shape) > 0, f"array of shape {found_shape}, expected {shape}")
    start = header.tell()
    _need(size - start == math.prod(found_shape) * dtype.itemsize, f"{size - start} bytes for shape {found_shape}")
    return buffer[start:].view(dtype).reshape(found_shape)


_BAD = (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError, zstandard.ZstdError)


def _read(
    index: ShardIndex, shard: Shard, sample: Sample, cache: str | Path | None
) -> tuple[bytes, Mapping[str, Any], str]:
    offset = sample.members["npy.zst"][0]
    where = f"shard '{shard.name}' sample '{sample.key}' at byte {offset}"
    path = shard_path(index, shard, cache)
    try:
        members = read_members(path, sample)
        for suffix, (_, size) in sample.members.items():
            _need(
                len(members[suffix]) == size, f"{suffix} has {len(members[suffix])} of {size} bytes, the shard is cut"
            )
        found = checksum_of(members)
        _need(found == sample.xxh3, f"checksum {found}, the index says {sample.xxh3}")
        meta = json.loads(members["json"])
        _need(isinstance(meta, dict), "its JSON is not an object")
    except (*_BAD, OSError) as error:
        raise Damage(f"{where}: {_reason(error)}") from error
    return members["npy.zst"], meta, where


def _check_hash(array: np.ndarray, meta: Mapping[str, Any]) -> None:
    found = xxhash.xxh3_64_hexdigest(array.data)
    _need(found == meta["xxh3"], f"checksum {found}, expected {meta['xxh3']!r}")


def _number(value: Any, name: str) -> float:
    _need(isinstance(value, (int, float)) and math.isfinite(value), f"{name} is {value!r}, expected a number")
    return float(value)


def _days(meta: Mapping[str, Any]) -> float | None:
    days = meta["days_from_baseline"]
    return None if days is None else _number(days, "days_from_baseline")


def _variables(meta: Mapping[str, Any]) -> dict[str, Any]:
    table = meta["variables"]
    simple = isinstance(table, dict) and all(v is None or isinstance(v, (str, int, float)) for v in table.values())
    _need(simple, "variables must map a name to a word, a number or null")
    return dict(table)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _reason(error: BaseException) -> str:
    return f"key {error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
