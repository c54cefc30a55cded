"""What a sample costs in floating point operations, counted from the model itself, and what a GPU can do at most.

The loss of a task runs once forward and backward on the meta device, where tensors have shapes and no values. Matrix products,
convolutions and attention are counted by torch's own counter: a product of [m, k] and [k, n] is 2mkn, attention over T tokens
4 T^2 D forward and twice that backward, a frozen module its forward only. Element-wise work is not counted, and neither is what
recomputation or a fused attention computes again: model FLOPs utilization (MFU) compares the arithmetic the model needs with
what the GPU could have done (Chowdhery 2022, arXiv 2204.02311).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from g3n.stream.samples import Batch
from g3n.tasks.base import Task


@dataclass(frozen=True)
class Twin:
    """A task and its trainable module without values: the same shapes and dtypes on the meta device."""

    task: Task
    module: nn.Module


def without_values(module: nn.Module) -> nn.Module:
    """A copy of ``module`` on the meta device; nothing of the original is copied or touched."""
    replaced: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    replaced |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, replaced)


def twin(task: Task, module: nn.Module) -> Twin:
    """The twin of a task and of ``module`` as ``task.build()`` gave it. Frozen modules of the task are its attributes."""
    other = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, nn.Module):
            setattr(other, name, without_values(value))
    return Twin(other, without_values(module))


def batch_of(batch: Batch, size: int) -> Batch:
    """``size`` samples of the first one's shape, on the meta device."""
    return dataclasses.replace(
        batch,
        variables=batch.variables[:1] * size,
        keys=batch.keys[:1] * size,
        seeds=batch.seeds[:1].repeat(size),
        tensors={name: t.new_empty((size, *t.shape[1:]), device="meta") for name, t in batch.tensors.items()},
    )


def flops_a_sample(twin: Twin, batch: Batch) -> int:
    """Floating point operations of one sample's forward and backward; only the shapes of ``batch`` matter."""
    size = len(batch)
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION_BACKWARD) as counter:
        loss, _ = twin.task.loss(twin.module, batch_of(batch, size))
        loss.backward()
    for parameter in twin.module.parameters():
        parameter.grad = None
    return round(counter.get_total_flops() / size)


def _twice_forward(_grad: Any, query: Any, key: Any, value: Any, *_rest: Any, **_kwargs: Any) -> int:
    """Four products of T x T: torch's own rule counts a fifth, which the fused kernel computes again."""
    (batch, heads, tokens, width), keys = query, key[2]
    return int(batch * heads * 4 * tokens * keys * (width + value[-1]))


_ATTENTION_BACKWARD = {torch.ops.aten._scaled_dot_product_flash_attention_backward: _twice_forward}

# TFLOP/s by the vendors' data sheets: (a word of the device's name, bf16 on matrix units without sparsity, fp32 without TF32).
# The first that fits counts, so the longer names stand first. 0 where the device has no such unit.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),  # NVIDIA GB200 NVL72 data sheet, each of its GPUs (5000 with sparsity)
    ("B200", 2250.0, 75.0),  # NVIDIA HGX B200 data sheet (4500 with sparsity)
    ("GH200", 989.5, 67.0),  # NVIDIA GH200 data sheet (its GPU is that of the H100 SXM)
    ("H200 NVL", 835.5, 60.0),  # NVIDIA H200 data sheet (1671 with sparsity)
    ("H200", 989.5, 67.0),  # NVIDIA H200 data sheet (1979 with sparsity)
    ("H100 NVL", 835.5, 60.0),  # NVIDIA H100 data sheet (1671 with sparsity)
    ("H100 PCIe", 756.5, 51.0),  # NVIDIA H100 PCIe data sheet (1513 with sparsity)
    ("H100", 989.5, 67.0),  # NVIDIA H100 data sheet, SXM (1979 with sparsity); its name is "H100 80GB HBM3"
    ("A100", 312.0, 19.5),  # NVIDIA A100 data sheet, SXM and PCIe alike
    ("A30", 165.0, 10.3),  # NVIDIA A30 data sheet
    ("A40", 149.7, 37.4),  # NVIDIA A40 data sheet
    ("A10", 125.0, 31.2),  # NVIDIA A10 data sheet
    ("L40S", 362.05, 91.6),  # NVIDIA L40S data sheet
    ("L40", 181.05, 90.5),  # NVIDIA L40 data sheet
    ("L4", 121.0, 30.3),  # NVIDIA L4 data sheet (242 with sparsity)
    ("RTX 6000 Ada", 364.2, 91.1),  # NVIDIA RTX 6000 Ada data sheet (1457 in fp8 with sparsity, a quarter)
    ("RTX A6000", 154.8, 38.7),  # NVIDIA RTX A6000 data sheet (309.7 with sparsity)
    ("RTX 5090", 209.5, 104.8),  # NVIDIA RTX Blackwell architecture paper, fp32 accumulation
    ("RTX 4090", 165.2, 82.6),  # NVIDIA Ada architecture paper, fp32 accumulation
    ("RTX 3090", 71.0, 35.6),  # NVIDIA GA102 architecture paper, fp32 accumulation
    ("V100S", 0.0, 16.4),  # NVIDIA V100 data sheet; no bf16 units
    ("V100-SXM", 0.0, 15.7),
    ("V100", 0.0, 14.0),  # PCIe
    ("MI325X", 1307.4, 163.4),  # AMD Instinct MI325X data sheet
    ("MI300X", 1307.4, 163.4),  # AMD Instinct MI300X data sheet
)


def peak_tflops(device: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """The dense peak of a GPU by its name, TFLOP/s; None where it is not known (a part of a GPU, a CPU, another card)."""
    if "MIG" in device:
        return None
    words = device.replace("-", " ").split()
    for name, bf16, fp32 in PEAKS:
        wanted = name.replace("-", " ").split()
        if any(_fit(words[i : i + len(wanted)], wanted) for i in range(len(words))):
            return (bf16 if precision == "bf16" else fp32) or None
    return None


def _fit(words: list[str], wanted: list[str]) -> bool:
    """Word by word; SXM fits SXM2 and SXM3 as well."""
    return len(words) == len(wanted) and all(
        w.lower() == k.lower() or (k == "SXM" and w.startswith("SXM")) for w, k in zip(words, wanted, strict=True)
    )
