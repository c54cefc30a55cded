"""Which checkpoint a run goes on from, and what is refused. Saving itself is tested on ranks (tests/distributed)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from g3n.config import G3nError, to_plain
from g3n.engine import checkpoint, tensorfile
from g3n.engine.trainer import with_defaults
from g3n.train import load_config
from tests import nano

STATE = {"format": checkpoint.FORMAT, "task": "mae", "artifact": {"shards": "ab"}}
CONFIG = {"name": "a", "optim": {"lr": 0.1}, "trainer": {"log_every": 1}}


def write(run: Path, step: int, **state: Any) -> Path:
    folder = checkpoint.step_folder(run, step)
    (folder / "engine").mkdir(parents=True)
    (folder / "engine" / "weights.pt").write_bytes(b"weights %d" % step)
    (folder / "state.json").write_text(json.dumps({**STATE, "step": step, "config": CONFIG, **state}))
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
        ({"task": "dit"}, "written by task mae, this run is dit"),
        ({"artifact": {"shards": "cd"}}, "inputs .* changed"),
    ],
)
def test_another_task_or_input_is_refused(tmp_path: Path, state: dict[str, Any], said: str) -> None:
    with pytest.raises(G3nError, match=said):
        checkpoint.check_state(write(tmp_path, 10), {**STATE, **state}, CONFIG)


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="has format 1, this version reads 2"):
        checkpoint.check_state(write(tmp_path, 10, format=1), STATE, CONFIG)


def test_config_drift_is_refused_with_a_difference_unless_it_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path, 10)
    free = {**CONFIG, "name": "b", "trainer": {"log_every": 7, "zero_stage": 3}}
    assert checkpoint.check_state(folder, STATE, free)["task"] == "mae"
    changed = {**CONFIG, "optim": {"lr": 0.2}, "data": {"where": {"modality": ["T1"]}}}
    said = r"\(data\.where\.modality: None -> \['T1'\]; optim\.lr: 0\.1 -> 0\.2\).*allow_changes=\[data\.where\.modality,optim\.lr\]"
    with pytest.raises(G3nError, match=said):
        checkpoint.check_state(folder, STATE, changed)
    with pytest.raises(G3nError, match=r"\(data\.where"):
        checkpoint.check_state(folder, STATE, changed, ["optim.lr"])
    checkpoint.check_state(folder, STATE, changed, ["optim.lr", "data."])
    assert "optim.lr is now 0.2, the checkpoint was written with 0.1" in caplog.text


def test_an_option_that_came_after_the_checkpoint_counts_as_its_default(tmp_path: Path) -> None:
    config = load_config(nano.configs(tmp_path)["mae"])
    tree: dict[str, Any] = json.loads(json.dumps(to_plain(config)))
    older = json.loads(json.dumps(tree))
    del older["model"]["norm_target"], older["trainer"]["clip_norm"]
    folder = write(tmp_path, 10, config=older)
    assert checkpoint.check_state(folder, STATE, tree, (), with_defaults(config))["step"] == 10
    tree["trainer"]["clip_norm"] = 2.0
    with pytest.raises(G3nError, match=r"\(trainer\.clip_norm: 1\.0 -> 2\.0\)"):
        checkpoint.check_state(folder, STATE, tree, (), with_defaults(config))
    older["model"]["gone"] = 1
    with pytest.raises(G3nError, match=r"model\.gone: 1 -> None"):
        checkpoint.check_state(
            write(tmp_path, 20, config=older), STATE, tree, ("trainer.", "model.norm"), with_defaults(config)
        )


def test_the_last_and_every_nth_checkpoint_are_kept(tmp_path: Path) -> None:
    for step in range(10, 90, 10):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=30)
    assert [int(f.name[-8:]) for f in checkpoint.finished_steps(tmp_path)] == [30, 60, 70, 80]
    checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    assert [int(f.name[-8:]) for f in checkpoint.finished_steps(tmp_path)] == [80]


@pytest.mark.parametrize("cuts", [1, 3, 7])
def test_a_file_written_in_pieces_is_the_safetensors_file_of_its_tensors(tmp_path: Path, cuts: int) -> None:
    generator = torch.Generator().manual_seed(cuts)
    tensors = {n: torch.randn(s, generator=generator) for n, s in {"b.w": (5, 7), "a": (3,), "c": (2, 2, 2)}.items()}
    tensors["steps"], tensors["empty"] = torch.arange(4), torch.zeros(0, 3)
    plan = tensorfile.layout({n: (tuple(t.shape), t.dtype) for n, t in tensors.items()})
    path = tmp_path / "t.safetensors"
    for part in range(cuts):  # as ranks do, in any order
        spans = [
            (n, len(t.flatten()) * part // cuts, len(t.flatten()) * (part + 1) // cuts) for n, t in tensors.items()
        ]
        tensorfile.write_parts(path, plan, [(n, a, tensors[n].flatten()[a:b]) for n, a, b in reversed(spans)])
    tensorfile.write_header(path, plan)
    found = load_file(path)
    assert path.stat().st_size == plan.bytes
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)
