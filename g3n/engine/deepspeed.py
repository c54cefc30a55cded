"""From g3n's configuration to DeepSpeed's: generated, never written by hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from g3n.config import G3nError
from g3n.engine.compiled import compile_blocks
from g3n.engine.distributed import Ranks

_OURS = {
    "train_batch_size": "trainer.global_batch",
    "train_micro_batch_size_per_gpu": "trainer.micro_batch",
    "gradient_accumulation_steps": "trainer.global_batch and trainer.micro_batch",
    "gradient_clipping": "trainer.clip_norm",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "optimizer": "optim",
    "scheduler": "optim.warmup_steps and optim.min_lr_ratio",
    "zero_optimization.stage": "trainer.zero_stage",
    "zero_optimization.offload_optimizer": "trainer.offload",
}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay."""

    lr: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0  # the last step's rate as a share of lr

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup_steps < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"lr {self.lr} must be > 0, weight_decay {self.weight_decay} and warmup_steps {self.warmup_steps} >= 0, "
                f"min_lr_ratio {self.min_lr_ratio} in [0, 1]"
            )
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")


REDUCE_BUCKET = 50_000_000  # numbers; DeepSpeed's 500 million take 1 GB of each GPU in bf16, 2 in fp32


@dataclass(frozen=True)
class EngineConfig:
    """How a step is computed."""

    global_batch: int
    micro_batch: int
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[1, 2, 3] = 1
    clip_norm: float = 1.0
    offload: bool = False  # master weights, moments and average in host memory, updated by the CPU
    recompute: bool = False  # activation checkpointing: less memory, a third more arithmetic
    compile: bool = False  # torch.compile of each transformer block

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.micro_batch < 1 or self.clip_norm <= 0:
            raise ValueError(
                f"global_batch {self.global_batch} and micro_batch {self.micro_batch} must be >= 1, "
                f"clip_norm {self.clip_norm} > 0"
            )


def accumulation(config: EngineConfig, world: int) -> int:
    """Micro-batches a rank and step. Raises G3nError where the global batch does not divide."""
    a_pass = config.micro_batch * world
    if config.global_batch % a_pass:
        raise G3nError(
            f"trainer.global_batch {config.global_batch} is not divisible by micro_batch {config.micro_batch} x "
            f"{world} ranks = {a_pass}; change one of them"
        )
    return config.global_batch // a_pass


def deepspeed_config(
    config: EngineConfig, optim: OptimConfig, world: int, passthrough: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's dictionary. Raises G3nError where ``passthrough`` sets what g3n owns."""
    tree: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation(config, world),
        "gradient_clipping": config.clip_norm,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": REDUCE_BUCKET},
        "optimizer": {
            "type": "AdamW",
            # torch's own AdamW: DeepSpeed's fused one is compiled by nvcc or g++ at first use
            "params": {
                "lr": optim.lr,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": optim.weight_decay,
                "torch_adam": True,
            },
        },
        "steps_per_print": 2**31,
    }
    if config.offload:
        tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        tree["zero_force_ds_cpu_optimizer"] = False  # else it wants its own Adam, which g++ compiles at first use
    _merge(tree, passthrough, "")
    return tree


def _merge(tree: dict[str, Any], extra: Mapping[str, Any], path: str) -> None:
    for key, value in extra.items():
        full = f"{path}{key}"
        if full in _OURS:
            raise G3nError(f"config key 'deepspeed.{full}' is set by {_OURS[full]}; use that")
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, f"{full}.")
        else:
            tree[key] = value


def initialize(
    model: nn.Module, config: EngineConfig, optim: OptimConfig, ranks: Ranks, passthrough: Mapping[str, Any]
) -> Any:
    """The DeepSpeed engine around ``model``; parameters start as rank 0's, buffers stay float32."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if config.recompute:
        for module in model.modules():
            if hasattr(module, "recompute"):
                setattr(module, "recompute", True)  # noqa: B010
    if config.compile:
        compile_blocks(model)
    buffers = {name: buffer.detach().clone().to(ranks.device) for name, buffer in model.named_buffers()}
    tree = deepspeed_config(config, optim, ranks.world, passthrough)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=tree)
    for name, buffer in model.named_buffers():  # bf16 casts them too, and statistics must not lose digits
        dist.broadcast(buffers[name], src=0)
        buffer.data = buffers[name]
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def grad_norm(engine: Any) -> float:
    """Global gradient norm of the last step, before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm.item() if isinstance(norm, torch.Tensor) else norm)
