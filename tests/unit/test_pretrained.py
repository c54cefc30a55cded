"""Opening trained weights: what is missing, foreign or damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from g3n.config import G3nError
from g3n.models.pretrained import fingerprint, load_weights, open_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one finished checkpoint of task mae."""
    step = tmp_path / "mae/ckpt/step_00000010"
    step.mkdir(parents=True)
    (tmp_path / "mae/latest").write_text("step_00000010\n")
    (step / "COMPLETE").write_text("{}")
    (step / "config.yaml").write_text("task: mae\nname: mae\n")
    (step / "state.json").write_text(json.dumps({"task": "mae", "artifact": {"shards": "ab"}, "step": 10}))
    save_file({"w": torch.zeros(2)}, step / "model.safetensors")
    return tmp_path / "mae"


def test_a_run_folder_and_a_step_folder_open_the_same(run: Path) -> None:
    by_run, by_step = open_run(run, "mae"), open_run(run / "ckpt/step_00000010", "mae")
    assert by_run.path == by_step.path
    assert (by_run.step, by_run.artifact) == (10, {"shards": "ab"})


def test_ema_weights_come_first(run: Path) -> None:
    save_file({"w": torch.ones(2)}, run / "ckpt/step_00000010/ema.safetensors")
    assert open_run(run, "mae").weights["w"].tolist() == [1.0, 1.0]


def test_another_task_is_refused(run: Path) -> None:
    with pytest.raises(G3nError, match="is a checkpoint of task 'mae', expected task 'dit'"):
        open_run(run, "dit")


def test_an_unfinished_checkpoint_is_refused(run: Path) -> None:
    (run / "ckpt/step_00000010/COMPLETE").unlink()
    with pytest.raises(G3nError, match="holds no finished checkpoint; train it first"):
        open_run(run, "mae")


def test_damaged_weights_are_named(run: Path) -> None:
    weights = run / "ckpt/step_00000010/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(G3nError, match=r"model.safetensors' cannot be read"):
        open_run(run, "mae")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": torch.zeros(3, 2)}, "lacks weight 'bias'"),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "x": torch.zeros(1)}, "has an unknown weight 'x'"),
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, r"weight 'weight' is \(3, 5\), expected \(3, 2\)"),
    ],
)
def test_weights_must_fit(weights: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(G3nError, match=message):
        load_weights(torch.nn.Linear(2, 3), weights)


def test_fingerprint_sees_every_bit_name_and_dtype() -> None:
    base = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    changed = torch.arange(4.0)
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    others = [
        {**base, "a": changed},
        {**base, "a": base["a"].double()},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
    ]
    assert fingerprint(base) == fingerprint(dict(reversed(base.items())))
    assert len({fingerprint(base), *map(fingerprint, others)}) == 5
