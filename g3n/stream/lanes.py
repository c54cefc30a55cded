"""Batches for training and evaluation: V lanes in an order that needs no communication between ranks.

Sample k of a run is the next one of lane k mod V and goes to rank k mod world. Its lane and position follow from k and the
state a run started from, so any number of ranks and loader processes reads the same samples, and a checkpoint is V positions.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import queue
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from g3n.config import G3nError
from g3n.stream import cursors
from g3n.stream.decode import Damage
from g3n.stream.index import Sample, Shard, ShardIndex
from g3n.stream.order import LaneOrder, first_turn, keyed_hash, sample_seed
from g3n.stream.pairs import Kind, draw_visits, fixed_visits, usable
from g3n.stream.samples import Batch, Item, collate, read_item

log = logging.getLogger(__name__)
_GRACE = 100  # samples before the damaged share is judged
_ATTEMPTS = 100  # samples tried in place of a damaged one


@dataclass(frozen=True)
class StreamConfig:
    shards: str  # folder or URL with index.json
    lanes: int = 8  # at most the number of training shards; a multiple of ranks x workers reads each shard in one place
    workers: int = 0  # loader processes a rank; 0 reads in a thread
    prefetch: int = 4  # micro-batches read ahead
    cache: str | None = None  # where copies of remote shards go
    max_damaged_share: float = 0.01

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.workers < 0 or self.prefetch < 1 or not 0 <= self.max_damaged_share <= 1:
            raise ValueError(
                f"lanes {self.lanes} and prefetch {self.prefetch} must be >= 1, workers {self.workers} >= 0, "
                f"max_damaged_share {self.max_damaged_share} in [0, 1]"
            )


def check_kind(index: ShardIndex, kind: Kind) -> None:
    """Raise G3nError where the shards do not hold what the task reads."""
    needed = "volume" if kind == "volume" else "latent"
    if index.kind != needed:
        raise G3nError(f"shards '{index.url}' hold {index.kind}s, expected {needed}s; check data.shards")


class _RankItems(IterableDataset[Item | G3nError]):
    """This rank's items in order, without end; in a loader process, every n-th of them. An error comes as the last item."""

    def __init__(
        self, index: ShardIndex, config: StreamConfig, kind: Kind, split: str, rank: int, world: int, seed: int,
        state: cursors.State,
    ) -> None:  # fmt: skip
        self.index, self.cache, self.kind = index, config.cache, kind
        self.rank, self.world, self.seed, self.state = rank, world, seed, state
        self.shards = index.shards(split)
        self.samples = [[s for s in shard.samples if usable(s, kind)] for shard in self.shards]
        self.order = LaneOrder([len(s) for s in self.samples], config.lanes, seed)

    def __iter__(self) -> Iterator[Item | G3nError]:
        info = get_worker_info()
        skip, step = (info.id, info.num_workers) if info else (0, 1)
        turn = first_turn(self.state["samples"], self.world, self.rank)
        try:
            for k in itertools.count(self.rank + (turn + skip) * self.world, step * self.world):
                yield self._item(k)
        except G3nError as error:
            yield error

    def _item(self, k: int) -> Item:
        """Sample ``k`` of the run, or another in its place where it is damaged."""
        lane, position = cursors.locate(self.state, k)
        seed = sample_seed(self.seed, lane, position)
        damaged: list[str] = []
        for attempt in range(_ATTEMPTS):
            order = self.order
            place = order.instead(lane, position, attempt) if attempt else order.locate(lane, position)
            sample = self.samples[place.shard][place.sample]
            visits = draw_visits(self.kind, sample.visits, seed)
            try:
                item = read_item(self.index, self.shards[place.shard], sample, visits, self.cache)
            except Damage as error:
                damaged.append(str(error))
                continue
            return replace(item, seed=seed, lane=lane, position=position + 1, damaged=tuple(damaged))
        raise G3nError(f"{_ATTEMPTS} damaged samples in a row in lane {lane}; the last: {damaged[-1]}; pack again")


class TrainStream:
    """Iterate for ``Batch``, without end. ``damaged`` counts the damaged samples this rank has met so far.

    A damaged sample is logged and another one of its lane and epoch takes its turn. Raises G3nError for shards of another
    kind, more lanes than shards, a missing shard, and once more than ``max_damaged_share`` of what was read is damaged.
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
    ) -> None:
        check_kind(index, kind)
        state = cursors.check(state or cursors.start(config.lanes), config.lanes)
        items = _RankItems(index, config, kind, split, rank, world, seed, state)
        self.damaged = 0
        self._read = 0
        self._config, self._micro_batch = config, micro_batch
        self._source = _open(items, config, micro_batch)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(config.prefetch)
        self._end: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="g3n-stream", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # its processes heed no signal, so an interpreter that ends must not wait for them

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
        if isinstance(item, G3nError):
            raise item
        self._read += 1 + len(item.damaged)
        for name in item.damaged:
            self.damaged += 1
            log.warning("damaged sample passed over: %s", name)
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
        """Stop reading and end the loader processes; safe to call twice. There is no batch after it."""
        self._stop.set()
        self._thread.join(timeout=10)
        self._source = iter(())
        self._end = self._end or StopIteration()
        atexit.unregister(self.close)


def _open(items: _RankItems, config: StreamConfig, micro_batch: int) -> Iterator[Item | G3nError]:
    if config.workers == 0:
        return iter(items)
    # Spawned, not forked from a server: a launcher that stops a job signals all processes, and the server would go first.
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=max(2, config.prefetch * micro_batch // config.workers),
        multiprocessing_context="spawn",
        worker_init_fn=_start_worker,
    )
    return iter(loader)


def _start_worker(_worker: int) -> None:
    """Only the rank decides when to stop: after SIGTERM or Ctrl-C it still needs the samples of its last step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)  # threads of torch abort some of the processes that end the long way


def eval_batches(
    index: ShardIndex,
    config: StreamConfig | None,
    kind: Kind,
    split: str,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
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
        for visits in fixed_visits(kind, sample.visits)
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
                item = read_item(self.index, shard, sample, visits, self.config.cache)
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
