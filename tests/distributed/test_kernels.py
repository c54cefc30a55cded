"""A run gives the same losses whichever kernels compute it: plain torch, or Triton (here in its interpreter), alone, recomputed, under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.encode import encode
from tests import nano
from tests.launch import launch, losses

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

    def job(task: str, name: str, *more: str) -> dict[str, Any]:
        return {"config": str(configs[task]), "overrides": [f"name={name}", *SETTINGS, *more]}

    def run(ranks: int, jobs: list[dict[str, Any]], **environment: str) -> None:
        (root / "jobs.json").write_text(json.dumps(jobs))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            done = launch(ranks, "tests/distributed/worker.py", str(root / "jobs.json"))
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    run(1, [job(t, t) for t in TASKS[:2]], G3N_KERNELS="reference")
    encode(str(root / "runs" / "decoder"), str(root / "shards"), root / "latents", "cpu", 4)
    compiled = job("dit", "dit-compile", "trainer.compile=true")
    run(1, [*(job(t, t) for t in TASKS[2:]), compiled], G3N_KERNELS="reference")
    triton = {"G3N_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    recomputed = [job(t, f"{t}-triton-recompute", "trainer.recompute=true") for t in ("mae", "dit")]
    run(1, [*(job(t, f"{t}-triton") for t in TASKS), *recomputed], **triton)
    run(2, [job(t, f"{t}-triton-3", "trainer.zero_stage=3") for t in ("mae", "dit")], **triton)
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
