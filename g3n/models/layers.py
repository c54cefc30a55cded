"""Pieces shared by the MAE and the DiT: attention, MLP, positions, blocks with optional recomputation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from g3n import ops


class Attention(nn.Module):
    """Multi-head self-attention on [B, T, D]; qk-norm is an RMS norm of each head's queries and keys."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).unbind(2)
        q_BTHK = self.q_norm(q_BTHK).to(v_BTHK.dtype)
        k_BTHK = self.k_norm(k_BTHK).to(v_BTHK.dtype)
        return self.out(ops.attention(q_BTHK, k_BTHK, v_BTHK).reshape(B, T, D))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block (Dosovitskiy 2021)."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


def run_blocks(blocks: Iterable[nn.Module], x_BTD: Tensor, recompute: bool, *context: Any) -> Tensor:
    """Apply ``blocks`` in turn; with ``recompute`` their activations are dropped and computed again in the backward."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x_BTD = checkpoint(block, x_BTD, *context, use_reentrant=False)
        else:
            x_BTD = block(x_BTD, *context)
    return x_BTD


def sincos_positions(tokens: tuple[int, int, int], width: int, temperature: float = 10_000.0) -> Tensor:
    """Fixed 3D sin-cos positions, float32 [1, N, width], tokens in x-major order; same layout as MONAI's (y, x, z).

    Raises ValueError where width is not divisible by 6.
    """
    if width % 6:
        raise ValueError(f"width {width} must be divisible by 6 for 3D sin-cos positions")
    omega = temperature ** -(torch.arange(width // 6, dtype=torch.float32) / (width // 6))
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in tokens), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in (axes[1], axes[0], axes[2])]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None]


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear, as in MAE and DiT."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
