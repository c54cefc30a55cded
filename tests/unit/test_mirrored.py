"""Which training volumes are turned left to right is each one's own draw, and the rest of the batch stays as it is."""

from __future__ import annotations

import torch

from g3n.stream.samples import Batch
from g3n.tasks.base import mirrored


def batch_of(seeds: torch.Tensor) -> Batch:
    n = len(seeds)
    volume = torch.arange(n * 24, dtype=torch.int16).view(n, 4, 3, 2)
    tensors = {"volume": volume, "mean": torch.zeros(n), "rstd": torch.ones(n)}
    lanes = torch.zeros(n, dtype=torch.int64)
    return Batch(tensors, [{}] * n, [""] * n, seeds, lanes, lanes, torch.ones(n))


def turned(batch: Batch, probability: float) -> list[bool]:
    found = []
    for before, after in zip(batch.tensors["volume"], mirrored(batch, probability).tensors["volume"], strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(0))
        found.append(not torch.equal(after, before))
    return found


def test_the_share_is_what_was_asked_for() -> None:
    batch = batch_of(torch.arange(2000))
    assert sum(turned(batch, 0)) == 0
    assert sum(turned(batch, 1)) == 2000
    assert abs(sum(turned(batch, 0.3)) - 600) < 4 * (2000 * 0.3 * 0.7) ** 0.5


def test_a_volume_is_turned_by_its_own_seed_alone() -> None:
    seeds = torch.arange(1000, 1040)
    whole = turned(batch_of(seeds), 0.5)
    assert whole == [turned(batch_of(seeds[i : i + 1]), 0.5)[0] for i in range(40)]
    assert 5 < sum(whole) < 35


def test_nothing_else_changes() -> None:
    batch = batch_of(torch.arange(4))
    after = mirrored(batch, 1)
    assert after.tensors["mean"] is batch.tensors["mean"]
    assert torch.equal(after.seeds, batch.seeds)
    assert torch.equal(batch.tensors["volume"], batch_of(torch.arange(4)).tensors["volume"])
