"""Full-precision weights under ZeRO: their local fragments, their average over steps, and the whole of them on rank 0.

Each rank owns a piece of each parameter's fp32 master copy. The average (EMA) lives on these pieces, so keeping it costs no
communication; only writing a checkpoint gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Fragments = dict[str, Tensor]  # by parameter name; a parameter this rank owns nothing of is absent


def fragments(engine: Any) -> Fragments:
    """This rank's pieces of the fp32 master weights, flat views that follow training."""
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_fp32_param

        found = {name: safe_get_local_fp32_param(p) for name, p in engine.module.named_parameters()}
        return {name: piece.flatten() for name, piece in found.items() if piece is not None}
    mapped = {name: p._hp_mapping for name, p in engine.module.named_parameters()}
    return {name: m.get_hp_fragment().flatten() for name, m in mapped.items() if m is not None}


@torch.no_grad()
def start_average(engine: Any) -> Fragments:
    """The average before the first step: the weights themselves."""
    return {name: piece.detach().clone() for name, piece in fragments(engine).items()}


@torch.no_grad()
def update_average(average: Fragments, engine: Any, decay: float, step: int) -> None:
    """average <- d average + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)), after step ``step`` (from 0).

    The short memory at the start keeps the initial weights out of a short run's average.
    """
    d = min(decay, (1 + step) / (10 + step))
    current = fragments(engine)
    names = list(average)
    torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - d)


@torch.no_grad()
def gather(engine: Any, pieces: Fragments) -> dict[str, Tensor] | None:
    """Whole float32 parameters on the CPU of rank 0 (None elsewhere), buffers included. Collective."""
    whole: dict[str, Tensor] = {}
    world, main = dist.get_world_size(), dist.get_rank() == 0
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 3:
            parts = [torch.empty_like(pieces[name]) for _ in range(world)]
            dist.all_gather(parts, pieces[name].contiguous())
            full = torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
        else:
            full = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if name in pieces:
                _span(parameter, full).copy_(pieces[name])
            dist.all_reduce(full)
            full = full.view(parameter.shape)
        if main:
            whole[name] = full.cpu().clone()
    whole.update({name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()})
    return whole if main else None


@torch.no_grad()
def scatter(engine: Any, whole: Mapping[str, Tensor]) -> Fragments:
    """The inverse of ``gather``: this rank's pieces of whole parameters."""
    rank, pieces = dist.get_rank(), start_average(engine)
    for name, parameter in engine.module.named_parameters():
        if name not in pieces:
            continue
        piece, flat = pieces[name], whole[name].flatten()
        if engine.zero_optimization_stage() == 3:
            mine = flat[rank * piece.numel() : (rank + 1) * piece.numel()]
            piece[: mine.numel()].copy_(mine)  # the last rank's piece is padded
        else:
            piece.copy_(_span(parameter, flat))
    return pieces


def _span(parameter: nn.Parameter, flat: Tensor) -> Tensor:
    """The part of a flat parameter that this rank owns under ZeRO-1/2."""
    address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
    return flat.narrow(0, address.start, address.numel)
