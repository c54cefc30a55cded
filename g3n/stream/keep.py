"""Decoded samples that stay in memory, so that a cohort of latents is read and checked once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from g3n.stream.decode import Latents, Volume
from g3n.stream.index import Sample, Shard

T = TypeVar("T", Volume, Latents)
VISIT_BYTES = 2048


class Keep:
    """At most ``gib`` GiB of decoded samples, as they came first: when it is full, no more are added and none leaves.

    A run meets every sample once an epoch in an order of its own, so the oldest would be the next to be wanted and evicting
    it would help nobody. Nothing of what is kept may be changed. Threads may call ``read`` at once; a sample that two ask for at
    once is read twice and kept once.
    """

    def __init__(self, gib: float) -> None:
        self.room_bytes = int(gib * 2**30)
        self.kept: dict[tuple[str, str], Volume | Latents] = {}
        self._lock = threading.Lock()

    def read(self, shard: Shard, sample: Sample, read: Callable[[], T]) -> T:
        """What is kept of ``sample``, or what ``read()`` gives; its errors pass, and damage is not remembered."""
        key = (shard.url, sample.key)
        if key in self.kept:
            return self.kept[key]  # type: ignore[return-value]  # a stream reads one kind
        found = read()
        size = size_bytes(found)
        with self._lock:
            if key not in self.kept and size <= self.room_bytes:
                self.kept[key] = found
                self.room_bytes -= size
        return found


def size_bytes(sample: Volume | Latents) -> int:
    """Of the array and, by a round figure, of the Python objects that hold what is known of each visit."""
    if isinstance(sample, Volume):
        return sample.voxels.nbytes + VISIT_BYTES
    return sample.tokens.nbytes + VISIT_BYTES * len(sample.visits)
