"""What a rank owns under ZeRO: its pieces of the fp32 master weights and of the optimizer's moments, by place in each parameter.

A piece is a run of numbers of one flattened parameter. Stages 1, 2 and 3 cut parameters differently; beyond this file nobody knows how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """The numbers ``start : start + numel`` of flattened parameter ``name``: ``offset : offset + numel`` of ``flat``."""

    name: str
    start: int
    numel: int
    flat: Tensor  # float32, the rank's master weights of a whole optimizer group
    offset: int

    @property
    def weight(self) -> Tensor:
        """Flat view [numel] of the master weights; it follows training."""
        return self.flat.detach().narrow(0, self.offset, self.numel)


def owned(engine: Any) -> list[Piece]:
    """This rank's pieces, in the model's order; a parameter it owns nothing of is absent."""
    zero = engine.optimizer
    found = []
    for name, parameter in engine.module.named_parameters():
        if engine.zero_optimization_stage() == 3:  # equal parts, the last one padded
            group, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank() * part
            numel = min(part, parameter.ds_numel - start)
            flat = zero.fp32_partitioned_groups_flat[group]
        elif (mapping := parameter._hp_mapping) is not None:
            start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
        else:
            continue
        if numel > 0:
            found.append(Piece(name, start, numel, flat, offset))
    return found


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The whole shape of each parameter, in the model's order."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def moment(engine: Any, piece: Piece, name: str) -> Tensor:
    """Flat view [numel] of one of ``MOMENTS``; zeros before the first step."""
    state = engine.optimizer.optimizer.state.get(piece.flat)
    if not state:
        return torch.zeros_like(piece.weight)
    whole: Tensor = state[name]
    return whole.detach().narrow(0, piece.offset, piece.numel)


def optimizer_steps(engine: Any) -> int:
    """How many steps the optimizer's bias correction has counted."""
    return max((int(state["step"]) for state in engine.optimizer.optimizer.state.values() if state), default=0)


@torch.no_grad()
def restore_moments(engine: Any, steps: int) -> None:
    """Make zero moments after ``steps`` steps wherever there are none, so that ``moment`` gives views to fill."""
    optimizer = engine.optimizer.optimizer
    for flat in {id(piece.flat): piece.flat for piece in owned(engine)}.values():
        state = optimizer.state[flat]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(flat)
        state["step"] = torch.tensor(float(steps), dtype=torch.float32)


@torch.no_grad()
def publish_weights(engine: Any) -> None:
    """Give every rank the parameters as the master weights now say. Collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        zero.update_lp_params()
        return
    for group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        if flat.numel():
            zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
