"""From shards to arrays: exact numbers, damage that is named, remote shards through a cache."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard

from data_prep.shards import EncodedSample, encode_sample, write_index, write_shard
from g3n.config import G3nError
from g3n.latent import normalize
from g3n.stream import cursors
from g3n.stream.decode import Damage, decode_array, read_latent_sample, read_volume_sample
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import eval_batches
from g3n.stream.order import keyed_hash
from tests import shards

INT16 = np.dtype("<i2")


def npy(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), **options)
    return buffer.getvalue()


def test_a_volume_comes_back_bit_for_bit_and_normalizes_to_mean_0_and_deviation_1(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (3,))
    shard = index.shards("train")[0]
    for number, sample in enumerate(shard.samples):
        volume = read_volume_sample(index, shard, sample)
        assert volume.voxels.dtype == INT16
        assert np.array_equal(volume.voxels, shards.volume_sample(number).array)
        assert (volume.scale, volume.days_from_baseline) == (0.5, 0)
        assert volume.variables == {"modality": "T1", "age_years": float(number)}
    batch = next(eval_batches(index, None, "volume", "train", 3, 0, 1, 0))
    z = normalize(*(batch.tensors[k] for k in ("volume", "mean", "rstd"))).flatten(1)
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(dim=1, unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


def crafted(folder: Path, payload: bytes | None = None, **meta: Any) -> tuple[ShardIndex, str]:
    """A folder with one volume whose array or JSON differs from what a packer would write; and where the array begins."""
    sample = encode_sample(shards.volume_sample(0))
    text = json.dumps({**json.loads(sample.members["json"]), **meta}).encode()
    members = {"npy.zst": sample.members["npy.zst"] if payload is None else payload, "json": text}
    return crafted_folder(folder, "volume", replace(sample, members=members))


def crafted_folder(folder: Path, kind: str, sample: EncodedSample) -> tuple[ShardIndex, str]:
    folder.mkdir(exist_ok=True)
    entry = write_shard(folder, "train-00000.tar", [sample])
    header = {"kind": kind, "grid": {"shape": list(shards.SHAPE), "affine": shards.AFFINE}, "variables": {}}
    write_index(folder, header, {"train": [entry]})
    offset = entry["samples"][0]["members"]["npy.zst"][0]
    return load_index(str(folder)), f"shard '{folder}/train-00000.tar' sample '{sample.key}' at byte {offset}: "


class Bomb:
    """Unpickling it leaves a mark."""

    exploded: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("from tests.unit.test_stream import Bomb; Bomb.exploded += ('boom',)",))


def pickled() -> bytes:
    array = np.empty(shards.SHAPE, object)
    array[...] = Bomb()
    return npy(array, allow_pickle=True)


ZEROS = np.zeros(shards.SHAPE, INT16)
WRONG_ARRAYS = {
    "float32": (npy(np.zeros(shards.SHAPE, np.float32)), "array of float32, expected int16"),
    "big-endian": (npy(np.zeros(shards.SHAPE, ">i2")), "array of >i2, expected int16"),
    "pickle": (pickled(), "array of object, expected int16"),
    "pickle in the place of .npy": (b"\x80\x04" + b"x" * 200, "not a .npy header of version 1.0"),
    "another shape": (npy(np.zeros((6, 4, 8), INT16)), "array of shape (6, 4, 8), expected (4, 6, 8)"),
    "another rank": (npy(np.zeros((4, 48), INT16)), "array of shape (4, 48)"),
    "Fortran order": (npy(np.asfortranarray(ZEROS)), "Fortran order"),
    "short": (npy(ZEROS)[:-2], "382 bytes for shape (4, 6, 8)"),
    "long": (npy(ZEROS) + b"\0", "385 bytes for shape (4, 6, 8)"),
    "other voxels": (npy(ZEROS + 1), "checksum"),
    "code in the header": (npy(ZEROS).replace(b"'<i2'", b"f() #"), "not a .npy header"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_an_array_that_is_not_the_promised_one_is_damage_by_name(tmp_path: Path, case: str) -> None:
    raw, reason = WRONG_ARRAYS[case]
    index, where = crafted(tmp_path, zstandard.compress(raw))
    shard = index.shards("train")[0]
    with pytest.raises(Damage) as error:
        read_volume_sample(index, shard, shard.samples[0])
    assert str(error.value).startswith(where)
    assert reason in str(error.value)
    assert Bomb.exploded == ()


def test_the_bomb_of_these_tests_would_explode() -> None:
    np.lib.format.read_array(io.BytesIO(pickled()), allow_pickle=True)
    assert Bomb.exploded
    Bomb.exploded = ()


def test_nothing_is_allocated_for_a_frame_that_claims_too_much() -> None:
    small = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))
    assert len(small) < 10_000
    with pytest.raises(ValueError, match="zstd frame of 67108864 bytes, at most 4480 expected"):
        decode_array(small, INT16, shards.SHAPE, shards.SHAPE)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(npy(ZEROS))
    with pytest.raises(ValueError, match="zstd frame of"):
        decode_array(unsized, INT16, shards.SHAPE, shards.SHAPE)
    whole = zstandard.compress(npy(shards.volume_sample(0).array))
    for cut in (whole[:-20], whole[:3], b"", b"no zstd at all"):
        with pytest.raises((ValueError, zstandard.ZstdError)):
            decode_array(cut, INT16, shards.SHAPE, shards.SHAPE)


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"shape": [8, 6, 4]}, "JSON says shape [8, 6, 4], the index's grid is [4, 6, 8]"),
        ({"brain_std": 0.0}, "brain_std 0.0 is not positive"),
        ({"brain_mean": float("nan")}, "brain_mean is nan, expected a number"),
        ({"brain_mean": 10**400}, "int too large"),
        ({"brain_mean": "7"}, "brain_mean is '7', expected a number"),
        ({"days_from_baseline": "2020-01-01"}, "days_from_baseline is '2020-01-01'"),
        ({"variables": {"modality": ["T1"]}}, "variables must map a name to a word, a number or null"),
        ({"xxh3": 5}, "expected 5"),
    ],
)
def test_a_json_that_says_something_else_is_damage(tmp_path: Path, meta: dict[str, Any], reason: str) -> None:
    index, where = crafted(tmp_path, **meta)
    shard = index.shards("train")[0]
    with pytest.raises(Damage) as error:
        read_volume_sample(index, shard, shard.samples[0])
    assert str(error.value).startswith(where)
    assert reason in str(error.value)


def test_latents_with_another_number_of_visits_are_damage(tmp_path: Path) -> None:
    good = shards.latent_sample(0, 3)
    index = shards.write(tmp_path / "good", "latent", train=[[good]])
    shard = index.shards("train")[0]
    latents = read_latent_sample(index, shard, shard.samples[0])
    assert np.array_equal(latents.tokens, good.array)
    assert [v.days_from_baseline for v in latents.visits] == [0, 365, 730]
    cut = encode_sample(replace(good, array=good.array[:2]))
    index, _ = crafted_folder(tmp_path / "cut", "latent", cut)
    shard = index.shards("train")[0]
    with pytest.raises(Damage, match=r"array of shape \(2, 6, 3\), expected \(3, None, None\)"):
        read_latent_sample(index, shard, shard.samples[0])
    four = encode_sample(shards.latent_sample(0, 4))
    four = replace(four, members=encode_sample(good).members)
    index, _ = crafted_folder(tmp_path / "json", "latent", four)
    shard = index.shards("train")[0]
    with pytest.raises(Damage, match="JSON says 3 visits, the index 4"):
        read_latent_sample(index, shard, shard.samples[0])


def test_a_flipped_bit_never_changes_a_voxel(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (1,))
    shard = index.shards("train")[0]
    path = tmp_path / shard.name
    good = path.read_bytes()
    want = read_volume_sample(index, shard, shard.samples[0])
    offset, size = shard.samples[0].members["npy.zst"]
    rng, seen = np.random.default_rng(0), 0
    for place in [*range(offset, offset + 24), *rng.integers(offset, offset + size, 60)]:
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        try:
            found = read_volume_sample(index, shard, shard.samples[0]).voxels
        except Damage:
            seen += 1
        else:  # an unused bit of the frame's header
            assert np.array_equal(found, want.voxels)
    assert seen >= 80


def test_a_shard_that_was_cut_keeps_what_is_before_the_cut(tmp_path: Path) -> None:
    index = shards.volumes(tmp_path, (4,))
    shard = index.shards("train")[0]
    offset, size = shard.samples[2].members["npy.zst"]
    os.truncate(tmp_path / shard.name, offset + size // 2)
    for sample in shard.samples[:2]:
        read_volume_sample(index, shard, sample)
    for sample in shard.samples[2:]:
        with pytest.raises(Damage, match=r"(npy.zst|json) has \d+ of \d+ bytes, the shard is cut"):
            read_volume_sample(index, shard, sample)


def test_cursors_count_each_lane_and_refuse_what_is_not_theirs() -> None:
    state = {"cursors": [3, 2, 2], "samples": 7}
    assert [cursors.locate(state, k) for k in range(7, 14)] == [(1, 2), (2, 2), (0, 3), (1, 3), (2, 3), (0, 4), (1, 4)]
    merged = cursors.merge(state, torch.tensor([1, 2, 0, 1]), torch.tensor([3, 3, 4, 4]), 4)
    assert merged == {"cursors": [4, 4, 3], "samples": 11}
    assert cursors.check(json.loads(json.dumps(merged)), 3) == merged
    for wrong in (
        {},
        {"cursors": [1.5], "samples": 0},
        {"cursors": [-1], "samples": 0},
        {"cursors": "0", "samples": 0},
    ):
        with pytest.raises(G3nError, match=r"cursors.json must hold"):
            cursors.check(wrong, 1)


def test_keyed_hashes_keep_domains_and_words_apart() -> None:
    values = [keyed_hash("a", 1, 2), keyed_hash("a", 2, 1), keyed_hash("b", 1, 2), keyed_hash("a", "x", "y")]
    values += [
        keyed_hash("a", "xy"),
        keyed_hash("a", -1),
        keyed_hash("a", 1),
        keyed_hash("ab", ""),
        keyed_hash("a", "b"),
    ]
    assert len(set(values)) == len(values)
    assert all(0 <= v < 2**63 for v in values)
    bits = np.array([[keyed_hash("s", i) >> b & 1 for b in range(63)] for i in range(2000)])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.06
