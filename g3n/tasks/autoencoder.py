"""The baseline of phase 2: a variational autoencoder on voxels, trained as the tokenizer is and with as many latent numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from g3n.config import G3nError
from g3n.latent import normalize
from g3n.models.autoencoder import Autoencoder, AutoencoderConfig, kl_to_standard_normal
from g3n.stream.index import ShardIndex
from g3n.stream.samples import Batch
from g3n.tasks.base import picture, randn_like_samples, volume_artifact
from g3n.tasks.voxel_losses import brain_mse


@dataclass(frozen=True)
class AutoencoderTaskConfig:
    net: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    kl_weight: float = 1e-6  # of nats summed over a latent, beside the mean error of a voxel

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise ValueError(f"kl_weight {self.kl_weight} must be >= 0")


class AutoencoderTask:
    """Voxel L1 through a sampled latent, and its KL divergence from N(0, 1)."""

    Config = AutoencoderTaskConfig
    name = "autoencoder"
    unit = "volumes"
    kind: Literal["volume"] = "volume"
    history = 1

    def __init__(self, config: AutoencoderTaskConfig, index: ShardIndex) -> None:
        stride = config.net.stride
        if any(n % stride for n in index.grid.shape):
            raise G3nError(
                f"shards '{index.url}' hold volumes of {tuple(index.grid.shape)}, but {len(config.net.channels)} entries of "
                f"model.net.channels need axes divisible by {stride}; give fewer or pack on another grid"
            )
        self.config, self.index = config, index
        self.latent_shape = (config.net.latent_channels, *(n // stride for n in index.grid.shape))

    def build(self) -> nn.Module:
        return Autoencoder(self.config.net)

    def frozen(self) -> Mapping[str, nn.Module]:
        return {}

    def artifact(self) -> Mapping[str, Any]:
        return volume_artifact(self.index)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        target = normalize(*(batch.tensors[k] for k in ("volume", "mean", "rstd")))
        noise = randn_like_samples(batch.seeds, self.latent_shape).to(target.device)
        made, mean, std = model(target, noise)
        voxel, kl = (made - target).abs().mean(dim=(1, 2, 3)), kl_to_standard_normal(mean, std)
        return (voxel + self.config.kl_weight * kl).mean(), {"voxel": voxel.detach(), "kl": kl.detach()}

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The figures of the decoder task, of the posterior's mean."""
        made, target = self._outputs(model, batch)
        return {"voxel": (made - target).abs().mean(dim=(1, 2, 3)), "brain_mse": brain_mse(made, target)}

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        made, target = self._outputs(model, batch)
        return {"reconstruction": picture(torch.stack([target, made], dim=1))}

    def _outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        target = normalize(*(batch.tensors[k] for k in ("volume", "mean", "rstd")))
        return model(target)[0], target
