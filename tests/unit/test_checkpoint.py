"""Which checkpoint a run goes on from, and what is refused. Saving itself is tested on ranks (tests/distributed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash

from g3n.config import G3nError
from g3n.engine import checkpoint

STATE = {"task": "mae", "world": 2, "zero_stage": 1, "artifact": {"shards": "ab"}}
CONFIG = {"name": "a", "optim": {"lr": 0.1}, "trainer": {"log_every": 1}}


def write(run: Path, step: int, **state: Any) -> Path:
    folder = checkpoint.step_folder(run, step)
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "weights.pt").write_bytes(b"weights %d" % step)
    (folder / "state.json").write_text(json.dumps({**STATE, "config": CONFIG, **state}))
    files = [p for p in folder.rglob("*") if p.is_file()]
    hashes = {p.relative_to(folder).as_posix(): xxhash.xxh3_64_hexdigest(p.read_bytes()) for p in files}
    (folder / "COMPLETE").write_text(json.dumps(hashes))
    return folder


def test_auto_takes_the_newest_and_starts_new_where_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "auto") is None
    write(tmp_path, 10)
    newest = write(tmp_path, 20)
    assert checkpoint.find(tmp_path, "auto") == newest


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    good = write(tmp_path, 10)
    (write(tmp_path, 20) / "COMPLETE").unlink()
    assert checkpoint.find(tmp_path, "auto") == good


@pytest.mark.parametrize("harm", ["flip", "remove", "add"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    file = bad / "engine" / "weights.pt"
    if harm == "flip":
        file.write_bytes(b"Weights 20")
    elif harm == "remove":
        file.unlink()
    else:
        (bad / "engine" / "evil.pt").write_bytes(b"pickle")
    assert checkpoint.find(tmp_path, "auto") == good
    assert "step_00000020" in caplog.text
    with pytest.raises(G3nError, match=r"\.pt'"):
        checkpoint.find(tmp_path, str(bad))


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    (write(tmp_path, 10) / "state.json").unlink()
    with pytest.raises(G3nError, match=r"every checkpoint .* is damaged"):
        checkpoint.find(tmp_path, "auto")


def test_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    assert checkpoint.find(tmp_path, "never") is None
    write(tmp_path, 10)
    with pytest.raises(G3nError, match="already holds step_00000010"):
        checkpoint.find(tmp_path, "never")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"world": 4}, "world size 2, this run has 4"),
        ({"zero_stage": 3}, r"zero_stage 1, this run has 3"),
        ({"task": "dit"}, "task mae, this run has dit"),
        ({"artifact": {"shards": "cd"}}, "inputs .* changed"),
    ],
)
def test_another_world_stage_task_or_input_is_refused(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    with pytest.raises(G3nError, match=said):
        checkpoint.check_state(write(tmp_path, 10), {**STATE, **state}, CONFIG)


def test_a_changed_learning_rate_is_refused_and_a_changed_log_interval_is_not(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    free = {**CONFIG, "name": "b", "trainer": {"log_every": 7}}
    assert checkpoint.check_state(folder, STATE, free)["task"] == "mae"
    with pytest.raises(G3nError, match=r"optim\.lr = 0\.1, this run has 0\.2"):
        checkpoint.check_state(folder, STATE, {**CONFIG, "optim": {"lr": 0.2}})
