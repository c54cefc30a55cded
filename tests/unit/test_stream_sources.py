"""Several shard folders in one run, by weight, and the samples that a filter asks for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.shards import PackedSample
from g3n.config import G3nError
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream, eval_batches
from g3n.stream.order import LaneOrder, MixedOrder, share_lanes
from g3n.stream.sources import merge, open_shards
from g3n.tasks.base import volume_artifact
from g3n.tasks.dit import mixed_statistics
from g3n.train import load_config
from tests import shards
from tests.launch import ROOT


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[ShardIndex]:
    """A large source, a smaller one, and one of a single shard."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        shards.volumes(folder / "large", (5, 4, 6, 5, 4, 6, 5, 5), val=(3,)),
        shards.volumes(folder / "small", (3, 2, 4, 3), val=(2,), first=100),
        shards.volumes(folder / "tiny", (7,), first=200),
    ]


def source_of(key: str) -> str:
    number = int(key[4:20], 16)
    return "large" if number < 100 else "small" if number < 200 else "tiny"


def read(index: ShardIndex, lanes: int, batches: int, world: int = 1, global_batch: int = 12) -> list[list[str]]:
    """The keys of each global batch; sample k of the run comes first by k."""
    streams = [
        TrainStream(index, StreamConfig("mix", lanes), "volume", global_batch // world, rank, world, 3)
        for rank in range(world)
    ]
    taken = []
    for _ in range(batches):
        ranks = [next(stream).keys for stream in streams]
        taken.append([key for turn in zip(*ranks, strict=True) for key in turn])
    for stream in streams:
        stream.close()
    return taken


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_global_batch_has_each_source_by_its_weight_at_any_world_size(
    three: list[ShardIndex], world: int
) -> None:
    index = merge(list(zip(three, (3.0, 2.0, 1.0), strict=True)))
    batches = read(index, 12, 8, world)
    for keys in batches:
        assert Counter(map(source_of, keys)) == {"large": 6, "small": 4, "tiny": 2}
    assert batches == read(index, 12, 8)
    other = merge(list(zip(three[::-1], (2.0, 4.0, 6.0), strict=True)))  # the same shares, named in another order
    assert (other.fingerprint, read(other, 12, 8)) == (index.fingerprint, batches)


def test_each_source_is_read_evenly_and_one_with_fewer_shards_than_lanes_splits_them(three: list[ShardIndex]) -> None:
    index = merge(list(zip(three, (1.0, 1.0, 2.0), strict=True)))
    keys = [key for batch in read(index, 8, 28, global_batch=8) for key in batch]
    tiny = [key for key in keys if source_of(key) == "tiny"]
    assert len(tiny) == 28 * 4  # four lanes share the seven samples of one shard: sixteen epochs
    counts = Counter(tiny)
    assert len(counts) == 7
    assert max(counts.values()) - min(counts.values()) <= 4
    large = Counter(key for key in keys if source_of(key) == "large")
    assert len(large) == 40  # 56 turns: everyone was read once before anyone a third time
    assert max(large.values()) <= 3


@given(n=st.integers(1, 9), lanes=st.integers(1, 12), epochs=st.integers(1, 3), seed=st.integers(0, 1000))
def test_lanes_that_split_a_shard_hold_each_sample_once_an_epoch(n: int, lanes: int, epochs: int, seed: int) -> None:
    parts = [list(range(n))[part::lanes] for part in range(lanes)]
    order = MixedOrder([[len(part) for part in parts]], [0] * lanes, [seed])
    alone = LaneOrder([len(part) for part in parts], lanes, seed)
    for epoch in range(epochs):
        found: list[int] = []
        for lane in range(lanes):
            own = alone.shards(epoch, lane)
            start = sum(len(parts[s]) for e in range(epoch) for s in alone.shards(e, lane))
            for position in range(start, start + sum(len(parts[s]) for s in own)):
                place = order.locate(lane, position)
                assert place.epoch == epoch
                found.append(parts[place.shard][place.sample])
        assert sorted(found) == list(range(n))


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    lanes=st.integers(1, 64),
)
def test_lanes_follow_the_weights_within_one_and_are_spread(weights: list[float], lanes: int) -> None:
    given_ = share_lanes(weights, lanes)
    assert len(given_) == lanes
    for i, weight in enumerate(weights):
        exact = weight / sum(weights) * lanes
        assert abs(given_.count(i) - exact) < 1 + 1e-9
        half = given_[: lanes // 2].count(i)
        assert abs(half - given_.count(i) / 2) <= 1.5


def test_one_source_alone_is_read_as_ever(three: list[ShardIndex]) -> None:
    index = open_shards(StreamConfig(three[0].url, 4))
    assert index.fingerprint == three[0].fingerprint
    assert read(index, 4, 6) == read(three[0], 4, 6)
    assert read(open_shards(StreamConfig({three[0].url: 3.0}, 4)), 4, 6) == read(three[0], 4, 6)


def test_validation_is_the_union_and_variables_and_fingerprint_are_of_all(three: list[ShardIndex]) -> None:
    index = merge([(three[0], 1.0), (three[1], 1.0)])
    keys = [k for b in eval_batches(index, None, "volume", "val", 5, 0, 1, 0) for k in b.keys]
    assert sorted(keys) == sorted(s.key for i in three[:2] for shard in i.shards("val") for s in shard.samples)
    wider = replace(three[1], variables={"modality": ["FLAIR", "T1"], "age_years": [-5, 20], "sex": ["F"]})
    united = merge([(three[0], 1.0), (wider, 1.0)])
    assert set(united.variables.pop("modality")) == {"FLAIR", "T1"}  # type: ignore[attr-defined]
    assert united.variables == {"age_years": [-5, 100], "sex": ["F"]}
    prints = {index.fingerprint, merge([(three[0], 1.0), (three[1], 2.0)]).fingerprint, three[0].fingerprint}
    assert len(prints | {merge([(three[0], 1.0), (three[2], 1.0)]).fingerprint}) == 4
    # what a tokenizer of this mix tells encode, which takes one folder at a time
    assert sorted(volume_artifact(index)["parts"]) == sorted(i.fingerprint for i in three[:2])
    assert "parts" not in volume_artifact(three[0])


def test_what_does_not_fit_together_is_named(three: list[ShardIndex], tmp_path: Path) -> None:
    def mix(other: ShardIndex) -> ShardIndex:
        return merge([(three[0], 1.0), (other, 1.0)])

    latents = shards.write(tmp_path / "latents", "latent", train=[[shards.latent_sample(7, 1)]])
    with pytest.raises(G3nError, match=r"cannot be mixed: their kind is (latent and volume|volume and latent)"):
        mix(latents)
    grid = {**three[1].raw["grid"], "shape": [4, 6, 9]}
    with pytest.raises(G3nError, match=r"cannot be mixed: their grid is .*\[4, 6, 9\]"):
        mix(replace(three[1], raw={**three[1].raw, "grid": grid}))
    with pytest.raises(G3nError, match=r"sample 'sub-0{16}_ses-01_T1' is in '.*' and in '.*'"):
        mix(shards.volumes(tmp_path / "again", (1,)))
    leak = shards.volumes(tmp_path / "leak", (3,), val=(2,), first=39)  # 40 to 42 are held out there
    renamed = {
        split: tuple(replace(s, samples=tuple(replace(x, key=x.key + "x") for x in s.samples)) for s in entries)
        for split, entries in leak.splits.items()
    }
    with pytest.raises(G3nError, match=r"subject 0{14}28 is in split '\w+' of '.*' and '\w+' of '.*'"):
        mix(replace(leak, splits=renamed))


def test_a_weight_too_small_for_a_lane_is_refused_and_coarse_shares_are_said(
    three: list[ShardIndex], caplog: pytest.LogCaptureFixture
) -> None:
    a, b = three[0].url, three[1].url
    with pytest.raises(
        G3nError, match=r"small' have 1\.00% of the weight, too little for one of 8 lanes; raise data.lanes to 100"
    ):
        open_shards(StreamConfig({a: 99.0, b: 1.0}))
    assert open_shards(StreamConfig({a: 99.0, b: 1.0}, lanes=100)).sources
    caplog.set_level(logging.INFO)
    caplog.clear()
    open_shards(StreamConfig({a: 1.0, b: 2.0}, lanes=4))  # 1/4 and 3/4 instead of 1/3 and 2/3
    [line] = [r for r in caplog.records if r.name == "g3n.stream.sources"]
    assert line.levelno == logging.WARNING
    assert f"'{a}' 25.0%" in line.getMessage()
    assert f"'{b}' 75.0%" in line.getMessage()
    for wrong in ({}, {a: 0.0}, {a: -1.0}, {a: float("inf")}):
        with pytest.raises(ValueError, match="weight above 0"):
            StreamConfig(wrong)


def test_a_config_names_weights_and_filters(three: list[ShardIndex], tmp_path: Path) -> None:
    text = (ROOT / "configs/tiny/mae.yaml").read_text()
    file = tmp_path / "mix.yaml"
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("shards:"))
    indent = " " * (len(lines[at]) - len(lines[at].lstrip()))
    lines[at] = f"{indent}shards: {{'{three[0].url}': 2, '{three[1].url}': 1}}"
    file.write_text("\n".join(lines))
    config = load_config(file, ["data.where.age_years=[10, 120]", "data.where.modality=[T1]", "data.lanes=6"])
    assert config.data.shards == {three[0].url: 2.0, three[1].url: 1.0}
    assert config.data.where == {"age_years": (10, 120), "modality": ("T1",)}
    index = open_shards(config.data)
    assert Counter(map(source_of, read(index, 6, 1)[0])) == {"large": 8, "small": 4}
    assert min(int(s.key[4:20], 16) for shard in index.shards("train") for s in shard.samples) == 10


def person(number: int, **variables: Any) -> PackedSample:
    sample = shards.volume_sample(number)
    variables = {"modality": "T1", "age_years": float(number), **variables}
    key = sample.key.replace("_T1", f"_{variables['modality']}")
    meta = {**sample.meta, "variables": variables}
    return replace(sample, key=key, modality=variables["modality"], meta=meta)


@pytest.fixture(scope="module")
def mixed_people(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("people")
    people = [
        person(0, modality="T1", cohort="adni"),
        person(1, modality="T2", cohort="adni"),
        person(2, modality="T1", cohort="ixi"),
        person(3, modality="T1", cohort=None),
        person(4, modality="T1", cohort="ixi", age_years=None),
        person(5, modality="FLAIR", cohort="oasis"),
    ]
    index = shards.write(folder, "volume", train=[people[:3], people[3:5]], val=[people[5:], [person(6, cohort="ixi")]])
    tree = json.loads((folder / "index.json").read_text())
    tree["variables"] = {"modality": ["T1", "T2", "FLAIR"], "age_years": [0, 6], "cohort": ["adni", "ixi", "oasis"]}
    (folder / "index.json").write_text(json.dumps(tree))
    return load_index(index.url)


@pytest.mark.parametrize(
    ("where", "train", "val"),
    [
        ({"modality": ("T1",)}, [0, 2, 3, 4], [6]),
        ({"modality": ("T2", "T1"), "cohort": ("adni",)}, [0, 1], []),
        ({"cohort": ("adni", "ixi")}, [0, 1, 2, 4], [6]),  # a missing one does not match
        ({"age_years": (1, 3)}, [1, 2, 3], []),  # nor does a missing number
        ({"age_years": (2, 6), "modality": ("T1",), "cohort": ("ixi",)}, [2], [6]),
    ],
)
def test_a_filter_takes_what_matches_of_every_split(
    mixed_people: ShardIndex, where: dict[str, tuple[Any, ...]], train: list[int], val: list[int]
) -> None:
    index = open_shards(StreamConfig(mixed_people.url, 2, where=where))
    for split, numbers in (("train", train), ("val", val)):
        keys = [s.key for shard in index.shards(split) for s in shard.samples]
        assert [int(key[4:20], 16) for key in keys] == numbers
    assert {int(k[4:20], 16) for k in read(index, 2, 3)[2]} == set(train)
    found = {int(k[4:20], 16) for b in eval_batches(index, None, "volume", "val", 2, 0, 1, 0) for k in b.keys}
    assert found == set(val)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ({"modalty": ("T1",)}, "asks for 'modalty', no variable of .*; did you mean 'modality'"),
        ({"modality": ("T1w",)}, "data.where.modality asks for 'T1w'; did you mean 'T1'"),
        ({"cohort": ("hcp",)}, "data.where.cohort asks for 'hcp'; known: adni, ixi, oasis"),
        ({"age_years": (60,)}, r"age_years is \[60\]; expected \[low, high\]"),
        ({"age_years": (90, 60)}, r"expected \[low, high\]"),
        ({"age_years": ("old", "older")}, r"expected \[low, high\]"),
        ({"age_years": (True, 60)}, r"expected \[low, high\]"),
        ({"age_years": (float("nan"), 60)}, r"expected \[low, high\]"),
        ({"modality": ()}, "leaves no training sample"),
        ({"cohort": ("oasis",)}, "leaves no training sample of '.*people.*'; ask for less"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_refused(
    mixed_people: ShardIndex, where: dict[str, tuple[Any, ...]], reason: str
) -> None:
    with pytest.raises(G3nError, match=reason):
        open_shards(StreamConfig(mixed_people.url, 2, where=where))


def test_a_latent_matches_where_all_of_its_visits_do(tmp_path: Path) -> None:
    index = shards.write(tmp_path, "latent", train=[[shards.latent_sample(i, i + 1) for i in range(4)]])
    found = open_shards(StreamConfig(index.url, 1, where={"age_years": (50, 51)}))  # visits are at 50, 51, 52, 53
    assert [s.visits for shard in found.shards("train") for s in shard.samples] == [1, 2]


def test_an_older_index_can_be_asked_for_its_modality_alone(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (3,))
    tree = json.loads((tmp_path / "index.json").read_text())
    for sample in tree["splits"]["train"][0]["samples"]:
        del sample["variables"]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    assert len(open_shards(StreamConfig(index.url, 1, where={"modality": ("T1",)})).shards("train")[0].samples) == 3
    with pytest.raises(G3nError, match=r"has no variables of samples, so data.where can ask for modality alone; pack"):
        open_shards(StreamConfig(index.url, 1, where={"age_years": (0, 2)}))


def test_mixed_latents_have_the_statistics_of_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(60, 5, 3, generator=generator) * s + m for s, m in ((1.0, 0.0), (3.0, 4.0))]

    def statistics(x_VNC: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": x_VNC.mean(0), "scale": x_VNC.var(0, unbiased=False).mean(0).sqrt()}

    found = mixed_statistics([(statistics(parts[0]), 2 / 3), (statistics(parts[1]), 1 / 3)])
    want = statistics(torch.cat([parts[0], parts[0], parts[1]]))
    torch.testing.assert_close(found["mean"], want["mean"])
    torch.testing.assert_close(found["scale"], want["scale"])
    alone = statistics(parts[0])
    same = mixed_statistics([(alone, 1.0)])
    assert all(torch.equal(same[name], alone[name]) for name in alone)


def shares(keys: Sequence[str]) -> Counter[str]:
    return Counter(map(source_of, keys))


def test_a_mix_goes_on_where_it_stopped(three: list[ShardIndex]) -> None:
    index = merge(list(zip(three, (1.0, 1.0, 1.0), strict=True)))
    straight = [key for batch in read(index, 6, 6, global_batch=6) for key in batch]
    state = {"cursors": [3] * 6, "samples": 18}
    with closing(TrainStream(index, StreamConfig("mix", 6), "volume", 6, 0, 1, 3, state=state)) as stream:
        resumed = [key for _ in range(3) for key in next(stream).keys]
    assert resumed == straight[18:]
    assert shares(resumed) == {"large": 6, "small": 6, "tiny": 6}
