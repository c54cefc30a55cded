"""The index of a shard folder: what is in it and at which byte. Nothing of it is trusted before it is checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from g3n.config import G3nError
from g3n.nifti import Grid
from g3n.stream.remote import read_file

FORMAT = "g3n-shards-1"
MEMBERS = ("npy.zst", "json")
MAX_INDEX_BYTES = 1 << 30
MAX_JSON_BYTES = 1 << 20
MAX_VOXELS = 1 << 28
MAX_MEMBER_BYTES = 1 << 30
MAX_VISITS = 1024
CACHE_GIB = 20.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_HEX = re.compile(r"[0-9a-f]{1,64}")
_VARIABLE = re.compile(r"[a-z][a-z0-9_]{0,40}")
_MAX_LEVEL = 200


@dataclass(frozen=True)
class Sample:
    """One sample: ``members`` maps a member's suffix to (offset, size) of its payload inside the shard, ``xxh3`` is the
    checksum of these payloads. ``variables`` has a table for each visit; None where an older index does not tell."""

    key: str
    members: Mapping[str, tuple[int, int]]
    subject: str
    modality: str
    visits: int
    xxh3: str
    variables: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Shard:
    """One tar file in ``folder`` (a path or URL); ``xxh3`` is the hex xxh3_64 of its bytes."""

    folder: str
    name: str
    bytes: int
    xxh3: str
    samples: tuple[Sample, ...]

    @property
    def url(self) -> str:
        return f"{self.folder}/{self.name}"


@dataclass(frozen=True)
class Source:
    """A folder of shards and how much of each training batch comes from it, in relation to the others."""

    url: str
    fingerprint: str
    weight: float


@dataclass(frozen=True)
class ShardIndex:
    """``raw`` holds every field of index.json but ``splits`` (recipe, tokenizer, volumes, ...).

    ``cache`` (default ~/.cache/g3n) keeps up to ``cache_gib`` GiB of remote shards.
    """

    url: str
    kind: Literal["volume", "latent"]
    fingerprint: str
    grid: Grid
    variables: Mapping[str, list[Any]]
    splits: Mapping[str, tuple[Shard, ...]]
    raw: Mapping[str, Any]
    sources: tuple[Source, ...]
    cache: str | None = None
    cache_gib: float = CACHE_GIB

    def shards(self, split: str) -> tuple[Shard, ...]:
        """Raises G3nError where the index has no such split."""
        if split not in self.splits:
            raise G3nError(f"shards '{self.url}' have no split '{split}'; known: {', '.join(self.splits) or 'none'}")
        return self.splits[split]


def load_index(url: str, cache: str | None = None, cache_gib: float = CACHE_GIB) -> ShardIndex:
    """Read and check ``<url>/index.json`` of a local folder, an http(s) or an s3 address.

    Raises G3nError where it is missing, over 1 GiB, not JSON, of another format, or says something impossible.
    """
    url = str(url).rstrip("/")
    where = f"{url}/index.json"
    try:
        text = read_file(where, MAX_INDEX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise G3nError(
            f"shards '{url}' have no readable index.json ({reason}); give the folder that python -m data_prep pack or "
            f"encode wrote"
        ) from error
    if len(text) > MAX_INDEX_BYTES:
        raise G3nError(f"'{where}' is larger than {MAX_INDEX_BYTES} bytes; split the data into several shard folders")
    try:
        return replace(parse_index(url, json.loads(text)), cache=cache, cache_gib=cache_gib)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"key {error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise G3nError(
            f"'{where}' is not a {FORMAT} index: {reason[:300]}; run data_prep pack or encode again"
        ) from error


def parse_index(url: str, tree: Any) -> ShardIndex:
    """The checked index. Raises ValueError, KeyError, TypeError or AttributeError on anything unexpected."""
    _need(isinstance(tree, dict), "expected a JSON object")
    _need(tree.get("format") == FORMAT, f"format is {tree.get('format')!r}")
    _need(tree["kind"] in ("volume", "latent"), f"kind is {tree['kind']!r}, expected volume or latent")
    _need(bool(_HEX.fullmatch(tree["fingerprint"])), f"fingerprint {tree['fingerprint']!r} is not hex")
    _need(all(isinstance(v, list) for v in tree["variables"].values()), "variables must map a name to a list")
    splits = {_name(split): tuple(_shard(s, url) for s in shards) for split, shards in tree["splits"].items()}
    names = [shard.name for shards in splits.values() for shard in shards]
    keys = [sample.key for shards in splits.values() for shard in shards for sample in shard.samples]
    _need(len(set(names)) == len(names), "a shard is named twice")
    _need(len(set(keys)) == len(keys), "a sample key is there twice")
    return ShardIndex(
        url=url,
        kind=tree["kind"],
        fingerprint=tree["fingerprint"],
        grid=_grid(tree["grid"]),
        variables=tree["variables"],
        splits=splits,
        raw={name: value for name, value in tree.items() if name != "splits"},
        sources=(Source(url, tree["fingerprint"], 1.0),),
    )


def _grid(tree: Mapping[str, Any]) -> Grid:
    shape, affine = tree["shape"], tree["affine"]
    _need(len(shape) == 3 and all(_whole(n) and 0 < n <= 4096 for n in shape), f"grid shape {shape} is impossible")
    rows = tuple(tuple(float(x) for x in row) for row in affine)
    _need(math.prod(shape) <= MAX_VOXELS, f"grid shape {shape} has more than {MAX_VOXELS} voxels")
    _need(len(rows) == 4 and all(len(row) == 4 for row in rows), "grid affine must be 4 x 4")
    _need(all(math.isfinite(x) for row in rows for x in row), "grid affine is not finite")
    return Grid(shape=(shape[0], shape[1], shape[2]), affine=rows)


def _shard(tree: Mapping[str, Any], folder: str) -> Shard:
    name, size, checksum = _name(tree["name"]), tree["bytes"], tree["xxh3"]
    _need(name.endswith(".tar"), f"shard '{name}' is not a .tar")
    _need(_whole(size) and size > 0, f"shard '{name}' has {size!r} bytes")
    _need(bool(_HEX.fullmatch(checksum)), f"shard '{name}': xxh3 {checksum!r} is not hex")
    return Shard(folder, name, size, checksum, tuple(_sample(s, name, size) for s in tree["samples"]))


def _sample(tree: Mapping[str, Any], shard: str, shard_bytes: int) -> Sample:
    key, visits = _name(tree["key"]), tree["visits"]
    members = {suffix: (int(offset), int(size)) for suffix, (offset, size) in tree["members"].items()}
    _need(sorted(members) == sorted(MEMBERS), f"sample '{key}' has members {sorted(members)}, expected {MEMBERS}")
    for suffix, (offset, size) in members.items():
        inside = offset >= 0 and size > 0 and offset + size <= shard_bytes
        _need(inside, f"sample '{key}': {suffix} at {offset} + {size} is outside '{shard}' ({shard_bytes} bytes)")
    _need(members["npy.zst"][1] <= MAX_MEMBER_BYTES, f"sample '{key}': its array is over {MAX_MEMBER_BYTES} bytes")
    _need(members["json"][1] <= MAX_JSON_BYTES, f"sample '{key}': its JSON is over {MAX_JSON_BYTES} bytes")
    _need(_whole(visits) and 1 <= visits <= MAX_VISITS, f"sample '{key}' has {visits!r} visits")
    _need(bool(_HEX.fullmatch(tree["xxh3"])), f"sample '{key}': xxh3 {tree['xxh3']!r} is not hex")
    variables = None if "variables" not in tree else tuple(_variables(v, key) for v in tree["variables"])
    _need(variables is None or len(variables) == visits, f"sample '{key}' has variables of other than {visits} visits")
    return Sample(key, members, _name(tree["subject"]), _name(tree["modality"]), visits, tree["xxh3"], variables)


def _variables(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    for name, value in tree.items():
        word = isinstance(value, str) and len(value) <= _MAX_LEVEL
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        known = bool(_VARIABLE.fullmatch(name)) and (value is None or word or number)
        _need(known, f"sample '{key}': variable {name[:60]!r} is {str(value)[:60]!r}, expected a word or a number")
    return dict(tree)


def _name(text: Any) -> str:
    """A plain file-name-safe word: it becomes part of paths."""
    _need(isinstance(text, str) and bool(_NAME.fullmatch(text)), f"{text!r} is not a plain name")
    return str(text)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
