"""The kernels and attention that models call: the only door to ``kernels``."""

from __future__ import annotations

from kernels import (
    adaln_modulate,
    explain,
    gate_residual,
    gate_residual_adaln,
    masked_patch_loss,
    patchify3d,
    unpatchify3d,
)
from kernels.attention import attention
from kernels.attention import cache_path as attention_cache
from kernels.attention import obstacles as attention_obstacles
from kernels.attention import requested as attention_requested

__all__ = [
    "adaln_modulate",
    "attention",
    "attention_cache",
    "attention_obstacles",
    "attention_requested",
    "explain",
    "gate_residual",
    "gate_residual_adaln",
    "masked_patch_loss",
    "patchify3d",
    "unpatchify3d",
]
