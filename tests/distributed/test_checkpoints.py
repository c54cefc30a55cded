"""Checkpoints on real ranks: any world size and ZeRO stage, any moment of death, any damage."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import nano, ranks
from tests.launch import losses

TENSORS = ("model", "ema", "exp_avg", "exp_avg_sq")


class Runs:
    """MAE runs of 20 steps on nano volumes, a checkpoint every 5."""

    def __init__(self, root: Path) -> None:
        self.root = root
        nano.shards(root / "shards")
        self.config = nano.configs(root)["mae"]

    def words(self, name: str, *more: str) -> list[str]:
        settings = ["trainer.save_every=5", "trainer.keep_last=10", *more]
        return ["--config", str(self.config), f"name={name}", *settings]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def losses(self, name: str) -> list[float]:
        found = losses(self.folder(name))
        assert list(found) == list(range(1, 21))
        return list(found.values())

    def copy(self, name: str, copy: str, last: int) -> Path:
        """A run as it was when step ``last`` was saved."""
        shutil.copytree(self.folder(name), self.folder(copy))
        for folder in (self.folder(copy) / "ckpt").iterdir():
            if int(folder.name[-8:]) > last:
                shutil.rmtree(folder)
        return self.folder(copy)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("checkpoints"))
    ranks.run(2, runs.words("straight"))
    return runs


def step(run: Path, number: int) -> Path:
    return run / "ckpt" / f"step_{number:08d}"


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def events(run: Path) -> list[dict[str, Any]]:
    path = run / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize(
    "segments",
    [
        [(2, 1), (1, 1), (4, 1), (2, 1)],
        [(2, 2), (4, 2), (1, 2), (2, 2)],
        [(2, 3), (1, 3), (4, 3), (2, 3)],
        [(1, 1), (2, 3), (4, 2), (2, 1)],
    ],
    ids=["ZeRO-1", "ZeRO-2", "ZeRO-3", "all stages"],
)
def test_a_run_goes_on_at_any_world_size_and_stage(runs: Runs, segments: list[tuple[int, int]]) -> None:
    """Five steps a segment: rank 0 is told to stop in its first micro-batch of each fifth step."""
    name = "elastic-" + "-".join(f"{world}x{stage}" for world, stage in segments)
    for number, (world, stage) in enumerate(segments):
        fault = {"kind": "SIGTERM", "rank": 0, "calls": [4 * (4 // world)]}
        last = number == len(segments) - 1
        launch = ranks.run(world, runs.words(name, f"trainer.zero_stage={stage}"), [] if last else [fault])
        where = f"{world} rank{'s' if world > 1 else ''}, ZeRO-{stage}: loss"
        assert (where in launch.output) == (number > 0 and (world, stage) != segments[number - 1])
        assert ("stopped by SIGTERM" in launch.output) != last
    assert worst(runs.losses(name), runs.losses("straight")) < 1e-4


@pytest.mark.parametrize(("world", "stage"), [(2, 1), (1, 1), (4, 2), (2, 3), (4, 3)])
def test_what_is_loaded_and_saved_again_has_the_same_bytes(runs: Runs, world: int, stage: int) -> None:
    name = f"again-{world}-{stage}"
    words = runs.words(name, f"trainer.zero_stage={stage}", "--resume", str(step(runs.folder("straight"), 10)))
    ranks.run(world, words, [{"kind": "save again"}])
    before, after = step(runs.folder("straight"), 10), step(runs.folder(name), 10)
    for file in [f"{t}.safetensors" for t in TENSORS] + ["cursors.json"]:
        assert (before / file).read_bytes() == (after / file).read_bytes(), file


def test_a_whole_checkpoint_is_byte_stable(runs: Runs) -> None:
    run = runs.copy("straight", "stable", 20)
    ranks.run(2, runs.words("stable"), [{"kind": "save again"}])
    first = {p.name: p.read_bytes() for p in step(run, 20).iterdir()}
    ranks.run(2, runs.words("stable"), [{"kind": "save again"}])
    assert {p.name: p.read_bytes() for p in step(run, 20).iterdir()} == first


def test_weights_carried_over_wrongly_are_noticed(runs: Runs) -> None:
    runs.copy("straight", "wrong", 10)
    fault = {"kind": "load wrong", "parameter": "decoder.predict.weight"}
    launch = ranks.run(1, runs.words("wrong"), [fault], expect=2)
    assert "they were not carried over rightly" in launch.output


def test_another_number_of_workers_gives_the_same_losses(runs: Runs) -> None:
    runs.copy("straight", "workers", 10)
    ranks.run(2, runs.words("workers", "data.workers=5"))
    assert runs.losses("workers") == runs.losses("straight")


def test_config_drift_is_one_line_with_the_difference(runs: Runs) -> None:
    runs.copy("straight", "drift", 10)
    launch = ranks.run(2, runs.words("drift", "optim.lr=1e-3", "model.mask_ratio=0.5"), expect=2)
    assert "(model.mask_ratio: 0.7 -> 0.5; optim.lr: 0.002 -> 0.001)" in launch.text(0)
    ranks.run(2, runs.words("drift", "optim.lr=1e-3", "allow_changes=[optim.lr]"))
    assert runs.losses("drift")[:10] == runs.losses("straight")[:10]
    assert runs.losses("drift")[11:] != runs.losses("straight")[11:]


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize("file", ["model.safetensors", "exp_avg_sq.safetensors", "state.json"])
def test_a_damaged_file_costs_the_steps_since_the_checkpoint_before(runs: Runs, harm: str, file: str) -> None:
    name = f"{harm}-{file}"
    path = step(runs.copy("straight", name, 15), 15) / file
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    launch = ranks.run(2, runs.words(name))
    assert (
        f"step_00000015' is left aside: file '{file}' is {'missing' if harm == 'missing' else 'damaged'}"
        in launch.text(0)
    )
    assert f"go on from '{step(runs.folder(name), 10)}'" in launch.text(0)
    assert runs.losses(name) == runs.losses("straight")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_costs_one_checkpoint_and_training_goes_on(runs: Runs, rank: int) -> None:
    name = f"full-{rank}"
    fault = {"kind": "save full", "rank": rank, "files": [6]}  # in the second save
    launch = ranks.run(2, runs.words(name), [fault])
    assert f"was not written (rank {rank}: No space left on device); training goes on" in launch.text(0)
    assert [e["kind"] for e in events(runs.folder(name))] == ["save failed"]
    assert {int(f.name[-8:]) for f in (runs.folder(name) / "ckpt").iterdir()} == {5, 15, 20}
    assert runs.losses(name) == runs.losses("straight")


def test_a_disk_that_stays_full_ends_the_run_with_the_last_good_checkpoint_named(runs: Runs) -> None:
    runs.copy("straight", "full", 10)
    fault = {"kind": "save full", "rank": 0, "files": list(range(100))}
    launch = ranks.run(2, runs.words("full"), [fault], expect=2)
    said = "the checkpoint of step 20 was not written (rank 0: No space left on device); the last good one is step_00000010"
    assert said in launch.text(0)
    assert {f.name for f in (runs.folder("full") / "ckpt").iterdir()} == {"step_00000005", "step_00000010"}
    ranks.run(2, runs.words("full"))
    assert runs.losses("full") == runs.losses("straight")


@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_during_a_save_leaves_the_checkpoint_before(runs: Runs, rank: int) -> None:
    name = f"kill-in-save-{rank}"
    file = random.randrange(4, 12)  # any of the second and third save
    launch = ranks.start(2, runs.words(name), [{"kind": "save kill", "rank": rank, "files": [file]}])
    codes = launch.wait()
    assert codes[rank] == -9, launch.output[-3000:]
    assert codes[1 - rank] not in (0, -9), launch.output[-3000:]
    left = sorted(f.name for f in (runs.folder(name) / "ckpt").iterdir())
    assert any(f.endswith(".part") for f in left)
    ranks.run(2, runs.words(name))
    assert runs.losses(name) == runs.losses("straight")
    assert not any(f.name.endswith(".part") for f in (runs.folder(name) / "ckpt").iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    launch = ranks.run(2, [*runs.words("x"), f"runs={tmp_path}/file"], expect=2)
    assert f"run folder '{tmp_path}/file/x' cannot be written (Not a directory)" in launch.text(0)


def test_every_nth_checkpoint_stays(runs: Runs) -> None:
    ranks.run(2, [*runs.words("kept"), "trainer.keep_last=1", "trainer.keep_every=10", "trainer.save_every=2"])
    assert sorted(int(f.name[-8:]) for f in (runs.folder("kept") / "ckpt").iterdir()) == [10, 20]
    assert runs.losses("kept") == runs.losses("straight")
