"""From the bytes of a sample to checked arrays. An allow-list: zstd, then .npy of one known type and shape, and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
import zstandard

from g3n.stream.files import checksum_of, forget, read_members
from g3n.stream.index import Sample, Shard, ShardIndex

_MAX_HEADER_BYTES = 4096
_SMALL_BYTES = 1 << 20
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_HEADER = re.compile(
    re.escape(_NPY_MAGIC) + rb"(?P<size>..)\{'descr': '(?P<dtype>[<>|=]?[a-zA-Z]\d{0,3})', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>[\d, ]{0,80})\), \} *\n",
    re.DOTALL,
)
MAX_LATENT_NUMBERS = 1 << 20  # N * C of one visit; the published model has 38,400


class Damage(Exception):
    """A sample that is not what its index and checksum promise; the message names shard, key and offset."""


@dataclass(frozen=True)
class Volume:
    """``voxels`` int16 [X, Y, Z] in stored units (stored * scale = raw intensity); mean and std of the brain in them.

    ``phenotypes`` are what is known beyond the variables, ``group`` whom the subject shares a split with (None: nobody)."""

    voxels: np.ndarray
    brain_mean: float
    brain_std: float
    scale: float
    days_from_baseline: float | None
    variables: dict[str, Any]
    phenotypes: dict[str, Any] = field(default_factory=dict)
    group: str | None = None


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


def read_volume_sample(index: ShardIndex, shard: Shard, sample: Sample) -> Volume:
    """Raises Damage for a bad sample or a missing shard, G3nError for storage that does not answer."""
    payload, meta, where = _read(index, shard, sample)
    try:
        shape = index.grid.shape
        _need(tuple(meta["shape"]) == shape, f"JSON says shape {meta['shape']}, the index's grid is {list(shape)}")
        voxels = decode_array(payload, np.dtype("<i2"), shape, shape)
        _check_hash(voxels, meta)
        _check_contrast(voxels, len(payload))
        mean, std, scale = (_number(meta[name], name) for name in ("brain_mean", "brain_std", "scale"))
        _need(std > 0, f"brain_std {std} is not positive")
        phenotypes, group = _simple(meta.get("phenotypes", {}), "phenotypes"), meta.get("group")
        _need(group is None or isinstance(group, str), f"group is {group!r}, expected a word")
        return Volume(voxels, mean, std, scale, _days(meta), _variables(meta), phenotypes, group)
    except _BAD as error:
        raise Damage(f"{where}: {_reason(error)}") from error


def read_latent_sample(index: ShardIndex, shard: Shard, sample: Sample) -> Latents:
    """Raises Damage for a bad sample or a missing shard, G3nError for storage that does not answer."""
    payload, meta, where = _read(index, shard, sample)
    try:
        visits = tuple(Visit(_days(v), _variables(v)) for v in meta["visits"])
        _need(len(visits) == sample.visits, f"JSON says {len(visits)} visits, the index {sample.visits}")
        tokens = decode_array(payload, np.dtype("<f2"), (len(visits), None, None), (len(visits), MAX_LATENT_NUMBERS))
        _check_hash(tokens, meta)
        for number, visit_NC in enumerate(tokens, 1):
            _need(bool(np.isfinite(visit_NC).all()), f"visit {number} has latents that are not finite")
        return Latents(tokens, visits)
    except _BAD as error:
        raise Damage(f"{where}: {_reason(error)}") from error


def decode_array(
    payload: bytes, dtype: np.dtype[Any], shape: tuple[int | None, ...], largest: tuple[int, ...]
) -> np.ndarray:
    """The C-ordered array in one zstd frame of a .npy file.

    ``shape`` is what it must have (None: any), ``largest`` bounds the bytes allocated before anything is decoded.
    Only ``dtype`` is taken, so objects (pickles) never get anywhere. Raises ValueError or zstandard.ZstdError.
    """
    limit = math.prod(largest) * dtype.itemsize + _MAX_HEADER_BYTES
    size = zstandard.frame_content_size(payload)
    _need(0 < size <= limit, f"zstd frame of {size} bytes, at most {limit} expected")
    buffer = np.empty(size, np.uint8)
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload) as reader:
        _need(reader.readinto(buffer.data) == size, "zstd frame ends early")
    found, fortran, found_shape, start = _npy_header(buffer[:_MAX_HEADER_BYTES].tobytes())
    _need(found == dtype, f"array of {found}, expected {dtype}")
    _need(not fortran, "array in Fortran order, expected C order")
    fits = len(found_shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found_shape, strict=True))
    _need(fits and min(found_shape) > 0, f"array of shape {found_shape}, expected {shape}")
    _need(size - start == math.prod(found_shape) * dtype.itemsize, f"{size - start} bytes for shape {found_shape}")
    return buffer[start:].view(dtype).reshape(found_shape)


def _npy_header(content: bytes) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """(dtype, Fortran order, shape, bytes of the header) of a .npy file as numpy writes version 1.0.

    Not by numpy, which calls ast.literal_eval: threads that do so at once get SystemError from Python 3.11.
    """
    found = _NPY_HEADER.match(content)
    if found is None or found.end() != len(_NPY_MAGIC) + 2 + int.from_bytes(found["size"], "little"):
        raise ValueError("not a .npy header of version 1.0")
    try:
        dtype = np.dtype(found["dtype"].decode())
    except TypeError as error:
        raise ValueError(f"not a .npy header: {_reason(error)}") from error
    shape = tuple(int(n) for n in found["shape"].replace(b",", b" ").split())
    return dtype, found["fortran"] == b"True", shape, found.end()


_BAD = (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError, zstandard.ZstdError)


def _read(index: ShardIndex, shard: Shard, sample: Sample) -> tuple[bytes, Mapping[str, Any], str]:
    where = f"shard '{shard.url}' sample '{sample.key}' at byte {sample.members['npy.zst'][0]}"
    try:
        members = _checked(index, shard, sample)
        meta = json.loads(members["json"])
        _need(isinstance(meta, dict), "its JSON is not an object")
    except OSError as error:
        raise Damage(f"{where}: the shard cannot be read ({error.strerror or _reason(error)})") from error
    except _BAD as error:
        raise Damage(f"{where}: {_reason(error)}") from error
    return members["npy.zst"], meta, where


def _checked(index: ShardIndex, shard: Shard, sample: Sample) -> Mapping[str, bytes]:
    """Raises ValueError where the bytes are not the promised ones, also when they come from the storage once more."""
    members = read_members(index, shard, sample)
    if checksum_of(members) != sample.xxh3 and forget(index, shard, sample):
        members = read_members(index, shard, sample)
    for suffix, (_, size) in sample.members.items():
        _need(len(members[suffix]) == size, f"{suffix} has {len(members[suffix])} of {size} bytes, the shard is cut")
    found = checksum_of(members)
    _need(found == sample.xxh3, f"checksum {found}, the index says {sample.xxh3}")
    return members


def _check_hash(array: np.ndarray, meta: Mapping[str, Any]) -> None:
    found = xxhash.xxh3_64_hexdigest(array.data)
    _need(found == meta["xxh3"], f"checksum {found}, expected {meta['xxh3']!r}")


def _check_contrast(voxels: np.ndarray, compressed_bytes: int) -> None:
    """Raise ValueError for a volume that is empty or of one value. Only what zstd made very small can be: scans are not."""
    if voxels.nbytes > _SMALL_BYTES and compressed_bytes * 16 > voxels.nbytes:
        return
    inside = voxels[voxels != 0]
    _need(inside.size > 0, "the volume is empty (all zero)")
    _need(bool(inside.min() != inside.max()), f"the volume is constant ({inside[0]} in every voxel of the brain)")


def _number(value: Any, name: str) -> float:
    _need(isinstance(value, (int, float)) and math.isfinite(value), f"{name} is {value!r}, expected a number")
    return float(value)


def _days(meta: Mapping[str, Any]) -> float | None:
    days = meta["days_from_baseline"]
    return None if days is None else _number(days, "days_from_baseline")


def _variables(meta: Mapping[str, Any]) -> dict[str, Any]:
    return _simple(meta["variables"], "variables")


def _simple(table: Any, what: str) -> dict[str, Any]:
    simple = isinstance(table, dict) and all(v is None or isinstance(v, (str, int, float)) for v in table.values())
    _need(simple, f"{what} must map a name to a word, a number or null")
    return dict(table)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _reason(error: BaseException) -> str:
    return f"key {error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
