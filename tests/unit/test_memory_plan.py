"""The planner's arithmetic by hand; tests/distributed/test_memory_plan.py holds it to DeepSpeed's engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g3n import flops
from g3n.config import G3nError
from g3n.engine.deepspeed import EngineConfig
from g3n.memory_plan import GPUs, LiveBytes, Planner, activation_bytes, plan
from g3n.stream.samples import Batch
from g3n.train import main
from tests import nano

CONFIG = EngineConfig(global_batch=64, micro_batch=8)


class Chain:
    """Linear layers of width D with ReLU between: the backward needs each layer's input."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.tensors["x"].to(next(model.parameters()).dtype)
        return model(x).float().sum(), {}


def batch(width: int) -> Batch:
    one = torch.arange(1)
    return Batch({"x": torch.zeros(1, width)}, [{}], ["s0"], one, one, one, torch.ones(1))


def test_activations_of_a_chain_by_hand() -> None:
    D, depth, B = 256, 6, 32
    module = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(D, D, bias=False), nn.ReLU())))
    twin = flops.twin(Chain(), module)  # type: ignore[arg-type]
    found = activation_bytes(twin, batch(D), replace(CONFIG, micro_batch=B, precision="fp32"))
    kept = (1 + depth) * B * D * 4  # the batch, and each ReLU's output, which is the next layer's input as well
    weight = D * D * 4  # the gradient that was computed last
    assert kept + weight <= found <= kept + weight + 3 * B * D * 4  # and what one layer's backward works with
    half = activation_bytes(flops.twin(Chain(), module), batch(D), replace(CONFIG, micro_batch=B))  # type: ignore[arg-type]
    assert half == pytest.approx(found / 2, rel=0.15)


def test_live_bytes_come_and_go() -> None:
    with LiveBytes(meta=False) as counted:
        a = torch.zeros(1000)
        b = a.view(10, 100)
        c = a + 1
        assert counted.live == counted.peak == 8000
        del a, c
        assert counted.live == 4000  # b is a view of what a was
        del b
        assert (counted.live, counted.peak) == (0, 8000)
        torch.zeros(10, device="meta")
        assert counted.peak == 8000


def test_states_of_each_stage_by_hand() -> None:
    """1 G parameters on 8 ranks in bf16: 2 bytes of weights and of gradients, 16 of states; Rajbhandari 2020 (arXiv 1910.02054), and the average."""
    n = 10**9
    one, two, three = (plan(n, 0, 0, replace(CONFIG, zero_stage=s), 8, 0) for s in (1, 2, 3))
    weights, gradients, states = "weights (bf16)", "gradients", "master weights, moments, average"
    assert [p.device[states] for p in (one, two, three)] == [2 * n] * 3
    assert [p.device[weights] for p in (one, two)] == [2 * n] * 2
    assert three.device[weights] == 2 * n / 8 + 2 * n  # its share, and what is gathered for the layers at work
    assert one.device[gradients] == 2 * n
    assert two.device[gradients] == three.device[gradients] == 2 * n / 8
    offloaded = plan(n, 0, 0, replace(CONFIG, offload=True), 8, 0)
    assert offloaded.device[states] == 0
    assert offloaded.host > one.host == 2 * n


def test_settings_that_save_memory_are_named_and_the_largest_micro_batch_is_found() -> None:
    module = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    planner = Planner(Chain(), module, batch(1024), GPUs(4, 2.0), bucket=1_000_000)
    big = replace(CONFIG, global_batch=1 << 18, micro_batch=1 << 16)
    assert planner.fits(planner.plan(big)) is False
    names = [name for name, _ in planner.alternatives(big)]
    assert names[:3] == ["trainer.zero_stage=2", f"trainer.micro_batch={1 << 15}", "trainer.recompute=true"]
    largest = planner.largest_micro_batch(big)
    assert largest is not None
    assert planner.fits(planner.plan(replace(big, micro_batch=largest)))
    assert not planner.fits(planner.plan(replace(big, micro_batch=2 * largest)))
    assert GPUs.parse("16x80") == GPUs(16, 80.0)
    for wrong in ("16", "0x80", "16x0", "16x80GB", "x"):
        with pytest.raises(G3nError, match="expected how many and GiB of each, as 16x80"):
            GPUs.parse(wrong)


def test_a_dry_run_says_what_fits(tmp_path: Path, capsys: Any) -> None:
    nano.shards(tmp_path / "shards")
    line = ["--config", str(nano.configs(tmp_path)["mae"]), "--dry-run"]
    assert main([*line, "--gpus", "4x8"]) == 0
    out = capsys.readouterr().out
    assert "20 steps of 8 = 5 times the 32 volumes" in out
    assert "(of 4 of 8 GiB)" in out
    assert "trainer.micro_batch up to 2 fits" in out
    assert not (tmp_path / "runs").exists()
    assert main([*line, "--gpus", "3x8"]) == 2
    assert "not divisible by micro_batch 2 x 3 ranks" in capsys.readouterr().err
    assert main([*line, "--gpus", "4x1"]) == 0  # less than CUDA itself takes
    assert "micro_batch up to" not in (out := capsys.readouterr().out)
    assert "no" in out.split("as it is")[1].splitlines()[0]
