"""Bytes of a sample: local shards are read in place, remote ones from a copy in the node's cache."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from g3n.config import G3nError
from g3n.stream.index import MEMBERS, Sample, Shard, ShardIndex

log = logging.getLogger(__name__)
ATTEMPTS = 3
_CHUNK = 1 << 22


def shard_path(index: ShardIndex, shard: Shard, cache: str | Path | None = None) -> Path:
    """The shard as a local file; a remote one is fetched whole into ``cache`` (default ~/.cache/g3n) first.

    Raises G3nError where it is missing or cannot be fetched.
    """
    filesystem, root = fsspec.core.url_to_fs(index.url)
    if isinstance(filesystem, LocalFileSystem):
        return Path(root) / shard.name
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g3n"
    target = Path(cache or default) / "shards" / index.fingerprint / f"{shard.xxh3}-{shard.name}"
    if not target.is_file():
        _fetch(f"{index.url}/{shard.name}", shard, target)
    return target


def _fetch(url: str, shard: Shard, target: Path) -> None:
    """Copy ``url`` to ``target``: under a temporary name until it is whole, so a reader never sees a part of it."""
    for attempt in range(1, ATTEMPTS + 1):
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = _copy(url, part, shard)
            # What differs each time differs at its source: the samples' own checksums then say which are damaged.
            if whole or attempt == ATTEMPTS:
                if not whole:
                    log.warning("shard '%s' differs from its checksum; its samples are checked one by one", url)
                os.replace(part, target)
                return
        except Exception as error:  # each kind of storage has its own
            if attempt == ATTEMPTS:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise G3nError(f"shard '{url}' cannot be fetched to '{target.parent}': {reason}") from error
        finally:
            part.unlink(missing_ok=True)
        time.sleep(attempt - 1)


def _copy(url: str, part: Path, shard: Shard) -> bool:
    """True where size and checksum are those of the index; never writes more than the index's size."""
    digest, left = xxhash.xxh3_64(), shard.bytes
    with fsspec.open(url, "rb", cache_type="none") as source, open(part, "wb") as sink:
        while left > 0 and (chunk := source.read(min(_CHUNK, left))):
            sink.write(chunk)
            digest.update(chunk)
            left -= len(chunk)
    return left == 0 and digest.hexdigest() == shard.xxh3


def checksum_of(members: Mapping[str, bytes]) -> str:
    """Hex xxh3_64 of a sample's payloads, the array before the JSON."""
    digest = xxhash.xxh3_64()
    for suffix in MEMBERS:
        digest.update(members[suffix])
    return digest.hexdigest()


def read_members(path: Path, sample: Sample) -> dict[str, bytes]:
    """The payload of each member by offset; shorter than the index says where the file was cut, never longer than it is.

    Raises G3nError where the shard is missing.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise G3nError(f"shard '{path}' cannot be opened ({error.strerror}); copy it there or pack again") from error
    try:
        end = os.fstat(fd).st_size
        return {s: os.pread(fd, max(0, min(n, end - start)), start) for s, (start, n) in sample.members.items()}
    finally:
        os.close(fd)
