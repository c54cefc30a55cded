"""What a training run will hold in the memory of each GPU, before one is asked for: ``g3n/train.py --dry-run``.

Activations are counted by running forward and backward on the meta device and adding up what is alive. What DeepSpeed keeps is a
number of bytes for each parameter, measured on its engine (tests/distributed/test_memory_plan.py holds it to that).
"""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from g3n import flops
from g3n.config import G3nError
from g3n.engine.deepspeed import EngineConfig
from g3n.flops import Twin
from g3n.stream.samples import Batch

GIB = 2**30
LIBRARIES_BYTES = 1.5 * GIB  # assumed: CUDA's context, buffers of NCCL and cuBLAS
FRAGMENTS = 0.05  # assumed: what the allocator loses, as a share of the rest
_LIVE_NUMBERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
_ADAM_BYTES = 12  # a parameter of this rank's share: its gradient in float32, and two temporaries of torch's AdamW


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank by part: on its GPU while activations are largest, and in host memory."""

    device: dict[str, float]
    host: float
    step: float  # on the GPU during the optimizer's step, when there are no activations

    @property
    def peak(self) -> float:
        """The most on the GPU, without what is assumed beside it."""
        return max(sum(self.device.values()), self.step)

    @property
    def total(self) -> float:
        return self.peak * (1 + FRAGMENTS) + LIBRARIES_BYTES


def plan(parameters: int, frozen: int, activations: int, config: EngineConfig, world: int, bucket: int) -> Plan:
    """``frozen`` and ``activations`` in bytes; ``bucket`` is DeepSpeed's reduce_bucket_size, in numbers.

    With offload what leaves the GPU was not measured, for want of one: it follows DeepSpeed's code.
    """
    number = 2 if config.precision == "bf16" else 4
    stage, share = config.zero_stage, parameters / world
    weights = number * (share if stage == 3 else parameters)
    gathered = number * min(parameters, _LIVE_NUMBERS) if stage == 3 else 0
    gradients = number * (parameters if stage == 1 else share)
    on_the_way = number * min(parameters, bucket) if stage > 1 else 0
    states = 16 * share  # master weights, two moments and the average, float32
    kept = (
        weights + (0 if config.offload else states) + (number * share + number * bucket if stage == 3 else 0) + frozen
    )
    device = {
        f"weights ({config.precision})": weights + gathered,
        "gradients": gradients + on_the_way,
        "master weights, moments, average": 0 if config.offload else states,
        "buffer of communication": number * bucket,
        "frozen models": frozen,
        f"activations of {config.micro_batch}": activations,
    }
    step = kept + (0 if config.offload else _ADAM_BYTES * share)
    host = states + (
        (16 + _ADAM_BYTES) * share if config.offload else 0
    )  # a checkpoint on its way to disk, and what was offloaded
    return Plan(device, host, step)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made since it was entered and still alive; ``peak`` is the most at one time.

    ``meta``: of those on the meta device, or of all others.
    """

    def __init__(self, meta: bool) -> None:
        super().__init__()
        self.meta = meta
        self.live = self.peak = 0
        self._known: set[int] = set()

    def known(self, *tensors: torch.Tensor) -> None:
        """These were there before and are not counted."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.is_meta == self.meta:
                self._see(value.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def frozen_bytes(twin: Twin) -> int:
    """Bytes of the models that the task holds beside the one it trains."""
    modules = [module for module in vars(twin.task).values() if isinstance(module, nn.Module)]
    return sum(t.untyped_storage().nbytes() for module in modules for t in [*module.parameters(), *module.buffers()])


def activation_bytes(twin: Twin, batch: Batch, config: EngineConfig) -> int:
    """The most bytes that forward and backward of a micro-batch hold beside weights and gradients, the batch included."""
    if config.precision == "bf16":
        twin.module.bfloat16()
    for module in twin.module.modules():
        if hasattr(module, "recompute"):
            setattr(module, "recompute", config.recompute)  # noqa: B010
    for parameter in twin.module.parameters():
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    inputs = flops.batch_of(batch, config.micro_batch)
    gc.collect()
    with LiveBytes(meta=True) as counted:
        counted.known(*twin.module.parameters(), *twin.module.buffers())
        for module in vars(twin.task).values():
            if isinstance(module, nn.Module):
                counted.known(*module.parameters(), *module.buffers())
        loss, _ = twin.task.loss(twin.module, inputs)
        loss.backward()
    return counted.peak + sum(t.untyped_storage().nbytes() for t in inputs.tensors.values())


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


@dataclass(frozen=True)
class GPUs:
    """``--gpus 16x80``: how many, and GiB of each; ``gib`` None where it is not known."""

    count: int
    gib: float | None

    @classmethod
    def parse(cls, text: str) -> GPUs:
        found = re.fullmatch(r"(\d{1,6})x(\d{1,4}(?:\.\d+)?)", text)
        if found is None or int(found[1]) < 1 or float(found[2]) <= 0:
            raise G3nError(f"--gpus is '{text}', expected how many and GiB of each, as 16x80")
        return cls(int(found[1]), float(found[2]))


class Planner:
    """Plans of one task under different settings."""

    def __init__(self, task: Any, module: nn.Module, batch: Batch, gpus: GPUs, bucket: int) -> None:
        self.task, self.module, self.batch, self.gpus, self.bucket = task, module, batch, gpus, bucket
        self.parameters = sum(p.numel() for p in module.parameters())
        self._activations: dict[tuple[int, bool, str], int] = {}

    def plan(self, config: EngineConfig) -> Plan:
        twin = flops.twin(self.task, self.module)
        key = (config.micro_batch, config.recompute, config.precision)
        if key not in self._activations:
            self._activations[key] = activation_bytes(twin, self.batch, config)
        return plan(self.parameters, frozen_bytes(twin), self._activations[key], config, self.gpus.count, self.bucket)

    def fits(self, plan: Plan) -> bool | None:
        return None if self.gpus.gib is None else plan.total <= self.gpus.gib * GIB

    def largest_micro_batch(self, config: EngineConfig) -> int | None:
        """The largest that fits and divides trainer.global_batch; None where none does."""
        most = config.global_batch // self.gpus.count
        for size in sorted((n for n in range(1, most + 1) if most % n == 0), reverse=True):
            if self.fits(self.plan(replace(config, micro_batch=size))):
                return size
        return None

    def alternatives(self, config: EngineConfig) -> list[tuple[str, EngineConfig]]:
        """Settings that save memory, each as a command line says it, from the cheapest in time to the dearest."""
        found = []
        if config.zero_stage < 2 and self.gpus.count > 1:
            found.append(("trainer.zero_stage=2", replace(config, zero_stage=2)))
        if config.micro_batch % 2 == 0:
            half = config.micro_batch // 2
            found.append((f"trainer.micro_batch={half}", replace(config, micro_batch=half)))
        if not config.recompute:
            found.append(("trainer.recompute=true", replace(config, recompute=True)))
        if config.zero_stage < 3 and self.gpus.count > 1:
            found.append(("trainer.zero_stage=3", replace(config, zero_stage=3)))
        if not config.offload:
            found.append(("trainer.offload=true", replace(config, offload=True)))
        least: dict[str, Any] = {"micro_batch": 1, "recompute": True, "offload": True, "zero_stage": 3}
        words = " ".join(f"trainer.{name}={str(value).lower()}" for name, value in least.items())
        return [*found, (words, replace(config, **least))]


def tables(planner: Planner, config: EngineConfig) -> list[Table]:
    """Memory by part, and what each setting that saves memory would come to."""
    now, gpus = planner.plan(config), planner.gpus
    where = f"{gpus.count} of {gpus.gib:g} GiB" if gpus.gib else f"{gpus.count}"
    parts = Table("part", "GiB", title=f"Predicted GPU memory of a rank (of {where})", title_justify="left")
    for name, size_bytes in now.device.items():
        parts.add_row(name, _gib(size_bytes))
    if now.step > sum(now.device.values()):
        parts.add_row("more than these in the optimizer's step", _gib(now.step - sum(now.device.values())))
    parts.add_row("CUDA, libraries, fragments (assumed)", _gib(now.total - now.peak))
    parts.add_section()
    parts.add_row("together", _gib(now.total))
    parts.add_row(
        "host memory: checkpoint under way" + (", offloaded states" if config.offload else ""), _gib(now.host)
    )
    other = Table("setting", "GiB", "fits", title="Instead", title_justify="left")
    words: dict[bool | None, Literal["yes", "no", ""]] = {True: "yes", False: "no", None: ""}
    other.add_row("as it is", _gib(now.total), words[planner.fits(now)])
    for name, changed in planner.alternatives(config):
        then = planner.plan(changed)
        other.add_row(name, _gib(then.total), words[planner.fits(then)])
    return [parts, other]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
