"""torch.compile of a model's transformer blocks, with the work-around for wrong gradients that some versions of torch need."""

from __future__ import annotations

import logging

import torch
from torch import nn

log = logging.getLogger(__name__)

# https://github.com/pytorch/pytorch/issues/193061: reductions in mixed order give wrong gradients of chained modulated layer norms
WRONG_GRADIENTS = ((2, 10), (2, 13))  # first and last version


def needs_work_around(version: str = torch.__version__) -> bool:
    major, minor = (int(part) for part in version.split(".")[:2])
    return WRONG_GRADIENTS[0] <= (major, minor) <= WRONG_GRADIENTS[1]


def guard_gradients() -> bool:
    """Switch inductor's mix-order reductions off where they give wrong gradients; True where that was needed."""
    if not needs_work_around():
        return False
    import torch._inductor.config as inductor

    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    return True


def compile_blocks(model: nn.Module) -> int:
    """Compile, in place, every module of every list named ``blocks``; returns how many. Parameter names do not change."""
    if guard_gradients():
        log.info("torch %s: TORCHINDUCTOR_MIX_ORDER_REDUCTION=0 is set (pytorch issue 193061)", torch.__version__)
    found = 0
    for module in model.modules():
        blocks = getattr(module, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(dynamic=False)
                found += 1
    return found
