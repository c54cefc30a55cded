"""The order of training samples: pure functions of (seed, epoch, lane, position), the same on any machine and numpy."""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import xxhash

from g3n.config import G3nError


class Place(NamedTuple):
    """Where a lane's position lies: epoch, shard number, and number of the sample among the shard's usable ones."""

    epoch: int
    shard: int
    sample: int


def keyed_hash(domain: str, *words: int | str) -> int:
    """63-bit xxh3 of a domain and its words (integers as int64 modulo 2^64)."""
    parts = (
        word.encode() + b"\0" if isinstance(word, str) else struct.pack("<Q", word & 0xFFFF_FFFF_FFFF_FFFF)
        for word in words
    )
    return xxhash.xxh3_64_intdigest(domain.encode() + b"\0" + b"".join(parts)) >> 1


def sample_seed(run_seed: int, lane: int, position: int) -> int:
    """The 63-bit seed all random draws of a sample come from."""
    return keyed_hash("sample", run_seed, lane, position)


@lru_cache(maxsize=1024)
def permutation(n: int, domain: str, *words: int) -> tuple[int, ...]:
    """0..n-1 sorted by a keyed hash."""
    return tuple(sorted(range(n), key=lambda i: (keyed_hash(domain, *words, i), i)))


class LaneOrder:
    """V lanes over shards with ``counts`` usable samples. Lane l of epoch e owns the shards perm(seed, e)[l::V].

    A lane runs its epochs one after the other without end; its position counts samples from the start of training.
    """

    def __init__(self, counts: Sequence[int], lanes: int, seed: int) -> None:
        if lanes > len(counts):
            raise G3nError(
                f"data.lanes is {lanes}, but there are {len(counts)} training shards and each lane needs one; pack "
                f"into more shards (smaller ones) or lower data.lanes"
            )
        if sum(counts) == 0:
            raise G3nError("the training split holds no usable sample (pairs need subjects with two visits or more)")
        self.counts, self.lanes, self.seed = tuple(counts), lanes, seed
        self._ends: list[list[int]] = [[] for _ in range(lanes)]  # a lane's position at the end of each epoch

    def shards(self, epoch: int, lane: int) -> tuple[int, ...]:
        """The shards of a lane in an epoch, in order."""
        return permutation(len(self.counts), "shards", self.seed, epoch)[lane :: self.lanes]

    def epoch(self, lane: int, position: int) -> int:
        """The number of the epoch in which a lane's position lies."""
        ends = self._ends[lane]
        while not ends or ends[-1] <= position:
            length = sum(self.counts[shard] for shard in self.shards(len(ends), lane))
            ends.append((ends[-1] if ends else 0) + length)
        return bisect_right(ends, position)

    def locate(self, lane: int, position: int) -> Place:
        """Which sample stands at a lane's position."""
        epoch = self.epoch(lane, position)
        return self._sample(lane, epoch, position - (self._ends[lane][epoch - 1] if epoch else 0))

    def instead(self, lane: int, position: int, attempt: int) -> Place:
        """Which sample stands in for a damaged one: any of the same lane and epoch, drawn by hash.

        From the eighth attempt on it is one of the lane's epochs after that, so a lost shard does not stop a lane.
        """
        epoch = self.epoch(lane, position) + attempt // 8
        length = 0
        while length == 0:
            length = sum(self.counts[shard] for shard in self.shards(epoch, lane))
            epoch += 1
        return self._sample(lane, epoch - 1, keyed_hash("instead", self.seed, lane, position, attempt) % length)

    def _sample(self, lane: int, epoch: int, number: int) -> Place:
        for shard in self.shards(epoch, lane):
            if number < self.counts[shard]:
                return Place(epoch, shard, permutation(self.counts[shard], "samples", self.seed, epoch, shard)[number])
            number -= self.counts[shard]
        raise AssertionError("a position lies inside its epoch")


class MixedOrder:
    """The lanes of several sources side by side. ``counts[i]`` are the usable samples of source i's shards.

    ``sources[l]`` is the source that lane l reads; ``Place.shard`` counts through all of them. One source alone is LaneOrder.
    """

    def __init__(self, counts: Sequence[Sequence[int]], sources: Sequence[int], seeds: Sequence[int]) -> None:
        self._orders = [LaneOrder(c, sources.count(i), seeds[i]) for i, c in enumerate(counts)]
        self._first = list(itertools.accumulate((len(c) for c in counts), initial=0))
        self._lanes = [(source, sources[:lane].count(source)) for lane, source in enumerate(sources)]

    def locate(self, lane: int, position: int) -> Place:
        """As LaneOrder."""
        source, own = self._lanes[lane]
        return self._moved(source, self._orders[source].locate(own, position))

    def instead(self, lane: int, position: int, attempt: int) -> Place:
        """As LaneOrder: of the same source too."""
        source, own = self._lanes[lane]
        return self._moved(source, self._orders[source].instead(own, position, attempt))

    def _moved(self, source: int, place: Place) -> Place:
        return place._replace(shard=place.shard + self._first[source])


def share_lanes(weights: Sequence[float], lanes: int) -> tuple[int, ...]:
    """The source of each lane: as many lanes a source as its weight asks for (largest remainder), evenly spread."""
    exact = [w / sum(weights) * lanes for w in weights]
    given = [int(e) for e in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (given[i] - exact[i], i))
    for i in by_remainder[: lanes - sum(given)]:
        given[i] += 1
    places = sorted(((turn + 0.5) / n, i) for i, n in enumerate(given) for turn in range(n))
    return tuple(i for _, i in places)


def first_turn(samples: int, world: int, rank: int) -> int:
    """How many samples this rank has had when the run has had ``samples``: rank r takes samples k = r mod world."""
    return max(0, -(-(samples - rank) // world))
