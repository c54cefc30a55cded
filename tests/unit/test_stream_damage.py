"""Every kind of damage a shard folder can have: named with shard, key and byte, counted, passed over, and at last a clean stop."""

from __future__ import annotations

import json
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.shards import PackedSample, write_index, write_split
from data_prep.verify import verify_all
from g3n.config import G3nError
from g3n.stream.decode import Damage, read_latent_sample, read_volume_sample
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream
from tests import shards


def keys_of(index: ShardIndex, *numbers: int) -> set[str]:
    return {sample.key for n in numbers for sample in index.shards("train")[n].samples}


def cut(place: Callable[[int, int], int]) -> Callable[[ShardIndex], set[str]]:
    """Cut the second of three shards at its second sample's array; what is lost."""

    def damage(index: ShardIndex) -> set[str]:
        shard = index.shards("train")[1]
        os.truncate(shard.url, place(*shard.samples[1].members["npy.zst"]))
        return {sample.key for sample in shard.samples[1:]}

    return damage


def missing(index: ShardIndex) -> set[str]:
    os.unlink(index.shards("train")[1].url)
    return keys_of(index, 1)


def truncated_to_nothing(index: ShardIndex) -> set[str]:
    os.truncate(index.shards("train")[1].url, 0)
    return keys_of(index, 1)


def flipped(index: ShardIndex) -> set[str]:
    shards.flip(index, "train", 1, 1)
    return {index.shards("train")[1].samples[1].key}


def flipped_json(index: ShardIndex) -> set[str]:
    sample = index.shards("train")[1].samples[1]
    path = Path(index.shards("train")[1].url)
    content = bytearray(path.read_bytes())
    content[sample.members["json"][0] + 20] ^= 1
    path.write_bytes(content)
    return {sample.key}


def a_folder_in_its_place(index: ShardIndex) -> set[str]:
    missing(index)
    os.mkdir(index.shards("train")[1].url)
    return keys_of(index, 1)


DAMAGES = {
    "cut at a member boundary": cut(lambda offset, size: offset - tarfile.BLOCKSIZE),
    "cut in a header": cut(lambda offset, size: offset - 200),
    "cut after a header": cut(lambda offset, size: offset),
    "cut in a payload": cut(lambda offset, size: offset + size // 2),
    "cut in the JSON's header": cut(lambda offset, size: offset + size + (-size) % tarfile.BLOCKSIZE + 100),
    "cut to nothing": truncated_to_nothing,
    "a flipped byte in the array": flipped,
    "a flipped byte in the JSON": flipped_json,
    "a missing shard": missing,
    "a folder in the place of a shard": a_folder_in_its_place,
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_counted_and_passed_over_and_then_a_clean_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    index = shards.volumes(tmp_path, (4, 4, 4))
    lost = DAMAGES[case](index)
    with closing(TrainStream(index, StreamConfig(index.url, 3, max_damaged_share=1.0), "volume", 6, 0, 1, 0)) as stream:
        read = [key for _ in range(8) for key in next(stream).keys]
        assert stream.damaged > 0
    assert len(caplog.messages) == len(set(caplog.messages))  # each one once
    assert set(read) == keys_of(index, 0, 1, 2) - lost  # all of the others, and none of these
    shard = index.shards("train")[1]
    named = {
        sample.key
        for sample in shard.samples
        if f"shard '{shard.url}' sample '{sample.key}' at byte {sample.members['npy.zst'][0]}: " in caplog.text
    }
    assert named
    assert named <= lost
    with closing(TrainStream(index, StreamConfig(index.url, 3, max_damaged_share=0.0), "volume", 6, 0, 1, 0)) as stream:
        with pytest.raises(
            G3nError, match=r"^\d+ of \d+ samples are damaged, more than data.max_damaged_share 0 "
        ) as error:
            [next(stream) for _ in range(8)]
        assert shard.url in str(error.value)
        assert "\n" not in str(error.value)
    problems = verify_all(index.url, 1).problems
    assert problems
    assert all(shard.name in line for line in problems)


def test_a_lost_folder_stops_at_once_and_does_not_try_everything(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (200, 200))
    for shard in index.shards("train"):
        os.unlink(shard.url)
    with (
        closing(TrainStream(index, StreamConfig(index.url, 2), "volume", 2, 0, 1, 0)) as stream,
        pytest.raises(G3nError, match="damaged"),
    ):
        next(stream)
    assert stream.damaged <= 100


def epochs(index: ShardIndex, world: int, lanes: int, samples: int) -> list[str]:
    streams = [TrainStream(index, StreamConfig(index.url, lanes), "volume", 1, r, world, 0) for r in range(world)]
    keys = [next(streams[k % world]).keys[0] for k in range(samples)]
    for stream in streams:
        stream.close()
    return keys


@pytest.mark.parametrize(("counts", "world"), [((5, 2, 4), 2), ((9,), 4), ((1, 7), 3)])
def test_few_and_uneven_shards_on_more_ranks_give_everyone_each_sample_and_the_same_number_of_steps(
    tmp_path: Path, counts: Sequence[int], world: int
) -> None:
    index = shards.volumes(tmp_path, counts)
    one_lane = epochs(index, world, 1, 2 * sum(counts))
    for epoch in (one_lane[: sum(counts)], one_lane[sum(counts) :]):
        assert Counter(epoch) == Counter(keys_of(index, *range(len(counts))))
    lanes = len(counts)
    assert epochs(index, world, lanes, 30) == epochs(index, 1, lanes, 30)


def test_too_few_shards_for_the_lanes_is_one_line(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (9,))
    with pytest.raises(G3nError, match=r"data.lanes is 4, but there are 1 training shards") as error:
        TrainStream(index, StreamConfig(index.url, 4), "volume", 1, 0, 4, 0)
    assert "\n" not in str(error.value)


def test_an_empty_shard_is_passed_over(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (3, 0, 2))
    with tarfile.open(index.shards("train")[1].url) as empty:
        assert empty.getnames() == []
    for lanes in (1, 2, 3):
        assert set(epochs(index, 2, lanes, 20)) == keys_of(index, 0, 2)
    one = epochs(index, 2, 1, 5)
    assert Counter(one) == Counter(keys_of(index, 0, 2))
    assert verify_all(index.url, 1).problems == ()
    nothing = shards.volumes(tmp_path / "nothing", (0, 0))
    with pytest.raises(G3nError, match="no usable sample"):
        TrainStream(nothing, StreamConfig(nothing.url, 1), "volume", 1, 0, 1, 0)


def test_samples_in_any_order_are_found_by_their_offsets_and_duplicates_are_refused(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (6,))
    voxels = {
        s.key: read_volume_sample(index, index.shards("train")[0], s).voxels for s in index.shards("train")[0].samples
    }
    tree = json.loads((tmp_path / "index.json").read_text())
    entries = tree["splits"]["train"][0]["samples"]
    random.Random(0).shuffle(entries)
    (tmp_path / "index.json").write_text(json.dumps(tree))
    found = load_index(index.url)
    assert [s.key for s in found.shards("train")[0].samples] != list(voxels)
    for sample in found.shards("train")[0].samples:
        assert np.array_equal(read_volume_sample(found, found.shards("train")[0], sample).voxels, voxels[sample.key])
    entries[0]["key"] = entries[1]["key"]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    with pytest.raises(G3nError, match="a sample key is there twice"):
        load_index(index.url)
    # two samples whose places were exchanged: each has the other's checksum
    entries[0]["key"] = "sub-0_ses-01_T1"
    entries[0]["members"], entries[1]["members"] = entries[1]["members"], entries[0]["members"]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    wrong = load_index(index.url)
    for sample in wrong.shards("train")[0].samples[:2]:
        with pytest.raises(Damage, match="checksum"):
            read_volume_sample(wrong, wrong.shards("train")[0], sample)


LARGE = (80, 96, 80)  # above the size that is always looked at


def volume(shape: tuple[int, int, int], voxels: np.ndarray) -> PackedSample:
    """A sample whose JSON claims a mean and a deviation whatever its voxels are."""
    sample = shards.volume_sample(0, voxels.astype(np.int16))
    return replace(sample, meta={**sample.meta, "shape": list(shape), "brain_mean": 500.0, "brain_std": 90.0})


def ball(shape: tuple[int, int, int]) -> np.ndarray:
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return sum(a**2 for a in axes) < 0.7


@pytest.mark.parametrize("shape", [shards.SHAPE, LARGE])
@pytest.mark.parametrize(("value", "reason"), [(0, r"the volume is empty \(all zero\)"), (7, r"constant \(7 in every")])
def test_an_empty_or_constant_volume_is_damage(
    tmp_path: Path, shape: tuple[int, int, int], value: int, reason: str
) -> None:
    noise = np.random.default_rng(0).integers(1, 1000, shape)
    samples = [volume(shape, value * ball(shape)), replace(volume(shape, noise * ball(shape)), key="sub-1_ses-01_T1")]
    entries = {"train": write_split(tmp_path, "train", [samples])}
    header = {"kind": "volume", "recipe": {}, "grid": {"shape": list(shape), "affine": shards.AFFINE}, "variables": {}}
    write_index(tmp_path, header, entries)
    index = load_index(str(tmp_path))
    shard = index.shards("train")[0]
    with pytest.raises(Damage, match=rf"shard '{shard.url}' sample '{samples[0].key}' at byte 512: .*{reason}"):
        read_volume_sample(index, shard, shard.samples[0])
    assert read_volume_sample(index, shard, shard.samples[1]).voxels.max() > 900


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_latent_that_is_not_finite_is_damage(tmp_path: Path, value: float) -> None:
    good = shards.latent_sample(0, 3)
    tokens = good.array.copy()
    tokens[1, 2, 1] = value
    index = shards.write(tmp_path, "latent", train=[[replace(good, array=tokens), shards.latent_sample(1, 2)]])
    shard = index.shards("train")[0]
    with pytest.raises(Damage, match=rf"sample '{good.key}' at byte 512: visit 2 has latents that are not finite"):
        read_latent_sample(index, shard, shard.samples[0])
    assert np.isfinite(read_latent_sample(index, shard, shard.samples[1]).tokens).all()
    config = StreamConfig(index.url, 1, max_damaged_share=1.0)
    with closing(TrainStream(index, config, "latent", 8, 0, 1, 0)) as stream:
        assert {key.split("_visit")[0] for key in next(stream).keys} == {shards.latent_sample(1, 2).key}
        assert stream.damaged > 0
