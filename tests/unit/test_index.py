"""An index is checked before anything of it is believed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from g3n.config import G3nError
from g3n.stream.index import load_index
from tests import shards

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    shards.volumes(path, (2, 1), val=(1,))
    return path


def test_an_index_says_what_was_packed(folder: Path) -> None:
    index = load_index(str(folder) + "/")
    assert (index.kind, index.grid.shape, index.variables["modality"]) == ("volume", shards.SHAPE, ["T1"])
    assert [list(row) for row in index.grid.affine] == shards.AFFINE
    assert {split: [len(s.samples) for s in entries] for split, entries in index.splits.items()} == {
        "train": [2, 1],
        "val": [1],
    }
    for shard in index.shards("train"):
        assert shard.bytes == (folder / shard.name).stat().st_size
        for sample in shard.samples:
            offset, size = sample.members["json"]
            meta = json.loads((folder / shard.name).read_bytes()[offset : offset + size])
            assert sample.key == f"sub-{int(meta['variables']['age_years']):016x}_ses-01_T1"
    assert "splits" not in index.raw
    assert index.raw["recipe"] == {}


def shard(tree: Tree) -> Tree:
    return tree["splits"]["train"][0]  # type: ignore[no-any-return]


def sample(tree: Tree) -> Tree:
    return shard(tree)["samples"][0]  # type: ignore[no-any-return]


def twice(tree: Tree) -> None:
    tree["splits"]["val"].append(copy.deepcopy(shard(tree)))


WRONG: dict[str, tuple[Callable[[Tree], object], str]] = {
    "another format": (lambda t: t.update(format="wds"), "format is 'wds'"),
    "another kind": (lambda t: t.update(kind="meshes"), "kind is 'meshes'"),
    "no fingerprint": (lambda t: t.pop("fingerprint"), "key 'fingerprint' is missing"),
    "fingerprint a path": (lambda t: t.update(fingerprint="../../etc"), "is not hex"),
    "shard outside": (lambda t: shard(t).update(name="../secret.tar"), "'../secret.tar' is not a plain name"),
    "shard absolute": (lambda t: shard(t).update(name="/etc/passwd.tar"), "is not a plain name"),
    "shard a pipe": (lambda t: shard(t).update(name="pipe:cat x.tar"), "is not a plain name"),
    "not a tar": (lambda t: shard(t).update(name="train.zip"), "'train.zip' is not a .tar"),
    "key a path": (lambda t: sample(t).update(key="a/b"), "'a/b' is not a plain name"),
    "no bytes": (lambda t: shard(t).update(bytes=0), "has 0 bytes"),
    "bytes true": (lambda t: shard(t).update(bytes=True), "has True bytes"),
    "past the end": (lambda t: sample(t)["members"].update({"npy.zst": [512, 10**9]}), "is outside 'train-00000.tar'"),
    "before the start": (lambda t: sample(t)["members"].update({"json": [-1, 10]}), "json at -1 + 10 is outside"),
    "a pickle": (lambda t: sample(t)["members"].update(pyd=[512, 10]), "has members ['json', 'npy.zst', 'pyd']"),
    "no array": (lambda t: sample(t)["members"].pop("npy.zst"), "has members ['json']"),
    "variables of another visit": (lambda t: sample(t).update(variables=[{}, {}]), "variables of other than 1 visits"),
    "a variable that is a list": (
        lambda t: sample(t).update(variables=[{"age_years": [1]}]),
        "expected a word or a number",
    ),
    "a variable that is NaN": (lambda t: sample(t).update(variables=[{"age_years": float("nan")}]), "expected a word"),
    "a variable's odd name": (lambda t: sample(t).update(variables=[{"../x": 1}]), "variable '../x'"),
    "a huge array": (
        lambda t: (shard(t).update(bytes=1 << 40), sample(t)["members"].update({"npy.zst": [512, 1 << 39]})),
        "its array is over",
    ),
    "no visits": (lambda t: sample(t).update(visits=0), "has 0 visits"),
    "endless visits": (lambda t: sample(t).update(visits=10**9), "has 1000000000 visits"),
    "the same shard": (twice, "a shard is named twice"),
    "the same key": (lambda t: shard(t)["samples"].append(copy.deepcopy(sample(t))), "a sample key is there twice"),
    "flat grid": (lambda t: t["grid"].update(shape=[4, 5]), "grid shape [4, 5] is impossible"),
    "huge grid": (lambda t: t["grid"].update(shape=[4096] * 3), "more than 268435456 voxels"),
    "affine of 3 rows": (lambda t: t["grid"]["affine"].pop(), "grid affine must be 4 x 4"),
    "affine of NaN": (lambda t: t["grid"]["affine"][0].__setitem__(0, float("nan")), "grid affine is not finite"),
    "affine without end": (lambda t: t["grid"]["affine"][0].__setitem__(0, 10**400), "int too large"),
    "variables a list": (lambda t: t.update(variables=["T1"]), "'list' object has no attribute"),
    "splits a word": (lambda t: t.update(splits="train"), "'str' object has no attribute"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_impossible_index_is_one_line_that_says_why(folder: Path, tmp_path: Path, case: str) -> None:
    change, reason = WRONG[case]
    tree = json.loads((folder / "index.json").read_text())
    change(tree)
    (tmp_path / "index.json").write_text(json.dumps(tree))
    with pytest.raises(G3nError) as error:
        load_index(str(tmp_path))
    assert reason in str(error.value)
    assert str(tmp_path / "index.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_readable_index_is_one_line(tmp_path: Path) -> None:
    for url in (str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(
            G3nError, match=r"have no readable index.json \(.+\); give the folder that .* pack"
        ) as error:
            load_index(url)
        assert url in str(error.value)
    for text in (b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000):
        (tmp_path / "index.json").write_bytes(text)
        with pytest.raises(G3nError, match="is not a g3n-shards-1 index"):
            load_index(str(tmp_path))


def test_variables_of_samples_are_read_and_an_older_index_has_none(folder: Path, tmp_path: Path) -> None:
    found = [s.variables for shard in load_index(str(folder)).shards("train") for s in shard.samples]
    assert found == [({"modality": "T1", "age_years": float(n)},) for n in range(3)]
    tree = json.loads((folder / "index.json").read_text())
    for entries in tree["splits"].values():
        for entry in entries:
            for one in entry["samples"]:
                del one["variables"]
    (tmp_path / "index.json").write_text(json.dumps(tree))
    assert {s.variables for shard in load_index(str(tmp_path)).shards("train") for s in shard.samples} == {None}


@pytest.mark.parametrize(
    "url",
    ["pipe:cat /etc/passwd", "pipe://x", "nosuch://bucket/shards", "memory://x", "ftp://host/x", "file://host/x",
     "simplecache::http://host/x", "filecache::s3://bucket/x", "gs://bucket/x", "http:/host/x"],
)  # fmt: skip
def test_other_protocols_are_refused(url: str) -> None:
    with pytest.raises(
        G3nError, match=r"is of no protocol that shards are read by; give a folder, http\(s\):// or s3://"
    ):
        load_index(url)


def test_a_split_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(G3nError, match="no split 'test'; known: train, val"):
        load_index(str(folder)).shards("test")
