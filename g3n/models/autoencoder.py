"""The baseline tokenizer: MONAI's variational autoencoder on voxels (Rombach 2022, arXiv 2112.10752; Pinaya 2022, arXiv 2209.07162)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderConfig:
    """A volume becomes ``latent_channels`` numbers at every ``stride``-th voxel along each axis."""

    latent_channels: int = 4
    channels: tuple[int, ...] = (32, 64, 128, 128)  # one a resolution, halved between them
    res_blocks: int = 1  # of each resolution
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if self.latent_channels < 1 or self.res_blocks < 1 or self.norm_groups < 1 or not self.channels:
            raise ValueError(
                f"latent_channels {self.latent_channels}, res_blocks {self.res_blocks} and norm_groups {self.norm_groups} "
                f"must be >= 1 and channels {self.channels} not empty"
            )
        if any(c < 1 or c % self.norm_groups for c in self.channels):
            raise ValueError(f"channels {self.channels} must be divisible by norm_groups {self.norm_groups}")

    @property
    def stride(self) -> int:
        return 2 ** (len(self.channels) - 1)


class Autoencoder(nn.Module):
    """MONAI's ``AutoencoderKL`` without attention, with the posterior's noise from outside."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        from monai.networks.nets import AutoencoderKL  # takes a second to import

        self.net = AutoencoderKL(
            spatial_dims=3,
            num_res_blocks=(config.res_blocks,) * len(config.channels),
            channels=config.channels,
            attention_levels=(False,) * len(config.channels),
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_groups,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        )

    def encode(self, x_BXYZ: Tensor) -> tuple[Tensor, Tensor]:
        """z-scored volumes -> mean and standard deviation of the posterior, float32 [B, C, x, y, z]."""
        mean, std = self.net.encode(x_BXYZ[:, None].to(self._dtype))
        return mean.float(), std.float()

    def decode(self, z_BCxyz: Tensor) -> Tensor:
        """Latents -> z-scored volumes float32 [B, X, Y, Z]."""
        return self.net.decode(z_BCxyz.to(self._dtype))[:, 0].float()

    def forward(self, x_BXYZ: Tensor, noise_BCxyz: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, posterior mean and standard deviation. Without ``noise_BCxyz`` the posterior's mean is decoded."""
        mean, std = self.encode(x_BXYZ)
        z = mean if noise_BCxyz is None else mean + std * noise_BCxyz
        return self.decode(z), mean, std

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype


def kl_to_standard_normal(mean_BCxyz: Tensor, std_BCxyz: Tensor) -> Tensor:
    """KL divergence of each sample's posterior from N(0, 1), nats summed over its latent, float32 [B]."""
    variance = std_BCxyz.square()
    return 0.5 * (mean_BCxyz.square() + variance - variance.log() - 1).flatten(1).sum(1)
