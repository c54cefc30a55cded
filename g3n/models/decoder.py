"""The tokenizer of BrainG3N: linear projection P of frozen encoder features and a 3D CNN decoder back to voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n import ops


@dataclass(frozen=True)
class TokenizerConfig:
    latent_channels: int = 32
    decoder_channels: tuple[int, ...] = (512, 256, 128, 64)  # one a doubling: log2(patch) entries
    mask_head: bool = False  # a second output channel tells brain from background; the published decoder has none
    linear_path: bool = False  # adds each token's own linear image to the CNN's; short runs start 5 dB up (docs/log.md)
    place_rank: int = (
        0  # linear_path: what each place of the brain adds to that image, in so many directions of a patch
    )
    place_neighbors: bool = False  # it looks at the tokens on its six sides too

    def __post_init__(self) -> None:
        if self.place_rank < 0 or (self.place_rank and not self.linear_path):
            raise ValueError(f"place_rank {self.place_rank} must be >= 0, and 0 without linear_path")
        if self.place_neighbors and not self.place_rank:
            raise ValueError("place_neighbors needs place_rank, the number of directions in which places draw")
        if self.latent_channels < 1 or any(c % 8 for c in self.decoder_channels):
            raise ValueError(
                f"latent_channels {self.latent_channels} must be positive and decoder_channels {self.decoder_channels} "
                "divisible by 8 (group norm)"
            )


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3x3 convolution, twice, around a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def pixel_shuffle3d(x: Tensor) -> Tensor:
    """[B, 8C, X, Y, Z] -> [B, C, 2X, 2Y, 2Z] (Shi 2016, in 3D)."""
    B, C8, X, Y, Z = x.shape
    x = x.view(B, C8 // 8, 2, 2, 2, X, Y, Z).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(B, C8 // 8, 2 * X, 2 * Y, 2 * Z)


class CNNDecoder(nn.Module):
    """Latents [B, C, x, y, z] -> [B, 1 or 2, X, Y, Z], doubling the resolution once a stage."""

    def __init__(self, config: TokenizerConfig, patch: int) -> None:
        super().__init__()
        channels = config.decoder_channels
        if 2 ** len(channels) != patch:
            raise ValueError(f"decoder_channels has {len(channels)} stages but patch {patch} needs log2({patch})")
        self.stem = nn.Conv3d(config.latent_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(c) for c in channels)
        out = 2 if config.mask_head else 1
        widths = [*channels[1:], max(8, channels[-1] // 2)]
        self.up = nn.ModuleList(nn.Conv3d(c, 8 * n, 3, padding=1) for c, n in zip(channels, widths, strict=True))
        self.head = nn.Conv3d(widths[-1], out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.stem(z)
        for block, up in zip(self.blocks, self.up, strict=True):
            x = pixel_shuffle3d(up(block(x)))
        return self.head(F.silu(x))


class LinearPath(nn.Module):
    """Each latent straight to its patch, plus the mean patch of its place: [B, N, C] -> [B, 1, X, Y, Z].

    In an atlas the same place is the same anatomy in everyone. With ``place_rank`` each place adds a linear image of its own,
    of rank ``place_rank`` over all places, and with ``neighbors`` of the tokens beside it too: [N, 7C, R] instead of [N, C, R].
    """

    def __init__(
        self, channels: int, tokens: tuple[int, int, int], patch: int, place_rank: int = 0, neighbors: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.patch, self.neighbors = tokens, patch, neighbors
        self.to_patch = nn.Linear(channels, patch**3, bias=False)
        self.mean = nn.Parameter(torch.zeros(math.prod(tokens), patch**3))
        if place_rank:
            self.place_NCR = nn.Parameter(
                torch.zeros(math.prod(tokens), (7 if neighbors else 1) * channels, place_rank)
            )
            self.basis_RP = nn.Parameter(torch.zeros(place_rank, patch**3))
        else:
            self.register_parameter("place_NCR", None)

    def forward(self, z_BNC: Tensor) -> Tensor:
        x_BNP = self.to_patch(z_BNC) + self.mean
        if self.place_NCR is not None:
            x_BNP = x_BNP + torch.einsum("bnc,ncr->bnr", self.seen(z_BNC), self.place_NCR) @ self.basis_RP
        return ops.unpatchify3d(x_BNP, self.patch, self.tokens)[:, None]

    def seen(self, z_BNC: Tensor) -> Tensor:
        """What each place's own image is drawn from: [B, N, C], with neighbors [B, N, 7C], zeros where there is none."""
        return with_neighbors(z_BNC, self.tokens) if self.neighbors else z_BNC


def with_neighbors(z_BNC: Tensor, tokens: tuple[int, int, int]) -> Tensor:
    """[B, N, C] -> [B, N, 7C]: each token, then those before and after it along x, y and z, zeros beyond the edge."""
    z_BXYZC = z_BNC.unflatten(1, tokens)
    padded = F.pad(z_BXYZC, (0, 0, 1, 1, 1, 1, 1, 1))
    parts = [z_BXYZC]
    for axis, length in enumerate(tokens, 1):
        inner = padded
        for other, n in enumerate(tokens, 1):
            inner = inner if other == axis else inner.narrow(other, 1, n)
        parts += [inner.narrow(axis, 0, length), inner.narrow(axis, 2, length)]
    return torch.cat(parts, dim=-1).flatten(1, 3)


class Tokenizer(nn.Module):
    """P (width -> C) and the CNN decoder. Trained with the encoder frozen."""

    def __init__(self, config: TokenizerConfig, encoder_width: int, tokens: tuple[int, int, int], patch: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.projection = nn.Linear(encoder_width, config.latent_channels, bias=False)
        # z' is divided by one number so that the decoder sees unit scale whatever the encoder's features are
        self.register_buffer("input_scale", torch.ones(()))
        self.decoder = CNNDecoder(config, patch)
        path = (config.latent_channels, tokens, patch, config.place_rank, config.place_neighbors)
        self.linear = LinearPath(*path) if config.linear_path else None
        self.mask_linear = LinearPath(*path) if config.linear_path and config.mask_head else None
        # of ``spread``; only where training adds noise to z'
        self.register_buffer("feature_spread", None)

    input_scale: Tensor
    feature_spread: Tensor | None

    def decode(self, z_BNC: Tensor) -> Tensor:
        """Raw projected tokens [B, N, C] -> [B, 1 or 2, X, Y, Z]: z-scored intensities and, if any, brain logits."""
        z_BNC = (z_BNC / self.input_scale).to(self.decoder.stem.weight.dtype)
        output = self.decoder(z_BNC.transpose(1, 2).unflatten(2, self.tokens))
        paths = [path(z_BNC) for path in (self.linear, self.mask_linear) if path is not None]
        return output + torch.cat(paths, dim=1) if paths else output

    @torch.no_grad()
    def channel_scale(self) -> Tensor:
        """[C]: the standard deviation that z' has around the mean of its place, as P now is. P cannot outgrow the noise."""
        assert self.feature_spread is not None
        # through the module's forward: ZeRO-3 gathers its weight nowhere else
        return self.projection(self.feature_spread.to(self.projection.weight.dtype)).float().norm(dim=0)

    def forward(self, features_BND: Tensor, noise_BNC: Tensor | None = None) -> Tensor:
        """Frozen encoder features [B, N, D] -> decoder output. ``noise_BNC`` is added to z' in units of ``channel_scale``."""
        z_BNC = self.projection(features_BND.to(self.projection.weight.dtype))
        if noise_BNC is not None:
            z_BNC = z_BNC + (noise_BNC * self.channel_scale()).to(z_BNC.dtype)
        return self.decode(z_BNC)


TRAINING_ONLY = (
    "feature_spread",
    "discriminator.",
)  # beginnings of names in a checkpoint that the finished tokenizer has no use for


def fix(linear: nn.Linear) -> None:
    """Make its weight a buffer of the same name: it is saved like a parameter, and no optimizer sees it."""
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)


def to_volume(output: Tensor) -> Tensor:
    """Decoder output [B, 1 or 2, X, Y, Z] -> z-scored volume float32 [B, X, Y, Z], background 0 where it is known."""
    volume = output[:, 0].float()
    return volume * (output[:, 1] > 0) if output.shape[1] == 2 else volume
