"""verify: every byte counts, and one bad byte condemns one sample."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.cli import app
from data_prep.verify import verify_all
from g3n.config import G3nError
from g3n.stream.index import load_index
from tests.shards import volumes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "shards"
    volumes(folder, (3, 2), (2,))
    return folder


def test_whole_shards(whole: Path) -> None:
    found = verify_all(str(whole), workers=1)
    shards = [s for shards in load_index(str(whole)).splits.values() for s in shards]
    assert found.problems == ()
    assert found.samples == sum(len(s.samples) for s in shards)
    assert found.bytes == sum((whole / s.name).stat().st_size for s in shards)
    done = CliRunner().invoke(app, ["verify", str(whole), "--workers", "1"])
    assert done.exit_code == 0
    assert "no problems" in done.stdout


def test_any_flipped_byte_is_found(whole: Path, tmp_path: Path) -> None:
    """Every 97th byte of a shard: in array, JSON, tar header or padding."""
    shutil.copytree(whole, tmp_path / "s")
    index = load_index(str(tmp_path / "s"))
    shard = index.splits["train"][0]
    path = tmp_path / "s" / shard.name
    content = path.read_bytes()
    named = 0
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        problems = verify_all(str(tmp_path / "s"), workers=1).problems
        assert len(problems) == 1, position
        inside = [s for s in shard.samples for o, n in s.members.values() if o <= position < o + n]
        if inside:
            assert f"sample '{inside[0].key}' at byte" in problems[0]
            named += 1
    assert named > 10


def test_cut_grown_and_lost_shards(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "s")
    shard = load_index(str(whole)).splits["train"][0]
    path = tmp_path / "s" / shard.name
    content = path.read_bytes()
    last = shard.samples[-1].members["npy.zst"][0]
    path.write_bytes(content[: last + 5])
    found = verify_all(str(tmp_path / "s"), workers=1).problems
    assert any(shard.samples[-1].key in line for line in found)
    path.write_bytes(content + b"x")
    [line] = verify_all(str(tmp_path / "s"), workers=1).problems
    assert f"{len(content) + 1} bytes, the index says {len(content)}" in line
    path.unlink()
    assert any(shard.name in line for line in verify_all(str(tmp_path / "s"), workers=1).problems)
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "s"), "--workers", "1"])
    assert done.exit_code == 1
    assert "damaged: shard" in done.stdout
    with pytest.raises(G3nError, match=r"index\.json"):
        verify_all(str(tmp_path / "nowhere"))
