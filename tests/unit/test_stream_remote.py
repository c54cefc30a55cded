"""Shards behind HTTP and S3: the same samples as local ones, through storage that is slow, fails and lies."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.verify import verify_all
from g3n.config import G3nError
from g3n.meters import Meter
from g3n.stream import cache as block_cache
from g3n.stream import lanes, remote
from g3n.stream.cache import BlockCache
from g3n.stream.decode import Damage, read_volume_sample
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream, eval_batches
from tests import shards
from tests.site import Site, site

BLOCK = 1000
COUNTS = (3, 2, 4)


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a kilobyte, and patience in hundredths of a second."""
    monkeypatch.setattr(block_cache, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 0.3)


@pytest.fixture
def local(tmp_path: Path) -> ShardIndex:
    return shards.volumes(tmp_path / "www/data", COUNTS, val=(2,))


def take(index: ShardIndex, batches: int = 4) -> list[tuple[list[str], torch.Tensor]]:
    with closing(TrainStream(index, StreamConfig(index.url, 3), "volume", 6, 0, 1, 0)) as stream:
        found = [next(stream) for _ in range(batches)]
        assert stream.damaged == 0
    return [(batch.keys, batch.tensors["volume"]) for batch in found]


def assert_same(a: list[tuple[list[str], torch.Tensor]], b: list[tuple[list[str], torch.Tensor]]) -> None:
    assert [keys for keys, _ in a] == [keys for keys, _ in b]
    assert all(torch.equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def tars(server: type[Site]) -> dict[tuple[str, str], int]:
    return {part: n for part, n in server.parts.items() if part[0].endswith(".tar")}


def blocks(folder: Path) -> list[Path]:
    return [path for path in (folder / "blocks").iterdir() if path.is_file()]


def restart() -> None:
    """What a new process starts with."""
    block_cache._cache_in.cache_clear()


def test_http_shards_are_read_like_local_ones_and_each_block_is_fetched_once(local: ShardIndex, tmp_path: Path) -> None:
    with site(tmp_path / "www") as (url, server):
        index = load_index(url, str(tmp_path / "cache"))
        assert index.fingerprint == local.fingerprint
        assert_same(take(index), take(local))
        fetched = tars(server)
        assert set(fetched.values()) == {1}
        assert all(int(part.split("-")[1]) - int(part[6:].split("-")[0]) < BLOCK for _, part in fetched)
        restart()
        assert_same(take(index), take(local))
        assert tars(server) == fetched  # the second time from the cache alone
        assert len(blocks(tmp_path / "cache")) == len(fetched)
        assert verify_all(url, 1, str(tmp_path / "cache")).problems == ()


def test_no_more_is_read_than_the_sample_needs_and_the_index_promises(local: ShardIndex, tmp_path: Path) -> None:
    shard = local.shards("train")[2]
    with open(tmp_path / "www/data" / shard.name, "ab") as file:
        file.write(b"x" * 5000)
    with site(tmp_path / "www") as (url, server):
        index = load_index(url, str(tmp_path / "cache"))
        shard = index.shards("train")[2]
        read_volume_sample(index, shard, shard.samples[1])
        spans = shard.samples[1].members.values()
        needed = {n for start, size in spans for n in range(start // BLOCK, (start + size - 1) // BLOCK + 1)}
        assert {part for _, part in tars(server)} == {f"bytes={n * BLOCK}-{(n + 1) * BLOCK - 1}" for n in needed}
        assert server.sent[shard.name] == len(needed) * BLOCK
        for sample in shard.samples:
            read_volume_sample(index, shard, sample)
        lasts = [int(part.split("-")[1]) for _, part in tars(server)]
        assert max(lasts) < shard.bytes


def test_a_resume_fetches_at_most_one_partial_shard_a_lane(local: ShardIndex, tmp_path: Path) -> None:
    state = {"cursors": [3, 3, 3], "samples": 9}
    with site(tmp_path / "www") as (url, server):
        index = load_index(url, str(tmp_path / "cache"))
        with closing(TrainStream(index, StreamConfig(url, 3, prefetch=1), "volume", 1, 0, 1, 0, state=state)) as stream:
            next(stream)
        assert sum(n for name, n in server.sent.items() if name.endswith(".tar")) > 0
        assert sum(n for name, n in server.sent.items() if name.endswith(".tar")) <= sum(
            shard.bytes for shard in index.shards("train")
        )
        assert set(tars(server).values()) == {1}


def test_a_server_that_ignores_ranges_sends_each_shard_once_and_it_is_said(
    local: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with site(tmp_path / "www") as (url, server):
        server.ranges = False
        index = load_index(url, str(tmp_path / "cache"))
        assert_same(take(index), take(local))
        for shard in index.shards("train"):
            # answers that were begun beside the first one are left when it has brought all blocks
            assert server.sent[shard.name] >= shard.bytes
        before = server.asked.copy()
        restart()
        assert_same(take(index), take(local))
        assert server.asked == before
        assert caplog.text.count("ignores byte ranges: shards are fetched whole") == 1


def test_without_a_place_for_blocks_reading_goes_on_and_it_is_said(
    local: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    with site(tmp_path / "www") as (url, server):
        for ranges in (True, False):
            server.ranges = ranges
            assert_same(take(load_index(url, str(tmp_path / "file"))), take(local))
        assert caplog.text.count("cannot be written") == 1
        assert "blocks are fetched each time" in caplog.text


def test_the_cache_stays_below_its_limit_and_what_was_read_last_stays(tmp_path: Path) -> None:
    (tmp_path / "www/data").mkdir(parents=True)
    content = os.urandom(20 * BLOCK + 300)
    (tmp_path / "www/data/x.tar").write_bytes(content)
    with site(tmp_path / "www") as (url, server):
        cache = BlockCache(tmp_path / "cache", 5 * BLOCK)

        def read(number: int) -> None:
            assert (
                cache.read(f"{url}/x.tar", "v", len(content), number * BLOCK + 10, 500)
                == (content[number * BLOCK + 10 : number * BLOCK + 510][: len(content)])
            )
            time.sleep(0.002)  # times of files are coarse

        for number in range(21):
            read(number)
            read(0)  # again and again
            assert sum(path.stat().st_size for path in blocks(tmp_path / "cache")) <= 5 * BLOCK
        assert server.parts["x.tar", f"bytes=0-{BLOCK - 1}"] == 1
        read(3)
        assert server.parts["x.tar", f"bytes={3 * BLOCK}-{4 * BLOCK - 1}"] == 2
        assert server.parts["x.tar", f"bytes={20 * BLOCK}-{20 * BLOCK + 299}"] == 1  # the last one is a short one


def test_many_processes_in_one_small_cache_do_not_break_each_other(tmp_path: Path) -> None:
    (tmp_path / "www/data").mkdir(parents=True)
    content = os.urandom(12 * BLOCK)
    (tmp_path / "www/data/x.tar").write_bytes(content)
    wrong: list[Any] = []

    def work(url: str, seed: int) -> None:
        cache = BlockCache(tmp_path / "cache", 4 * BLOCK)  # what another process has: its own locks
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            start = int(torch.randint(0, 10 * BLOCK, (1,), generator=generator))
            if cache.read(f"{url}/x.tar", "v", len(content), start, 1500) != content[start : start + 1500]:
                wrong.append(start)

    with site(tmp_path / "www") as (url, _):
        threads = [threading.Thread(target=work, args=(url, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(20):
            for path in (tmp_path / "cache").glob("blocks/*"):  # and somebody who cleans up
                path.unlink(missing_ok=True)
            time.sleep(0.01)
        for thread in threads:
            thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in blocks(tmp_path / "cache")) <= 4 * BLOCK + 3 * BLOCK
    assert not [path for path in blocks(tmp_path / "cache") if path.name.endswith(".part")]


def test_a_byte_flipped_on_the_way_or_in_the_cache_is_fetched_again_and_one_at_the_source_is_damage(
    local: ShardIndex, tmp_path: Path
) -> None:
    with site(tmp_path / "www") as (url, server):
        index = load_index(url, str(tmp_path / "cache"))
        shard = index.shards("train")[0]
        sample = shard.samples[0]
        want = read_volume_sample(local, local.shards("train")[0], sample).voxels
        place = sample.members["npy.zst"][0] + 30
        server.flipped[shard.name] = (place, 1)
        assert (read_volume_sample(index, shard, sample).voxels == want).all()
        for path in blocks(tmp_path / "cache"):
            path.write_bytes(bytes(path.stat().st_size))
        assert (read_volume_sample(index, shard, sample).voxels == want).all()
        for path in blocks(tmp_path / "cache"):
            path.write_bytes(b"")
        assert (read_volume_sample(index, shard, sample).voxels == want).all()
        asked = server.asked[shard.name]
        read_volume_sample(index, shard, sample)
        assert server.asked[shard.name] == asked
        server.flipped[shard.name] = (place, 10**9)
        for path in blocks(tmp_path / "cache"):
            path.unlink()
        with pytest.raises(Damage, match=rf"shard '{shard.url}' sample '{sample.key}' at byte \d+: checksum"):
            read_volume_sample(index, shard, sample)


def test_one_read_in_three_that_fails_and_stalls_is_no_damage_and_no_error(local: ShardIndex, tmp_path: Path) -> None:
    with site(tmp_path / "www") as (url, server):
        server.faults, server.stall_seconds = True, 0.5  # longer than STALL_SECONDS: given up and asked again
        assert_same(take(load_index(url, str(tmp_path / "one"))), take(local))
        assert max(tars(server).values()) > 1
        server.stall_seconds = 0.1  # shorter: waited for
        restart()
        assert_same(take(load_index(url, str(tmp_path / "two"))), take(local))


def test_storage_that_is_dead_is_one_line_with_its_address(local: ShardIndex, tmp_path: Path) -> None:
    with site(tmp_path / "www") as (url, server):
        index = load_index(url, str(tmp_path / "cache"))
        server.status["train-00000.tar"] = 500
        with pytest.raises(
            G3nError, match=rf"'{url}/train-00000.tar' cannot be read after 6 attempts .*HTTP 500"
        ) as error:
            take(index)
        assert "\n" not in str(error.value)
        server.status["index.json"] = 403
        asked = server.asked["index.json"]
        with pytest.raises(G3nError, match=rf"'{url}/index.json' cannot be read: HTTP 403"):
            load_index(url)
        assert server.asked["index.json"] == asked + 1  # who may not read need not ask again
        server.status["index.json"] = 404
        with pytest.raises(G3nError, match=r"have no readable index.json \(HTTP 404"):
            load_index(url)
    with pytest.raises(
        G3nError, match=rf"'{url}/.*tar' cannot be read after 6 attempts in \d+ s: .*(refused|connect)"
    ) as error:
        take(index)
    assert "\n" not in str(error.value)
    with pytest.raises(G3nError, match=rf"'{url}/index.json' cannot be read after 6 attempts"):
        load_index(url)


def test_a_server_that_takes_connections_and_says_nothing_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        with pytest.raises(G3nError, match=r"cannot be read after 6 attempts in \d+ s: .*timed out"):
            load_index(f"http://127.0.0.1:{silent.getsockname()[1]}/shards")
        monkeypatch.setattr(remote, "DEADLINE_SECONDS", 0.1)
        with pytest.raises(G3nError, match=r"cannot be read after [23] attempts in \d+ s: .*timed out"):
            load_index(f"http://127.0.0.1:{silent.getsockname()[1]}/shards")


def test_a_remote_shard_that_is_missing_or_cut_is_damage_of_its_samples(local: ShardIndex, tmp_path: Path) -> None:
    folder = tmp_path / "www/data"
    shard = local.shards("train")[2]
    offset, size = shard.samples[2].members["npy.zst"]
    os.truncate(folder / shard.name, offset + size // 2)
    (folder / "val-00000.tar").unlink()
    with site(tmp_path / "www") as (url, _):
        index = load_index(url, str(tmp_path / "cache"))
        shard = index.shards("train")[2]
        for sample in shard.samples[:2]:
            read_volume_sample(index, shard, sample)
        for sample in shard.samples[2:]:
            with pytest.raises(Damage, match=r"(npy.zst|json) has \d+ of \d+ bytes, the shard is cut"):
                read_volume_sample(index, shard, sample)
        with pytest.raises(
            G3nError, match=r"val-00000.tar' sample .* at byte \d+: the shard cannot be read \(HTTP 404"
        ):
            next(eval_batches(index, None, "volume", "val", 1, 0, 1, 0))
        problems = verify_all(url, 1, str(tmp_path / "cache")).problems
        assert len(problems) == 4  # two samples, the size of their shard, and the shard that is not there


def test_reads_overlap_and_keep_their_order(local: ShardIndex, tmp_path: Path) -> None:
    with site(tmp_path / "www") as (url, server):
        server.delay_seconds = 0.02
        assert_same(take(load_index(url, str(tmp_path / "cache"))), take(local))
        assert 2 < server.most_under_way <= lanes.READS_IN_FLIGHT


def test_data_wait_rises_when_storage_is_slow(
    local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 10)

    def wait_share(index: ShardIndex) -> float:
        meter = Meter(6)
        with closing(TrainStream(index, StreamConfig(index.url, 3, prefetch=1), "volume", 6, 0, 1, 0)) as stream:
            for _ in range(3):
                begin = time.perf_counter()
                next(stream)
                meter.waited(time.perf_counter() - begin)
                time.sleep(0.05)  # the step
                meter.stepped()
        return meter.data_wait_share

    with site(tmp_path / "www") as (url, server):
        quick = wait_share(local)
        server.delay_seconds = 0.5
        assert wait_share(load_index(url, str(tmp_path / "cache"))) > max(0.5, quick)


@pytest.fixture
def in_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Point s3:// at an endpoint, with credentials in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def point(url: str) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        remote._s3.cache_clear()

    yield point
    remote._s3.cache_clear()


def test_s3_shards_are_read_like_local_ones(
    local: ShardIndex, tmp_path: Path, in_s3: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip("boto3", reason="needs moto, s3fs: pip install -e '.[dev]'")
    moto = pytest.importorskip("moto.server", reason="needs moto, s3fs: pip install -e '.[dev]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        in_s3(f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="brains")
        for path in Path(local.url).iterdir():
            client.upload_file(str(path), "brains", f"a/shards/{path.name}")
        index = load_index("s3://brains/a/shards", str(tmp_path / "cache"))
        assert_same(take(index), take(local))
        client.delete_object(Bucket="brains", Key="a/shards/val-00000.tar")
        with pytest.raises(G3nError, match=r"val-00000.tar' sample .* the shard cannot be read \(no such object"):
            next(eval_batches(index, None, "volume", "val", 1, 0, 1, 0))
        shard = local.shards("train")[2]
        cut = Path(local.url, shard.name).read_bytes()[: shard.samples[2].members["npy.zst"][0] + 5]
        client.put_object(Bucket="brains", Key=f"a/shards/{shard.name}", Body=cut)
        cut_index = load_index("s3://brains/a/shards", str(tmp_path / "other"))
        shard = cut_index.shards("train")[2]
        read_volume_sample(cut_index, shard, shard.samples[1])
        for sample in shard.samples[2:]:
            with pytest.raises(Damage, match="the shard is cut"):
                read_volume_sample(cut_index, shard, sample)
        with pytest.raises(G3nError, match=r"have no readable index.json \(no such object\)"):
            load_index("s3://brains/nothing")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        in_s3(f"http://{host}:{port}")
        with pytest.raises(G3nError, match=r"'s3://brains/a/shards/index.json' cannot be read: .*credentials"):
            load_index("s3://brains/a/shards")
    finally:
        server.stop()


def test_s3_that_fails_and_stalls_is_no_damage_and_dead_s3_is_one_line(
    local: ShardIndex, tmp_path: Path, in_s3: Callable[[str], None]
) -> None:
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[dev]'")
    with site(tmp_path / "www") as (url, server):  # for reading, S3 is a web server with ranges
        in_s3(url.removesuffix("/data"))
        server.faults, server.stall_seconds = True, 0.5
        index = load_index("s3://data", str(tmp_path / "cache"))
        assert_same(take(index), take(local))
        assert max(tars(server).values()) > 1
    with pytest.raises(G3nError, match=r"'s3://data/index.json' cannot be read after 6 attempts in \d+ s: ") as error:
        load_index("s3://data")
    assert "\n" not in str(error.value)


def test_without_s3fs_an_s3_address_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    remote._s3.cache_clear()
    with pytest.raises(G3nError, match=r"s3:// needs s3fs, which is not installed; pip install 'g3n\[s3\]'"):
        load_index("s3://bucket/shards")
    remote._s3.cache_clear()
