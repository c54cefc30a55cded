"""Conditional diffusion transformer over projected tokens (Peebles 2023, arXiv 2212.09748): generator and forecaster."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n import ops
from g3n.flow import gaussian_velocity
from g3n.models.conditioning import Conditioning, Variable, VariableSet
from g3n.models.gaussian import GaussianStart
from g3n.models.layers import MLP, Attention, init_linear, run_blocks, sincos_positions


@dataclass(frozen=True)
class DiTConfig:
    tokens: tuple[int, int, int] = (10, 12, 10)
    channels: int = 32
    width: int = 1152
    depth: int = 12
    heads: int = 16
    mlp: int = 4608
    qk_norm: bool = True
    gaussian_skip: bool = False  # predict the velocity beyond that of normal data; helps short runs (docs/log.md)
    gaussian_rank: int = (
        0  # directions in which latents vary, see models/gaussian.py; 0: standard normal, or a mean change alone
    )
    head_depth: int = 0  # blocks of a wide head after the trunk; 0 is none, see WideHead
    head_width: int = 0  # of its tokens; heads as wide as the trunk's, an MLP in the trunk's proportion
    variables: dict[str, Variable] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.width, self.heads) < 1 or self.width % self.heads or self.width % 6:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads} and by 6 (3D positions)")
        if self.head_depth < 0 or bool(self.head_depth) != bool(self.head_width):
            raise ValueError(f"head_depth {self.head_depth} and head_width {self.head_width}: give both, or 0 for both")
        each = self.width // self.heads
        if self.head_width % each or self.head_width % 6:
            raise ValueError(
                f"head_width {self.head_width} must be divisible by width / heads = {each} and by 6 (3D positions)"
            )
        if self.gaussian_rank < 0 or (self.gaussian_rank and not self.gaussian_skip):
            raise ValueError(f"gaussian_rank {self.gaussian_rank} must be >= 0, and 0 without gaussian_skip")
        if not self.variables:
            raise ValueError("variables is empty; give the table of clinical variables (see configs/dit.yaml)")


class DiTBlock(nn.Module):
    """adaLN-Zero block: attention and MLP, each modulated before and gated after by the conditioning vector.

    The vector is one a sample [B, D] or, in a wide head, one a token [B, T, D].
    """

    def __init__(self, width: int, heads: int, mlp: int, qk_norm: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, qkv_bias=True, qk_norm=qk_norm)
        self.mlp = MLP(width, mlp)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BTD: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        h_BTD = self.attention(ops.adaln_modulate(x_BTD, shift1, scale1))
        x_BTD, h_BTD = ops.gate_residual_adaln(x_BTD, h_BTD, gate1, shift2, scale2)
        return ops.gate_residual(x_BTD, self.mlp(h_BTD), gate2)


class WideHead(nn.Module):
    """A shallow, wide transformer that reads the noisy latents again, each token modulated by what the trunk made of it.

    A network narrower than its tokens' channels cannot carry their noise through to the velocity; this part can, at less cost
    than a wide trunk (DDT: Wang 2025, arXiv 2504.05741; RAE, arXiv 2510.11690, with 2 blocks of 2048 for 768 channels). The
    published 32 channels are far from that: it is for tokenizers that project less.
    """

    positions: Tensor

    def __init__(self, config: DiTConfig, source_channels: int) -> None:
        super().__init__()
        self.recompute = False
        width = config.head_width
        heads, mlp = width * config.heads // config.width, width * config.mlp // config.width
        self.register_buffer("positions", sincos_positions(config.tokens, width))
        self.embed = nn.Linear(config.channels + source_channels, width)
        self.condition = nn.Linear(config.width, width)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp, config.qk_norm) for _ in range(config.head_depth))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.predict = nn.Linear(width, config.channels)

    def forward(self, inputs_BNC: Tensor, trunk_BND: Tensor) -> Tensor:
        c_BNW = F.silu(self.condition(trunk_BND))
        x_BNW = self.embed(inputs_BNC) + self.positions.to(inputs_BNC.dtype)
        x_BNW = run_blocks(self.blocks, x_BNW, self.recompute, c_BNW)
        shift_BNW, scale_BNW = self.final_modulation(c_BNW).chunk(2, dim=-1)
        return self.predict(ops.adaln_modulate(x_BNW, shift_BNW, scale_BNW))


class DiT(nn.Module):
    """Velocity of the flow at (x_t, t) under the clinical variables.

    A forecaster (``source_channels`` > 0) also reads the baseline's latents, joined to x_t along the channels; ``noise`` and
    ``gate_years`` are those of its path (tasks/forecast.py), which only ``start`` asks for.
    ``start`` is filled by the task that trains it. ``latent_mean`` and ``latent_scale`` only travel with the weights: LatentSpace reads them from the checkpoint.
    """

    positions: Tensor
    latent_mean: Tensor
    latent_scale: Tensor

    def __init__(
        self, config: DiTConfig, source_channels: int = 0, noise: float = 1.0, gate_years: float | None = None
    ) -> None:
        super().__init__()
        self.recompute = False
        self.gaussian_skip = config.gaussian_skip
        width = config.width
        n_tokens = config.tokens[0] * config.tokens[1] * config.tokens[2]
        self.register_buffer("latent_mean", torch.zeros(n_tokens, config.channels))
        self.register_buffer("latent_scale", torch.ones(config.channels))
        self.register_buffer("positions", sincos_positions(config.tokens, width))
        self.embed = nn.Linear(config.channels + source_channels, width)
        self.conditioning = Conditioning(VariableSet(config.variables), width)
        self.start = (
            GaussianStart(
                VariableSet(config.variables),
                n_tokens,
                config.channels,
                config.gaussian_rank,
                source_channels > 0,
                noise,
                gate_years,
            )
            if config.gaussian_rank or (config.gaussian_skip and source_channels)
            else None
        )
        # the conditions also scale the positions: a first way for age to act here and not there
        self.place = nn.Linear(width, width)
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.heads, config.mlp, config.qk_norm) for _ in range(config.depth)
        )
        self.final_modulation = nn.Linear(width, 2 * width)
        self.head = WideHead(config, source_channels) if config.head_depth else None
        if self.head is None:
            self.predict = nn.Linear(width, config.channels)
        self._init_weights()

    def _init_weights(self) -> None:
        embeddings = {id(m) for m in self.conditioning.modules()}
        for module in self.modules():
            if id(module) not in embeddings:
                init_linear(module)
        for name, module in self.named_modules():
            if name.endswith(("modulation", "predict")) and isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        """x_BNC standardized latents at time t_B in [0, 1]; cond_BV from VariableSet.encode. Returns float32 [B, N, C]."""
        dtype = self.embed.weight.dtype
        inputs = x_BNC if source_BNC is None else torch.cat([x_BNC, source_BNC], dim=-1)
        c_BD = self.conditioning(t_B, cond_BV)
        positions_BND = self.positions.to(dtype) * (1 + self.place(c_BD))[:, None]
        inputs = inputs.to(dtype)
        x_BND = self.embed(inputs) + positions_BND
        x_BND = run_blocks(self.blocks, x_BND, self.recompute, c_BD)
        shift_BD, scale_BD = self.final_modulation(c_BD).chunk(2, dim=-1)
        x_BND = ops.adaln_modulate(x_BND, shift_BD, scale_BD)
        if self.head is None:
            velocity_BNC = self.predict(x_BND).float()
        else:  # time and variables reach it directly as well
            velocity_BNC = self.head(inputs, x_BND + c_BD[:, None]).float()
        if self.start is not None:
            baseline_BNC = None if source_BNC is None else source_BNC[..., : x_BNC.shape[-1]]
            return velocity_BNC + self.start(x_BNC, t_B, cond_BV, baseline_BNC)
        return velocity_BNC + gaussian_velocity(x_BNC, t_B) if self.gaussian_skip else velocity_BNC
