"""Batches for training and evaluation: V lanes in an order that needs no communication between ranks.

Sample k of a run is the next one of lane k mod V and goes to rank k mod world. Its lane and position follow from k and the
state a run started from, so any number of ranks and threads reads the same samples, and a checkpoint is V positions.

A rank reads by threads, not by processes: reading, checksums and zstd hold no interpreter lock, and what a process has read must be
copied through shared memory (docs/log.md has the figures). Nothing is left behind by a job that is killed.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.pool import ThreadPool
from typing import Any

from g3n.config import G3nError
from g3n.stream import cursors
from g3n.stream.decode import Damage
from g3n.stream.index import CACHE_GIB, Sample, Shard, ShardIndex, Source
from g3n.stream.keep import Keep
from g3n.stream.order import MixedOrder, first_turn, keyed_hash, sample_seed, share_lanes
from g3n.stream.pairs import Kind, draw_visits, fixed_visits, usable
from g3n.stream.remote import local_path
from g3n.stream.samples import Batch, Item, collate, read_item

log = logging.getLogger(__name__)
_GRACE = 100  # samples before the damaged share is judged
_ATTEMPTS = 100  # samples tried in place of a damaged one
READS_IN_FLIGHT = 8  # of each rank, at least, where shards are remote


@dataclass(frozen=True)
class StreamConfig:
    shards: str | dict[str, float]  # folder or URL with index.json, or several with the weight of each
    lanes: int = 8  # at most the number of training shards; a multiple of the ranks reads each shard on one of them
    workers: int = 2  # threads of a rank that read and decode
    prefetch: int = 4  # micro-batches read ahead
    cache: str | None = None  # folder for blocks of remote shards; default ~/.cache/g3n
    cache_gib: float = CACHE_GIB  # at most so much there; the processes of a node share it
    keep_gib: float = 0.0  # of a rank's memory for decoded training samples: what fits is read once, not every epoch
    max_damaged_share: float = 0.01
    where: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # variable: levels, or [low, high] of a number

    def __post_init__(self) -> None:
        if not isinstance(self.shards, str) and not (
            self.shards and all(0 < w < math.inf for w in self.shards.values())
        ):
            raise ValueError(f"shards {self.shards} must map a folder or URL to a weight above 0")
        if not self.cache_gib > 0:
            raise ValueError(f"cache_gib {self.cache_gib} must be > 0")
        if not 0 <= self.keep_gib < math.inf:
            raise ValueError(f"keep_gib {self.keep_gib} must be >= 0; 0 keeps nothing")
        if min(self.lanes, self.workers, self.prefetch) < 1 or not 0 <= self.max_damaged_share <= 1:
            raise ValueError(
                f"lanes {self.lanes}, workers {self.workers} and prefetch {self.prefetch} must be >= 1, "
                f"max_damaged_share {self.max_damaged_share} in [0, 1]"
            )


def check_kind(index: ShardIndex, kind: Kind) -> None:
    """Raise G3nError where the shards do not hold what the task reads."""
    needed = "volume" if kind == "volume" else "latent"
    if index.kind != needed:
        raise G3nError(f"shards '{index.url}' hold {index.kind}s, expected {needed}s; check data.shards")


class _RankItems:
    """This rank's items in order, without end."""

    def __init__(
        self, index: ShardIndex, config: StreamConfig, kind: Kind, split: str, rank: int, world: int, seed: int,
        state: cursors.State, history: int,
    ) -> None:  # fmt: skip
        self.index, self.kind, self.workers, self.history = index, kind, config.workers, history
        self.keep = Keep(config.keep_gib)
        self.rank, self.world, self.seed, self.state = rank, world, seed, state
        lane_sources = share_lanes([source.weight for source in index.sources], config.lanes)
        units = [_units(index, source, split, kind, lane_sources.count(i)) for i, source in enumerate(index.sources)]
        self.units = [unit for of_source in units for unit in of_source]
        counts = [[len(samples) for _, samples in of_source] for of_source in units]
        self.order = MixedOrder(counts, lane_sources, _source_seeds(index, seed))

    def __iter__(self) -> Iterator[Item]:
        turn = first_turn(self.state["samples"], self.world, self.rank)
        numbers = itertools.count(self.rank + turn * self.world, self.world)
        local = all(local_path(source.url) is not None for source in self.index.sources)
        return _in_flight(self._item, numbers, self.workers if local else max(self.workers, READS_IN_FLIGHT))

    def _item(self, k: int) -> Item:
        """Sample ``k`` of the run, or another in its place where it is damaged."""
        lane, position = cursors.locate(self.state, k)
        seed = sample_seed(self.seed, lane, position)
        damaged: list[str] = []
        for attempt in range(_ATTEMPTS):
            order = self.order
            place = order.instead(lane, position, attempt) if attempt else order.locate(lane, position)
            shard, samples = self.units[place.shard]
            sample = samples[place.sample]
            visits = draw_visits(self.kind, sample.visits, seed, self.history)
            try:
                item = read_item(self.index, shard, sample, visits, self.keep)
            except Damage as error:
                damaged.append(str(error))
                continue
            return replace(item, seed=seed, lane=lane, position=position + 1, damaged=tuple(damaged))
        raise G3nError(f"{_ATTEMPTS} damaged samples in a row in lane {lane}; the last: {damaged[-1]}; pack again")


def _in_flight(function: Callable[[int], Item], numbers: Iterator[int], count: int) -> Iterator[Item]:
    """``map`` with ``count`` calls under way, so that their waiting overlaps. Results and errors come in order."""
    with ThreadPool(count) as pool:  # its threads are daemons: one that waits for storage holds no process back
        coming = deque(pool.apply_async(function, (next(numbers),)) for _ in range(count))
        while True:
            item = coming.popleft().get()
            coming.append(pool.apply_async(function, (next(numbers),)))
            yield item


def _units(index: ShardIndex, source: Source, split: str, kind: Kind, lanes: int) -> list[tuple[Shard, list[Sample]]]:
    """What a source's lanes share out: its shards with their usable samples.

    A small source in a mix may have more lanes than shards: then each shard is split, so that each lane has a part.
    """
    shards = [shard for shard in index.shards(split) if shard.folder == source.url]
    units = [(shard, [s for s in shard.samples if usable(s, kind)]) for shard in shards]
    if len(index.sources) == 1:
        return units
    if not any(samples for _, samples in units):
        raise G3nError(f"shards '{source.url}' hold no usable {kind} in split '{split}'; take them out of data.shards")
    parts = -(-lanes // len(units))
    return [(shard, samples[part::parts]) for shard, samples in units for part in range(parts)]


def _source_seeds(index: ShardIndex, seed: int) -> list[int]:
    if len(index.sources) == 1:
        return [seed]
    return [keyed_hash("source", seed, source.fingerprint) for source in index.sources]


class TrainStream:
    """Iterate for ``Batch``, without end. ``damaged`` counts the damaged samples this rank has met so far.

    A damaged sample is logged (once) and another one of its lane and epoch takes its turn. Raises G3nError for shards of another
    kind, more lanes than shards, storage that does not answer, and once more than ``max_damaged_share`` of what was read is damaged.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: StreamConfig,
        kind: Kind,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        split: str = "train",
        state: cursors.State | None = None,
        history: int = 1,
    ) -> None:
        check_kind(index, kind)
        state = cursors.check(state or cursors.start(config.lanes), config.lanes)
        items = _RankItems(index, config, kind, split, rank, world, seed, state, history)
        self.damaged = 0
        self._read = 0
        self._named: set[str] = set()
        self._config, self._micro_batch = config, micro_batch
        self._source = iter(items)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(config.prefetch)
        self._end: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="g3n-stream", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # threads that decode while the interpreter ends may crash it

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                self._put(collate([self._next_item() for _ in range(self._micro_batch)]))
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self._put(error)

    def _put(self, value: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(value, timeout=0.2)
            except queue.Full:
                continue

    def _next_item(self) -> Item:
        item = next(self._source)
        self._read += 1 + len(item.damaged)
        for name in item.damaged:
            self.damaged += 1
            if name not in self._named:
                log.warning("damaged sample passed over: %s", name)
            self._named.add(name)
        if item.damaged and self.damaged > self._config.max_damaged_share * max(self._read, _GRACE):
            raise G3nError(
                f"{self.damaged} of {self._read} samples are damaged, more than data.max_damaged_share "
                f"{self._config.max_damaged_share:g} allows; the last: {item.damaged[-1]}; pack again"
            )
        return item

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Batch:
        if self._end is None:
            value = self._queue.get()
            if isinstance(value, Batch):
                return value
            self._end = value
        raise self._end

    def close(self) -> None:
        """Stop reading and end the threads; safe to call twice. There is no batch after it."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._source = iter(())
        self._end = self._end or StopIteration()
        atexit.unregister(self.close)


def eval_batches(
    index: ShardIndex,
    config: StreamConfig | None,
    kind: Kind,
    split: str,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    history: int = 1,
) -> Iterator[Batch]:
    """Every usable sample of a split once, in a fixed shuffled order; the same number of batches on every rank.

    Volume shards give each volume, latent shards each visit, or as pairs the first and last visit of each sample. A
    sample's seed is a function of (seed, key). Short batches are filled up with repeats of weight 0, and so is the place of
    a damaged sample. Raises G3nError as TrainStream does; ``config`` None means no cache and the default share.
    """
    check_kind(index, kind)
    entries = [
        (keyed_hash("eval", seed, sample.key, *visits), shard, sample, visits)
        for shard in index.shards(split)
        for sample in shard.samples
        if usable(sample, kind)
        for visits in fixed_visits(kind, sample.visits, history)
    ]
    entries.sort(key=lambda entry: entry[0])
    read = _EvalReader(index, config or StreamConfig(index.url), entries)
    for first in range(0, len(entries), micro_batch * world):
        mine = range(first + rank * micro_batch, first + (rank + 1) * micro_batch)
        yield collate([read.item(i) for i in mine])


class _EvalReader:
    def __init__(
        self, index: ShardIndex, config: StreamConfig, entries: list[tuple[int, Shard, Sample, tuple[int, ...]]]
    ) -> None:
        self.index, self.config, self.entries = index, config, entries
        self.damaged: set[str] = set()

    def item(self, i: int) -> Item:
        """Entry ``i``, or with weight 0 the next readable one where it is damaged or past the end."""
        for place in itertools.count(i):
            seed, shard, sample, visits = self.entries[place % len(self.entries)]
            try:
                item = read_item(self.index, shard, sample, visits)
            except Damage as error:
                self._count(str(error))
                continue
            return replace(item, seed=seed, weight=float(place == i < len(self.entries)))
        raise AssertionError("counting has no end")

    def _count(self, name: str) -> None:
        if name not in self.damaged:
            log.warning("damaged sample left out of the evaluation: %s", name)
        self.damaged.add(name)
        allowed = min(self.config.max_damaged_share * len(self.entries), len(self.entries) - 1)
        if len(self.damaged) > allowed:
            raise G3nError(
                f"{len(self.damaged)} of {len(self.entries)} samples to evaluate are damaged, more than "
                f"data.max_damaged_share {self.config.max_damaged_share:g} allows; the last: {name}; pack or encode again"
            )
