"""Batches for training and evaluation: V lanes, each read by one worker of one rank, in an order that needs no communication.

Sample k of a run comes from lane k mod V and goes to rank k mod world; lane l belongs to rank l mod world and, inside it, to
worker (l // world) mod workers. With V a multiple of world x workers the global batch of a step is the same set at any such
topology, and a checkpoint is V positions.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

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


@dataclass(frozen=True)
class StreamConfig:
    shards: str  # folder or URL with index.json
    lanes: int = 8  # a multiple of ranks x workers, at most the number of training shards
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


class _RankItems(IterableDataset):  # type: ignore[type-arg]
    """This rank's items in order, without end; in a loader process, the part of one worker."""

    def __init__(
        self, index: ShardIndex, config: StreamConfig, kind: Kind, split: str, rank: int, world: int, seed: int,
        state: cursors.State,
    ) -> None:  # fmt: skip
        self.index, self.config, self.kind = index, config, kind
        self.rank, self.world, self.seed, self.state = rank, world, seed, state
        self.shards = index.shards(split)
        self.samples = [[s for s in shard.samples if usable(s, kind)] for shard in self.shards]
        self.order = LaneOrder([len(s) for s in self.samples], config.lanes, seed)

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        turn = first_turn(self.state["samples"], self.world, self.rank)
        stride = 1
        if info is not None:
            turn, stride = turn + info.id, info.num_workers
        positions = list(self.state["cursors"])
        while True:
            lane = (self.rank + turn * self.world) % self.config.lanes
            item = self._next(lane, positions[lane])
            positions[lane] = item.position
            yield item
            turn += stride

    def _next(self, lane: int, position: int) -> Item:
        """The next readable sample of a lane; damaged ones are passed over and named."""
        damaged: list[str] = []
        for attempt in range(max(_GRACE, sum(self.order.counts)) + 1):
            place = self.order.locate(lane, position + attempt)
            sample = self.samples[place.shard][place.sample]
            seed = sample_seed(self.seed, lane, position + attempt)
            visits = draw_visits(self.kind, sample.visits, seed)
            try:
                item = read_item(self.index, self.shards[place.shard], sample, visits, self.config.cache)
            except Damage as error:
                damaged.append(str(error))
                continue
            return replace(item, seed=seed, lane=lane, position=position + attempt + 1, damaged=tuple(damaged))
        raise G3nError(f"lane {lane} holds no readable sample, the last: {damaged[-1]}; pack the data again")


class TrainStream:
    """Iterate for ``Batch``, forever. ``damaged`` counts the samples passed over so far on this rank."""

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
        readers = world * max(1, config.workers)
        if config.lanes % readers:
            raise G3nError(
                f"data.lanes {config.lanes} must be a multiple of {world} ranks x {max(1, config.workers)} workers = "
                f"{readers}; set data.lanes to {max(1, round(config.lanes / readers)) * readers}"
            )
        state = cursors.check(state or cursors.start(config.lanes), config.lanes)
        items = _RankItems(index, config, kind, split, rank, world, seed, state)
        self.damaged = 0
        self._seen = 0
        self._config, self._micro_batch = config, micro_batch
        self._source = self._open(items)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(config.prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _open(self, items: _RankItems) -> Iterator[Item]:
        workers = self._config.workers
        if workers == 0:
            return iter(items)
        ahead = max(2, self._config.prefetch * self._micro_batch // workers)
        loader = DataLoader(
            items, batch_size=None, num_workers=workers, prefetch_factor=ahead, multiprocessing_context="forkserver"
        )
        return iter(loader)

    def _fill(self) -> None:
        try:
            while not self._stop.is_set():
                batch = collate([self._checked(next(self._source)) for _ in range(self._micro_batch)])
                self._put(batch)
        except BaseException as error:  # whatever it is, the training thread must hear of it
            self._put(error)

    def _put(self, value: Batch | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(value, timeout=0.2)
            except queue.Full:
                continue

    def _checked(self, item: Item) -> Item:
        self._seen += 1
        for name in item.damaged:
            self.damaged += 1
            log.warning("damaged sample passed over: %s", name)
        if self.damaged > self._config.max_damaged_share * max(self._seen + self.damaged, _GRACE):
            raise G3nError(
                f"{self.damaged} of {self._seen + self.damaged} samples are damaged, more than data.max_damaged_share "
                f"{self._config.max_damaged_share:g}; the last: {item.damaged[-1] if item.damaged else 'see the log'}"
            )
        return item

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Batch:
        value = self._queue.get()
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        """Stop reading; safe to call twice."""
        self._stop.set()
        self._thread.join(timeout=10)


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

    Short batches are filled up with repeats of weight 0. A volume shard gives each volume, latents each visit, pairs the first and
    last visit of a subject. Damaged samples raise G3nError: an evaluation over fewer samples than it says is wrong.
    """
    check_kind(index, kind)
    entries: list[tuple[Shard, Sample, tuple[int, ...]]] = [
        (shard, sample, visits)
        for shard in index.shards(split)
        for sample in shard.samples
        if usable(sample, kind)
        for visits in fixed_visits(kind, sample.visits)
    ]
    seeds = [keyed_hash("eval", seed, sample.key, *visits) for _, sample, visits in entries]
    order = sorted(range(len(entries)), key=lambda i: seeds[i])
    cache = config.cache if config else None
    a_round = micro_batch * world
    for start in range(0, len(order), a_round):
        mine = [start + rank * micro_batch + j for j in range(micro_batch)]
        items = [_eval_item(index, cache, entries[order[i % len(order)]], seeds[order[i % len(order)]]) for i in mine]
        yield collate([replace(item, weight=float(i < len(order))) for i, item in zip(mine, items, strict=True)])


def _eval_item(index: ShardIndex, cache: Any, entry: tuple[Shard, Sample, tuple[int, ...]], seed: int) -> Item:
    shard, sample, visits = entry
    try:
        return replace(read_item(index, shard, sample, visits, cache), seed=seed)
    except Damage as error:
        raise G3nError(f"cannot evaluate: {error}; pack or encode again") from error
