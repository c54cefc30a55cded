"""Reading every byte of a shard folder again, and naming what is not as its index promises."""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from functools import partial

import xxhash

from data_prep.progress import run_all
from g3n.config import G3nError
from g3n.stream.decode import Damage, read_latent_sample, read_volume_sample
from g3n.stream.files import read_range
from g3n.stream.index import Sample, Shard, ShardIndex, load_index
from g3n.stream.remote import local_path

_CHUNK = 1 << 22


@dataclass(frozen=True)
class Verified:
    """``problems`` has a line for each damaged sample or shard."""

    samples: int
    bytes: int
    problems: tuple[str, ...]


def verify_all(url: str, workers: int | None = None, cache: str | None = None) -> Verified:
    """Read all shards of ``url`` (folder, http(s) or s3 URL): size, checksum, tar headers, every sample's JSON and array.

    Raises G3nError for an index that cannot be read.
    """
    index = load_index(url, cache)
    shards = [shard for shards in index.splits.values() for shard in shards]
    found = list(run_all(partial(verify_shard, index), shards, workers, "verify"))
    problems = [line for lines in found for line in lines]
    return Verified(sum(len(s.samples) for s in shards), sum(s.bytes for s in shards), tuple(problems))


def verify_shard(index: ShardIndex, shard: Shard) -> list[str]:
    """A line for each problem of one shard; samples are judged one by one, so one bad byte condemns one sample."""
    try:
        size, checksum = _digest(index, shard)
    except (G3nError, OSError) as error:
        return [f"shard '{shard.url}': {error}"]
    problems = []
    read = read_volume_sample if index.kind == "volume" else read_latent_sample
    for sample in shard.samples:
        try:
            _check_names(index, shard, sample)
            read(index, shard, sample)
        except (Damage, G3nError) as error:
            problems.append(str(error))
    if size != shard.bytes:
        problems.append(f"shard '{shard.url}' has {size} bytes, the index says {shard.bytes}; copy it again")
    elif checksum != shard.xxh3 and not problems:
        problems.append(f"shard '{shard.url}' differs from its checksum outside of its samples; copy it again")
    return problems


def _digest(index: ShardIndex, shard: Shard) -> tuple[int, str]:
    """Size and checksum; of a remote shard that is longer than the index says, only so much is read."""
    digest, size = xxhash.xxh3_64(), 0
    while chunk := read_range(index, shard, size, _CHUNK):
        digest.update(chunk)
        size += len(chunk)
    path = local_path(shard.url)
    return size if path is None else os.path.getsize(path), digest.hexdigest()


def _check_names(index: ShardIndex, shard: Shard, sample: Sample) -> None:
    """Each member's own tar header must say what the index says: readers that go by the tar alone see the same."""
    for suffix, (offset, size) in sample.members.items():
        where = f"shard '{shard.url}' sample '{sample.key}' at byte {offset}"
        try:
            header = read_range(index, shard, max(0, offset - tarfile.BLOCKSIZE), tarfile.BLOCKSIZE)
            info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, OSError) as error:
            raise Damage(f"{where}: {error}") from error
        if (info.name, info.size) != (f"{sample.key}.{suffix}", size):
            raise Damage(f"{where}: its tar header says '{info.name}' of {info.size} bytes, the index {size}")
