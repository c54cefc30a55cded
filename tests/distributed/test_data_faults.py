"""Bad data, bad storage and a bad tracking server under a real training on DeepSpeed ranks: named, bounded, and never a hang."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from g3n.stream.index import ShardIndex, load_index
from tests import nano, ranks, shards
from tests.launch import losses
from tests.site import site

STEPS = 6


class Runs:
    """Short MAE runs on nano volumes of their own: ``shards(train)`` has one subject, two visits, a shard."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = nano.configs(root)["mae"]

    def index(self, name: str, train: int = 8) -> ShardIndex:
        nano.shards(self.root / name / "data", train, 2)
        return load_index(str(self.root / name / "data"))

    def words(self, name: str, url: str, *more: str) -> list[str]:
        fixed = (
            f"name={name}",
            f"data.shards={url}",
            f"trainer.steps={STEPS}",
            "trainer.panels=false",
            "trainer.log_every=1",
        )
        return ["--config", str(self.config), *fixed, *more]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder(name) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "train/loss" in row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("data-faults"))


@pytest.mark.parametrize(("count", "world", "lanes"), [(3, 2, 3), (1, 4, 1), (3, 4, 2)])
def test_few_and_uneven_shards_train_every_rank_alike(runs: Runs, count: int, world: int, lanes: int) -> None:
    """The losses are those of one rank: the global batches are the same whoever reads them."""
    index = runs.index(f"few-{count}-{world}", count)
    for w in (1, world):
        ranks.run(w, runs.words(f"few-{count}-{world}-on-{w}", index.url, f"data.lanes={lanes}"))
    found, expected = (losses(runs.folder(f"few-{count}-{world}-on-{w}")) for w in (world, 1))
    assert list(found) == list(range(1, STEPS + 1))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def test_a_damaged_sample_is_named_counted_and_passed_over(runs: Runs) -> None:
    index = runs.index("damaged")
    name = shards.flip(index, "train", 3, 1)
    launch = ranks.run(2, runs.words("damaged", index.url, "data.max_damaged_share=0.5"))
    assert name in launch.output
    rows = runs.rows("damaged")
    assert rows[-1]["step"] == STEPS
    assert rows[-1]["data/damaged"] >= 1


def test_too_much_damage_ends_every_rank_and_says_where(runs: Runs) -> None:
    index = runs.index("spoiled")
    for shard in range(8):
        for sample in range(2):
            shards.flip(index, "train", shard, sample)
    launch = ranks.start(2, runs.words("spoiled", index.url))
    codes = launch.wait(60)
    assert all(codes), codes
    assert "damaged" in launch.output
    assert "pack again" in launch.output


def test_a_missing_shard_is_damage_of_its_samples(runs: Runs) -> None:
    index = runs.index("missing")
    Path(index.url, index.shards("train")[5].name).unlink()
    launch = ranks.run(2, runs.words("missing", index.url, "data.max_damaged_share=0.5"))
    assert f"{index.shards('train')[5].name}' sample" in launch.output
    assert "cannot be read (No such file or directory)" in launch.output
    assert runs.rows("missing")[-1]["step"] == STEPS


def test_storage_that_fails_one_read_in_three_and_stalls_gives_the_losses_of_a_local_folder(runs: Runs) -> None:
    index = runs.index("local")
    ranks.run(2, runs.words("local", index.url))
    with site(runs.root / "local") as (url, server):
        server.faults, server.stall_seconds = True, 1.0
        ranks.run(2, runs.words("remote", url, f"data.cache={runs.root}/cache"))
        assert sum(server.asked.values()) > 8
    assert losses(runs.folder("remote")) == losses(runs.folder("local"))


class _Refuses(BaseHTTPRequestHandler):
    silent = False

    def do_GET(self) -> None:
        if type(self).silent:
            threading.Event().wait(120)
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def server(kind: str) -> Iterator[str]:
    """Address of a tracking server that is down, silent, or answers 500."""
    if kind == "down":
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        return
    handler = type("Handler", (_Refuses,), {"silent": kind == "silent"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        found.daemon_threads, found.block_on_close = True, False
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("kind", ["down", "500", "silent"])
def test_a_broken_tracking_server_costs_no_step_and_no_loss(runs: Runs, kind: str) -> None:
    if not (runs.root / "tracked").exists():
        runs.index("tracked")
    url = str(runs.root / "tracked" / "data")
    environment = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    with server(kind) as uri:
        words = runs.words(f"tracked-{kind}", url, "tracking.mlflow=true", f"tracking.uri={uri}")
        launch = ranks.run(2, words, environment=environment)
    assert "MLflow" in launch.text(0)
    assert [row["step"] for row in runs.rows(f"tracked-{kind}")] == list(range(1, STEPS + 1))
