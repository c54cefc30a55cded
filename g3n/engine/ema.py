"""The average of the weights over steps (EMA). It lives on the pieces of the master weights a rank owns: no communication."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from g3n.engine.pieces import owned

Average = dict[str, Tensor]  # float32, flat, by parameter name: the piece this rank owns


@torch.no_grad()
def start_average(engine: Any) -> Average:
    """The average before the first step: the weights themselves."""
    return {piece.name: piece.weight.clone() for piece in owned(engine)}


@torch.no_grad()
def update_average(average: Average, engine: Any, decay: float, step: int) -> None:
    """average <- d average + (1 - d) weights with d = min(decay, (1 + step) / (10 + step)), after step ``step`` (from 0).

    The short memory at the start keeps the initial weights out of a short run's average.
    """
    d = min(decay, (1 + step) / (10 + step))
    current = owned(engine)
    torch._foreach_lerp_([average[p.name] for p in current], [p.weight for p in current], 1 - d)
