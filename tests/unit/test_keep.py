"""data.keep_gib: the same batches to the bit, and nothing that fits is read twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from g3n.stream import decode
from g3n.stream.index import Sample, Shard, ShardIndex
from g3n.stream.keep import VISIT_BYTES, Keep, size_bytes
from g3n.stream.lanes import StreamConfig, TrainStream
from g3n.stream.pairs import Kind
from g3n.stream.samples import Batch
from tests import shards

VISITS = (3, 2, 4, 2, 2)
LATENT_BYTES = shards.TOKENS * shards.CHANNELS * 2


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    samples = [shards.latent_sample(i, n) for i, n in enumerate(VISITS)]
    return shards.write(tmp_path_factory.mktemp("latents"), "latent", train=[samples[:2], samples[2:]])


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return shards.volumes(tmp_path_factory.mktemp("volumes"), (3, 2))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each sample's bytes were asked for."""
    counted: Counter[str] = Counter()
    original = decode.read_members

    def read_members(index: ShardIndex, shard: Shard, sample: Sample) -> Mapping[str, bytes]:
        counted[sample.key] += 1
        return original(index, shard, sample)

    monkeypatch.setattr(decode, "read_members", read_members)
    return counted


def taken(index: ShardIndex, kind: Kind, count: int, **settings: Any) -> tuple[list[Batch], TrainStream]:
    with closing(TrainStream(index, StreamConfig(index.url, 2, **settings), kind, 4, 0, 1, 3)) as stream:
        return [next(stream) for _ in range(count)], stream


def same(one: Batch, other: Batch) -> bool:
    facts = [(b.keys, b.seeds.tolist(), b.lanes.tolist(), b.positions.tolist(), b.variables) for b in (one, other)]
    return facts[0] == facts[1] and all(torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


@pytest.mark.parametrize("kind", ["latent", "pair", "volume"])
@pytest.mark.parametrize("workers", [1, 4])
def test_the_same_batches_over_many_epochs(latents: ShardIndex, volumes: ShardIndex, kind: Kind, workers: int) -> None:
    index = volumes if kind == "volume" else latents
    read, _ = taken(index, kind, 30, workers=workers)
    kept, stream = taken(index, kind, 30, workers=workers, keep_gib=1.0)
    assert all(same(a, b) for a, b in zip(read, kept, strict=True))
    assert len({key for batch in kept for key in batch.keys}) >= 5
    assert stream.damaged == 0


def test_what_fits_is_read_once(latents: ShardIndex, reads: Counter[str]) -> None:
    taken(latents, "latent", 30, workers=1, keep_gib=1.0)
    assert sorted(reads.values()) == [1] * len(VISITS)
    reads.clear()
    taken(latents, "latent", 30, workers=1)
    assert min(reads.values()) > 10


def test_a_full_memory_keeps_what_came_first_and_reads_the_rest(volumes: ShardIndex, reads: Counter[str]) -> None:
    """Room for two volumes and no third: two of the five are read once, the others in every epoch, the batches are the same."""
    one = math.prod(shards.SHAPE) * 2 + VISIT_BYTES
    read, _ = taken(volumes, "volume", 30, workers=1)
    reads.clear()
    kept, _ = taken(volumes, "volume", 30, workers=1, keep_gib=2.9 * one / 2**30)
    assert all(same(a, b) for a, b in zip(read, kept, strict=True))
    first = [batch.keys for batch in kept]
    assert {key for key, n in reads.items() if n == 1} == set(
        list(dict.fromkeys(k for keys in first for k in keys))[:2]
    )
    assert min(n for n in reads.values() if n > 1) > 10


def test_bytes_are_counted_and_never_more_than_allowed(latents: ShardIndex) -> None:
    keep = Keep(1e-5)  # 10,737 bytes
    room = keep.room_bytes
    for shard in latents.shards("train"):
        for sample in shard.samples:
            keep.read(shard, sample, lambda s=shard, x=sample: decode.read_latent_sample(latents, s, x))  # type: ignore[misc]
    held = sum(size_bytes(sample) for sample in keep.kept.values())
    assert held == room - keep.room_bytes <= room
    visits = sum(len(sample.visits) for sample in keep.kept.values() if isinstance(sample, decode.Latents))
    assert held == visits * (LATENT_BYTES + VISIT_BYTES) > 0


def test_damage_is_not_remembered_as_anything_else(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (4, 4))
    name = shards.flip(index, "train", 0, 1)
    read, _ = taken(index, "volume", 10, max_damaged_share=1.0)
    kept, keeping = taken(index, "volume", 10, max_damaged_share=1.0, keep_gib=1.0)
    assert all(same(a, b) for a, b in zip(read, kept, strict=True))
    assert keeping.damaged >= 4
    assert name.split("'")[3] not in {key for batch in kept for key in batch.keys}


@pytest.mark.parametrize("gib", [-1.0, float("inf"), float("nan")])
def test_impossible_sizes(gib: float) -> None:
    with pytest.raises(ValueError, match=r"keep_gib .* must be >= 0; 0 keeps nothing"):
        StreamConfig("x", keep_gib=gib)
