"""Bytes of a shard: local ones are read in place, remote ones through the node's block cache."""

from __future__ import annotations

import os
from collections.abc import Mapping

import xxhash

from g3n.stream.cache import open_cache
from g3n.stream.index import MEMBERS, Sample, Shard, ShardIndex
from g3n.stream.remote import local_path


def read_range(index: ShardIndex, shard: Shard, start: int, size: int) -> bytes:
    """Bytes of a shard; fewer where it was cut, never more than the index promises.

    Raises OSError where the shard is missing or cannot be read, G3nError where its storage does not answer.
    """
    size = max(0, min(size, shard.bytes - start))
    path = local_path(shard.url)
    if path is None:
        return open_cache(index.cache, index.cache_gib).read(shard.url, shard.xxh3, shard.bytes, start, size)
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, max(0, min(size, os.fstat(fd).st_size - start)), start)
    finally:
        os.close(fd)


def read_members(index: ShardIndex, shard: Shard, sample: Sample) -> dict[str, bytes]:
    """The payload of each member by offset; shorter than the index says where the file was cut. Raises as read_range."""
    return {suffix: read_range(index, shard, start, size) for suffix, (start, size) in sample.members.items()}


def forget(index: ShardIndex, shard: Shard, sample: Sample) -> bool:
    """Drop what the cache holds of a sample; False where the shard is local, so that reading again is of no use."""
    if local_path(shard.url) is not None:
        return False
    for start, size in sample.members.values():
        open_cache(index.cache, index.cache_gib).drop(shard.url, shard.xxh3, shard.bytes, start, size)
    return True


def checksum_of(members: Mapping[str, bytes]) -> str:
    """Hex xxh3_64 of a sample's payloads, the array before the JSON."""
    digest = xxhash.xxh3_64()
    for suffix in MEMBERS:
        digest.update(members[suffix])
    return digest.hexdigest()
