"""A run gives the same losses whichever kernels compute it: plain torch, or Triton (here in its interpreter), alone, recomputed, under ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.encode import encode
from tests import nano, ranks
from tests.launch import losses

pytest.importorskip("triton")
TASKS = ("mae", "decoder", "dit", "forecast")
STEPS = 3
SETTINGS = [f"trainer.steps={STEPS}", f"trainer.eval_every={STEPS}", f"trainer.save_every={STEPS}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/<task> by the reference; <task>-triton alone, -triton-recompute and -triton-3 on two ranks; dit-compile by torch.compile."""
    root = tmp_path_factory.mktemp("kernels")
    nano.shards(root / "shards")
    configs = nano.configs(root)

    def train(world: int, environment: dict[str, str], task: str, name: str, *more: str) -> None:
        ranks.run(world, ["--config", str(configs[task]), f"name={name}", *SETTINGS, *more], environment=environment)

    reference, triton = {"G3N_KERNELS": "reference"}, {"G3N_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    for task in TASKS:
        train(1, reference, task, task)
        if task == "decoder":
            encode(str(root / "runs" / "decoder"), str(root / "shards"), root / "latents", "cpu", 4)
        train(1, triton, task, f"{task}-triton")
    train(1, reference, "dit", "dit-compile", "trainer.compile=true")
    for task in ("mae", "dit"):
        train(1, triton, task, f"{task}-triton-recompute", "trainer.recompute=true")
        train(2, triton, task, f"{task}-triton-3", "trainer.zero_stage=3")
    return root


def largest_difference(root: Path, one: str, other: str) -> float:
    a, b = losses(root / "runs" / one), losses(root / "runs" / other)
    assert sorted(a) == sorted(b) == list(range(1, STEPS + 1))
    return max(abs(a[i] - b[i]) / a[i] for i in a)


@pytest.mark.parametrize("task", TASKS)
def test_triton_and_plain_torch_train_alike(root: Path, task: str) -> None:
    assert largest_difference(root, task, f"{task}-triton") < 1e-5


@pytest.mark.parametrize("task", ["mae", "dit"])
@pytest.mark.parametrize("how", ["recompute", "3"])
def test_triton_kernels_under_recomputation_and_zero_3(root: Path, task: str, how: str) -> None:
    assert largest_difference(root, task, f"{task}-triton-{how}") < 1e-4


def test_compiled_blocks_train_alike(root: Path) -> None:
    assert largest_difference(root, "dit", "dit-compile") < 1e-5
