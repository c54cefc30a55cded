"""Batches that divide, and DeepSpeed's dictionary made from ours."""

from __future__ import annotations

import pytest

from g3n.config import G3nError
from g3n.engine.deepspeed import REDUCE_BUCKET, EngineConfig, OptimConfig, accumulation, deepspeed_config

OPTIM = OptimConfig(lr=1e-3)


def test_accumulation_is_what_the_global_batch_leaves_over() -> None:
    assert accumulation(EngineConfig(global_batch=48, micro_batch=4), world=3) == 4


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers() -> None:
    with pytest.raises(G3nError, match=r"global_batch 10 is not divisible by micro_batch 4 x 2 ranks = 8"):
        accumulation(EngineConfig(global_batch=10, micro_batch=4), world=2)


def test_deepspeed_gets_our_batch_precision_and_optimizer_and_compiles_nothing() -> None:
    config = EngineConfig(global_batch=16, micro_batch=2, precision="fp32", zero_stage=2, clip_norm=0.5)
    tree = deepspeed_config(config, OPTIM, 4, {"zero_optimization": {"overlap_comm": False}})
    assert tree["train_batch_size"] == 16
    assert tree["gradient_accumulation_steps"] == 2
    assert tree["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": REDUCE_BUCKET}
    assert tree["bf16"] == {"enabled": False}
    assert tree["gradient_clipping"] == 0.5
    assert tree["optimizer"]["params"]["torch_adam"] is True


def test_offload_moves_the_optimizer_to_the_cpu_and_still_compiles_nothing() -> None:
    config = EngineConfig(global_batch=2, micro_batch=2, zero_stage=2, offload=True)
    tree = deepspeed_config(config, OPTIM, 1, {})
    assert tree["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert tree["zero_force_ds_cpu_optimizer"] is False
    assert tree["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize(
    ("passthrough", "instead"),
    [
        ({"train_batch_size": 8}, "trainer.global_batch"),
        ({"zero_optimization": {"stage": 3}}, "trainer.zero_stage"),
        ({"optimizer": {"type": "Lamb"}}, "optim"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "trainer.offload"),
    ],
)
def test_the_passthrough_may_not_set_what_g3n_owns(passthrough: dict[str, object], instead: str) -> None:
    with pytest.raises(G3nError, match=f"is set by {instead}"):
        deepspeed_config(EngineConfig(global_batch=1, micro_batch=1), OPTIM, 1, passthrough)


@pytest.mark.parametrize("bad", [{"lr": 0.0}, {"lr": 1.0, "betas": (0.9, 1.0)}, {"lr": 1.0, "min_lr_ratio": 2.0}])
def test_values_out_of_range_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        OptimConfig(**bad)  # type: ignore[arg-type]
