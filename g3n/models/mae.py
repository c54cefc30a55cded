"""3D masked autoencoder (He 2022, arXiv 2111.06377), the encoder of BrainG3N (arXiv 2606.19651)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from g3n import ops
from g3n.models.layers import Block, init_linear, run_blocks, sincos_positions


@dataclass(frozen=True)
class MAEConfig:
    volume_shape: tuple[int, int, int] = (160, 192, 160)
    patch: int = 16
    width: int = 1152
    depth: int = 12
    heads: int = 16
    mlp: int = 4608
    decoder_width: int = 1152
    decoder_depth: int = 6
    decoder_heads: int = 16
    decoder_mlp: int = 4608

    def __post_init__(self) -> None:
        if min(self.patch, self.width, self.heads, self.decoder_width, self.decoder_heads, *self.volume_shape) < 1:
            raise ValueError("volume_shape, patch, widths and heads must be at least 1")
        if any(n % self.patch for n in self.volume_shape):
            raise ValueError(f"volume_shape {self.volume_shape} must be divisible by patch {self.patch} on every axis")
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % heads or width % 6:
                raise ValueError(f"{name} {width} must be divisible by its heads ({heads}) and by 6 (3D positions)")

    @property
    def tokens(self) -> tuple[int, int, int]:
        """Tokens along each axis."""
        x, y, z = (n // self.patch for n in self.volume_shape)
        return x, y, z


class Encoder(nn.Module):
    """ViT on the chosen patches of a volume, with a CLS token that is stripped from the output."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.recompute = False
        self.embed = nn.Linear(config.patch**3, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("positions", sincos_positions(config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(
        self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor, index_BK: Tensor | None = None, cls: bool = False
    ) -> Tensor:
        """Features of the patches ``index_BK`` (all where None).

        volume_BXYZ is in stored units (any integer or float dtype), normalized as (v - mean) * rstd with background 0.
        Returns [B, K, D], or [B, 1 + K, D] with the CLS token first where ``cls``.
        """
        dtype = self.embed.weight.dtype
        patches_BKP = ops.patchify3d(volume_BXYZ, self.patch, index_BK, mean_B, rstd_B, out_dtype=dtype)
        positions_1ND = self.positions.to(dtype)
        positions_BKD = positions_1ND if index_BK is None else positions_1ND[0][index_BK]
        x_BKD = self.embed(patches_BKP) + positions_BKD
        x_BTD = torch.cat([self.cls_token.expand(len(x_BKD), -1, -1).to(x_BKD.dtype), x_BKD], dim=1)
        x_BTD = self.norm(run_blocks(self.blocks, x_BTD, self.recompute))
        return x_BTD if cls else x_BTD[:, 1:]


class Decoder(nn.Module):
    """Light ViT that sees the encoded tokens in place and a mask token elsewhere, and predicts every patch."""

    positions: Tensor

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.recompute = False
        width = config.decoder_width
        self.embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(config.tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, config.decoder_heads, config.decoder_mlp) for _ in range(config.decoder_depth)
        )
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, config.patch**3)

    def forward(self, x_BTD: Tensor, index_BK: Tensor, places_BM: Tensor | None = None) -> Tensor:
        """x_BTD: CLS and the K encoded tokens; index_BK: their places.

        Returns the patches at ``places_BM``, [B, M, P], or at all N places where None.
        """
        x_BTD = self.embed(x_BTD)
        B, _, D = x_BTD.shape
        N = self.positions.shape[1]
        tokens_BND = self.mask_token.to(x_BTD.dtype).expand(B, N, D)
        tokens_BND = tokens_BND.scatter(1, index_BK[..., None].expand(-1, -1, D), x_BTD[:, 1:])
        tokens_BND = tokens_BND + self.positions.to(x_BTD.dtype)
        x_BTD = run_blocks(self.blocks, torch.cat([x_BTD[:, :1], tokens_BND], dim=1), self.recompute)
        x_BND = x_BTD[:, 1:]
        if places_BM is not None:  # before the head, whose rows are the widest of all
            x_BND = x_BND.gather(1, places_BM[..., None].expand(-1, -1, D))
        return self.predict(self.norm(x_BND))


class MAE(nn.Module):
    """Encoder and decoder of the pretraining stage."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(init_linear)
        nn.init.trunc_normal_(self.encoder.cls_token, std=0.02)
        nn.init.trunc_normal_(self.decoder.mask_token, std=0.02)

    def forward(
        self,
        volume_BXYZ: Tensor,
        mean_B: Tensor,
        rstd_B: Tensor,
        visible_BK: Tensor,
        places_BM: Tensor | None = None,
    ) -> Tensor:
        """Predicted normalized patches [B, M, P] at ``places_BM`` (all N places where None) from the visible ones."""
        return self.decoder(self.encoder(volume_BXYZ, mean_B, rstd_B, visible_BK, cls=True), visible_BK, places_BM)
