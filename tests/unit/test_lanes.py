"""What a run reads: each sample once an epoch and the same global batches, however many ranks and threads read them."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from g3n.config import G3nError
from g3n.stream import cursors
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream, eval_batches
from g3n.stream.order import LaneOrder
from g3n.stream.samples import Batch
from tests import shards
from tests.launch import ROOT

COUNTS = (3, 1, 4, 2, 5, 2)  # uneven on purpose
GLOBAL_BATCH = 12


class Segment(NamedTuple):
    """A part of a run at one topology."""

    world: int
    micro_batch: int
    steps: int


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return shards.volumes(tmp_path_factory.mktemp("volumes"), COUNTS, val=(4, 3))


def rows(batch: Batch) -> list[tuple[object, ...]]:
    """Everything of each sample that a loss could depend on."""
    facts = zip(batch.keys, batch.seeds.tolist(), batch.lanes.tolist(), batch.positions.tolist(), strict=True)
    voxels = [v.numpy().tobytes() for v in batch.tensors["volume"]]
    norms = zip(batch.tensors["mean"].tolist(), batch.tensors["rstd"].tolist(), strict=True)
    ages = [v["age_years"] for v in batch.variables]
    return [(*f, x, *n, a) for f, x, n, a in zip(facts, voxels, norms, ages, strict=True)]


def run(index: ShardIndex, config: StreamConfig, segments: Sequence[Segment], seed: int = 7) -> list[list[tuple]]:
    """The global batch of each step, resumed from the merged cursors at each new segment. Sample k comes first by k."""
    state, steps = cursors.start(config.lanes), []
    for world, micro_batch, count in segments:
        with ExitStack() as stack:
            streams = [
                stack.enter_context(
                    closing(TrainStream(index, config, "volume", micro_batch, rank, world, seed, state=state))
                )
                for rank in range(world)
            ]
            for _ in range(count):
                taken: list[list[tuple]] = []
                states = []
                for stream in streams:
                    mine, own = [], state
                    for _ in range(GLOBAL_BATCH // (world * micro_batch)):
                        batch = next(stream)
                        mine += rows(batch)
                        own = cursors.merge(own, batch.lanes, batch.positions, len(batch) * world)
                    taken.append(mine)
                    states.append(own)
                assert len({s["samples"] for s in states}) == 1
                merged = [max(values) for values in zip(*(s["cursors"] for s in states), strict=True)]
                state = {"cursors": merged, "samples": states[0]["samples"]}
                steps.append([row for turn in zip(*taken, strict=True) for row in turn])
    return steps


topologies = st.sampled_from([(w, m) for w in (1, 2, 3, 4) for m in (1, 2, 3, 6) if GLOBAL_BATCH % (w * m) == 0])


@settings(max_examples=20, deadline=None)
@given(
    lanes=st.integers(1, len(COUNTS)),
    seed=st.integers(0, 2**62),
    parts=st.lists(st.tuples(topologies, st.integers(1, 3)), min_size=1, max_size=3),
)
def test_any_topology_and_any_resume_reads_the_global_batches_of_one_straight_process(
    index: ShardIndex, lanes: int, seed: int, parts: list[tuple[tuple[int, int], int]]
) -> None:
    config = StreamConfig(index.url, lanes)
    segments = [Segment(world, micro, steps) for (world, micro), steps in parts]
    total = sum(s.steps for s in segments)
    assert run(index, config, segments, seed) == run(index, config, [Segment(1, GLOBAL_BATCH, total)], seed)


@pytest.mark.parametrize("samples", [1, 5, 10])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_run_goes_on_where_its_samples_divide_by_no_world_size(index: ShardIndex, samples: int, world: int) -> None:
    config = StreamConfig(index.url, 4)
    straight = [row for step in run(index, config, [Segment(1, 12, 2)]) for row in step]
    state = {"cursors": [sum(k % 4 == lane for k in range(samples)) for lane in range(4)], "samples": samples}
    read = []
    for rank in range(world):
        with closing(TrainStream(index, config, "volume", 2, rank, world, 7, state=state)) as stream:
            read += rows(next(stream))
    assert sorted(read) == sorted(straight[samples : samples + 2 * world])


@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
def test_each_epoch_of_the_lanes_holds_each_sample_exactly_once(index: ShardIndex, lanes: int) -> None:
    read = [row for step in run(index, StreamConfig(index.url, lanes), [Segment(2, 3, 25)]) for row in step]
    by_lane: list[list[str]] = [[] for _ in range(lanes)]
    for k, (key, _, lane, position, *_) in enumerate(read):
        assert lane == k % lanes
        by_lane[lane].append(key)
        assert position == len(by_lane[lane])
    where = {sample.key: shard for shard, entry in enumerate(index.shards("train")) for sample in entry.samples}
    taken = [0] * lanes
    for epoch in range(2):
        keys: list[str] = []
        for lane in range(lanes):
            owned = LaneOrder(COUNTS, lanes, 7).shards(epoch, lane)
            n = sum(COUNTS[s] for s in owned)
            keys += by_lane[lane][taken[lane] : taken[lane] + n]
            assert {where[key] for key in keys[len(keys) - n :]} == set(owned)
            taken[lane] += n
        assert Counter(keys) == Counter(list(where))
    first, second = (read[i * sum(COUNTS) : (i + 1) * sum(COUNTS)] for i in range(2))
    assert [r[0] for r in first] != [r[0] for r in second]  # another order each epoch
    assert len({r[1] for r in read}) == len(read)  # and other draws for each visit of a sample


def test_any_number_of_threads_reads_the_same_and_reports_in_one_line(index: ShardIndex, tmp_path: Path) -> None:
    straight = run(index, StreamConfig(index.url, 4, workers=1), [Segment(1, GLOBAL_BATCH, 6)])
    shutil.copytree(index.url, tmp_path / "copy")
    copy = load_index(str(tmp_path / "copy"))
    for workers in (2, 5, 16):
        state = {"cursors": [3, 3, 3, 3], "samples": 12}
        config = StreamConfig(copy.url, 4, workers=workers, prefetch=1)
        with closing(TrainStream(copy, config, "volume", 4, 0, 1, 7, state=state)) as stream:
            read = [row for _ in range(15) for row in rows(next(stream))]
        assert read == [row for step in straight[1:] for row in step]
    os.unlink(tmp_path / "copy" / "train-00004.tar")
    with (
        closing(TrainStream(copy, config, "volume", 4, 0, 1, 7)) as stream,
        pytest.raises(G3nError, match=r"train-00004.tar' .* cannot be read \(No such file or directory\)") as error,
    ):
        list(itertools.islice(stream, 50))
    assert "\n" not in str(error.value)


def test_the_order_of_a_seed_never_changes(index: ShardIndex) -> None:
    # Written down once: an order that changed between versions would make old checkpoints resume into other data.
    order = LaneOrder(COUNTS, 2, seed=7)
    places = [tuple(order.locate(lane, position)) for lane in (0, 1) for position in (0, 5, 40)]
    assert places == [(0, 1, 0), (0, 0, 2), (5, 4, 0), (0, 4, 2), (0, 3, 1), (4, 4, 1)]
    first = run(index, StreamConfig(index.url, 2), [Segment(1, 12, 1)])[0]
    assert [row[1] for row in first[:2]] == [8109574183034730389, 4678425047320551470]


def test_a_damaged_sample_is_replaced_alike_at_any_world_size(index: ShardIndex, tmp_path: Path) -> None:
    shutil.copytree(index.url, tmp_path / "damaged")
    broken = load_index(str(tmp_path / "damaged"))
    shards.flip(broken, "train", 4, 2)
    key = broken.shards("train")[4].samples[2].key
    config = StreamConfig(broken.url, 3, max_damaged_share=1.0)
    one = run(broken, config, [Segment(1, 12, 4)])
    for parts in ([Segment(4, 3, 4)], [Segment(2, 3, 1), Segment(3, 2, 3)]):
        assert run(broken, config, parts) == one
    intact = run(index, StreamConfig(index.url, 3), [Segment(1, 12, 4)])
    pairs = [(a, b) for old, new in zip(intact, one, strict=True) for a, b in zip(old, new, strict=True)]
    changed = [(a, b) for a, b in pairs if a != b]
    assert {a[0] for a, _ in changed} == {key}
    assert len(changed) == sum(a[0] == key for a, _ in pairs) > 1
    assert all(a[1:4] == b[1:4] and b[0] != key for a, b in changed)  # the same turn, with the same draws


def test_a_lost_lane_goes_on_with_the_shards_of_its_next_epochs(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (3, 3, 3))
    for sample in range(3):
        shards.flip(index, "train", 1, sample)
    config = StreamConfig(index.url, 3, max_damaged_share=1.0)
    keys = {row[0] for step in run(index, config, [Segment(1, 12, 3)]) for row in step}
    assert keys == {s.key for shard in (0, 2) for s in index.shards("train")[shard].samples}


def test_damage_is_named_and_counted_and_too_much_of_it_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = shards.volumes(tmp_path, (30, 30))
    name = shards.flip(index, "train", 0, 11)
    with closing(TrainStream(index, StreamConfig(index.url, 2), "volume", 60, 0, 1, 0)) as stream:
        assert len(next(stream)) == 60
        assert name in caplog.text
        assert stream.damaged >= 1
        with pytest.raises(
            G3nError, match=r"^2 of \d+ samples are damaged, more than data.max_damaged_share 0.01"
        ) as e:
            list(itertools.islice(stream, 5))
        assert name in str(e.value)
        with pytest.raises(G3nError):  # it stays stopped
            next(stream)
    strict = StreamConfig(index.url, 2, max_damaged_share=0)
    with closing(TrainStream(index, strict, "volume", 60, 0, 1, 0)) as stream, pytest.raises(G3nError, match="1 of"):
        next(stream)


def test_a_closed_stream_ends_and_its_threads_too(index: ShardIndex) -> None:
    before = {thread.name for thread in threading.enumerate()}
    stream = TrainStream(index, StreamConfig(index.url, 2), "volume", 2, 0, 1, 0)
    assert len(next(stream)) == 2
    stream.close()
    stream.close()
    assert list(stream) == []
    deadline = time.monotonic() + 5  # idle readers have been told, and need a moment
    while left := {thread.name for thread in threading.enumerate()} - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_a_process_that_forgets_to_close_ends_all_the_same(index: ShardIndex, tmp_path: Path) -> None:
    script = tmp_path / "forgets.py"
    script.write_text(
        "from g3n.stream.index import load_index\n"
        "from g3n.stream.lanes import StreamConfig, TrainStream\n"
        "if __name__ == '__main__':\n"
        f"    index = load_index({index.url!r})\n"
        "    stream = TrainStream(index, StreamConfig(index.url, 2, workers=4), 'volume', 2, 0, 1, 0)\n"
        "    print(len(next(stream)))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr


def test_what_cannot_be_read_is_refused_at_once(index: ShardIndex, tmp_path: Path) -> None:
    def start(index: ShardIndex, kind: str, lanes: int = 2, **more: object) -> TrainStream:
        return TrainStream(index, StreamConfig(index.url, lanes), kind, 2, 0, 1, 0, **more)  # type: ignore[arg-type]

    with pytest.raises(G3nError, match="hold volumes, expected latents"):
        start(index, "latent")
    with pytest.raises(G3nError, match=r"data.lanes is 7, but there are 6 training shards"):
        start(index, "volume", lanes=7)
    with pytest.raises(G3nError, match=r"the checkpoint has 3 lanes, data.lanes is 2"):
        start(index, "volume", state={"cursors": [0, 0, 0], "samples": 0})
    with pytest.raises(G3nError, match="no split 'holdout'; known: train, val"):
        start(index, "volume", split="holdout")
    alone = shards.write(tmp_path, "latent", train=[[shards.latent_sample(i, 1)] for i in range(2)])
    with pytest.raises(G3nError, match="no usable sample"):
        start(alone, "pair")
    for wrong in ({"lanes": 0}, {"workers": 0}, {"prefetch": 0}, {"max_damaged_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StreamConfig("x", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 1), (1, 3), (2, 2), (4, 3)])
def test_evaluation_reads_each_sample_once_and_pads_every_rank_alike(
    index: ShardIndex, world: int, micro_batch: int
) -> None:
    config = StreamConfig(index.url, 6)
    ranks = [list(eval_batches(index, config, "volume", "val", micro_batch, r, world, 3)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-7 // (world * micro_batch))
    found = {}
    for batch in (b for batches in ranks for b in batches):
        assert len(batch) == micro_batch
        for key, seed, weight in zip(batch.keys, batch.seeds.tolist(), batch.weights.tolist(), strict=True):
            assert weight in (0.0, 1.0)
            if weight:
                assert key not in found
                found[key] = seed
    one = {b.keys[0]: int(b.seeds[0]) for b in eval_batches(index, None, "volume", "val", 1, 0, 1, 3)}
    assert found == one  # the same samples with the same draws at any world size
    assert set(one) == {s.key for shard in index.shards("val") for s in shard.samples}
    other = {b.keys[0]: int(b.seeds[0]) for b in eval_batches(index, None, "volume", "val", 1, 0, 1, 4)}
    assert not set(one.values()) & set(other.values())


def test_the_start_of_an_evaluation_is_a_fair_sample(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (40, 40, 40, 40))
    first = [next(eval_batches(index, None, "volume", "train", 40, 0, 1, seed)) for seed in range(4)]
    shard_of = {s.key: i for i, shard in enumerate(index.shards("train")) for s in shard.samples}
    for batch in first:
        counts = np.bincount([shard_of[k] for k in batch.keys], minlength=4)
        assert ((counts - 10) ** 2 / 10).sum() < 16.3  # chi square, 3 degrees of freedom, p = 0.001
    assert len({tuple(b.keys) for b in first}) == 4


def test_a_damaged_sample_has_no_weight_in_an_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = shards.volumes(tmp_path, (1,), val=(5, 5))
    name = shards.flip(index, "val", 1, 2)
    config = StreamConfig(index.url, max_damaged_share=0.1)
    batches = list(eval_batches(index, config, "volume", "val", 4, 0, 1, 0))
    assert [len(b) for b in batches] == [4, 4, 4]
    weighted = [k for b in batches for k, w in zip(b.keys, b.weights.tolist(), strict=True) if w]
    assert len(weighted) == len(set(weighted)) == 9
    assert caplog.text.count(name) == 1
    assert torch.isfinite(torch.cat([b.tensors["rstd"] for b in batches])).all()
    with pytest.raises(G3nError, match="1 of 10 samples to evaluate are damaged"):
        list(eval_batches(index, None, "volume", "val", 4, 0, 1, 0))
    for shard in (0, 1):
        for sample in range(5):
            shards.flip(index, "val", shard, sample)
    shards.flip(index, "val", 1, 2)
    with pytest.raises(G3nError, match="samples to evaluate are damaged"):
        list(eval_batches(index, StreamConfig(index.url, max_damaged_share=1.0), "volume", "val", 4, 0, 1, 0))
