"""Phase 2: the tokenizer. The encoder stays frozen; P and the CNN decoder learn to give the volume back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n import ops
from g3n.config import G3nError
from g3n.latent import normalize, open_encoder
from g3n.models.decoder import LinearPath, Tokenizer, TokenizerConfig, fix, to_volume
from g3n.models.discriminator import AdversarialTokenizer
from g3n.models.projection import Start, identity, image, pca, regression, spread
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch
from g3n.tasks.base import check_grid, mirrored, picture, randn_like_samples, volume_artifact
from g3n.tasks.voxel_losses import brain_mse, frequency_loss, gradient_loss, ssim_loss


@dataclass(frozen=True)
class DecoderTaskConfig:
    encoder: str  # the MAE run
    net: TokenizerConfig = field(default_factory=TokenizerConfig)
    projection: Literal["regression", "random", "pca", "identity"] = "regression"  # how P begins
    projection_trained: bool = True  # false keeps P as it begins; identity asks for it
    pooled_channels: int = 0  # channels of a regression that begin as what all places of a scan share: kept for probes
    init_volumes: int = 32  # training volumes that set P and the decoder's input scale before step 0
    kind: Literal["l1", "l2"] = "l1"  # of the voxel loss; l2 is what PSNR measures
    mask_weight: float = 0.1  # weight of the brain-mask loss; only with net.mask_head
    # none of what follows is published
    flip: float = 0.0  # share of training volumes that are turned left to right
    ssim_weight: float = 0.0  # of further losses (g3n/tasks/voxel_losses.py)
    gradient_weight: float = 0.0
    frequency_weight: float = 0.0
    adversarial_weight: float = 0.0  # of a patch discriminator's verdict (g3n/models/discriminator.py)
    adversarial_start: int = 0  # the step from which it is trained and asked
    latent_noise: float = 0.0  # standard deviation of noise on z' in training, in units of each channel's own

    def __post_init__(self) -> None:
        if self.init_volumes < 1 or self.mask_weight < 0:
            raise ValueError(f"init_volumes {self.init_volumes} must be >= 1 and mask_weight {self.mask_weight} >= 0")
        losses = ("ssim_weight", "gradient_weight", "frequency_weight", "adversarial_weight")
        for name in (*losses, "adversarial_start", "latent_noise", "flip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be >= 0")
        if self.flip > 1:
            raise ValueError(f"flip {self.flip} must lie in [0, 1]")
        if self.pooled_channels and self.projection != "regression":
            raise ValueError(
                f"pooled_channels {self.pooled_channels} are channels of projection regression, not {self.projection}"
            )
        if not 0 <= self.pooled_channels <= self.net.latent_channels:
            raise ValueError(
                f"pooled_channels {self.pooled_channels} must lie in 0 to net.latent_channels, {self.net.latent_channels}"
            )
        if self.projection == "identity" and self.projection_trained:
            raise ValueError("projection identity is not trained; set projection_trained false with it")


class DecoderTask:
    """Voxel loss through 32 channels a token."""

    Config = DecoderTaskConfig
    name = "decoder"
    unit = "volumes"
    kind: Literal["volume"] = "volume"
    history = 1

    def __init__(self, config: DecoderTaskConfig, index: ShardIndex) -> None:
        self.encoder, self.mae, run, self.encoder_fingerprint = open_encoder(config.encoder)
        check_grid(index, self.mae.volume_shape)
        if run.artifact["shards"] != index.fingerprint:
            raise G3nError(
                f"encoder '{config.encoder}' was trained on shards {run.artifact['shards']}, but '{index.url}' are "
                f"{index.fingerprint}; use the same shards for both stages"
            )
        most = {"regression": self.mae.patch**3, "pca": self.mae.width}.get(config.projection)
        channels = config.net.latent_channels
        if config.projection == "identity" and channels != self.mae.width:
            raise G3nError(
                f"model.projection identity keeps all {self.mae.width} features of encoder '{config.encoder}', but "
                f"model.net.latent_channels is {channels}; set it to {self.mae.width}"
            )
        if most is not None and channels > most:
            raise G3nError(
                f"model.net.latent_channels {channels} is more than the {most} that projection {config.projection} of "
                f"encoder '{config.encoder}' has; lower it"
            )
        if config.net.place_rank > self.mae.patch**3:
            raise G3nError(
                f"model.net.place_rank {config.net.place_rank} is more than the {self.mae.patch**3} voxels of a patch; lower it"
            )
        self.config, self.index = config, index

    def build(self) -> nn.Module:
        config = self.config
        shape = (config.net, self.mae.width, self.mae.tokens, self.mae.patch)
        net = AdversarialTokenizer(*shape, config.adversarial_start) if config.adversarial_weight else Tokenizer(*shape)
        if config.projection != "random" or config.latent_noise:
            features, patches = self._seen()
            if config.projection != "random":
                start = _start(config, features, patches)
                _begin(net, start, features, patches, config.net.place_rank)
            if config.latent_noise:
                net.feature_spread = spread(features)
        if not config.projection_trained:
            fix(net.projection)
        return net

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"encoder": self.encoder}

    def artifact(self) -> Mapping[str, Any]:
        return {**volume_artifact(self.index), "encoder": self.encoder_fingerprint}

    @torch.no_grad()
    def _seen(self) -> tuple[Tensor, Tensor]:
        """Features [B, N, D] and normalized patches [B, N, P] of ``init_volumes`` training volumes, float32.

        With ``flip`` each of them is there mirrored too.
        """
        features, patches, done = [], [], 0
        device = next(self.encoder.parameters()).device
        batches = eval_batches(self.index, None, "volume", "train", micro_batch=4, rank=0, world=1, seed=0)
        for batch in batches:
            volume, mean, rstd = (batch.tensors[k].to(device) for k in ("volume", "mean", "rstd"))
            for seen in (volume, volume.flip(1)) if self.config.flip else (volume,):
                features.append(self.encoder(seen, mean, rstd))
                patches.append(ops.patchify3d(seen, self.mae.patch, None, mean, rstd))
            done += len(volume)
            if done >= self.config.init_volumes:
                break
        return torch.cat(features).float(), torch.cat(patches).float()

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Frozen features [B, N, D] and the z-scored target [B, X, Y, Z]."""
        volume, mean, rstd = (batch.tensors[k] for k in ("volume", "mean", "rstd"))
        with (
            torch.no_grad(),
            torch.autocast("cuda" if volume.is_cuda else "cpu", torch.bfloat16, enabled=volume.is_cuda),
        ):
            features = self.encoder(volume, mean, rstd)
        return features, normalize(volume, mean, rstd)

    def _losses(self, output: Tensor, target_BXYZ: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample (voxel loss, mask loss), each [B]. With a mask head, brain voxels alone count in the first."""
        error = output[:, 0].float() - target_BXYZ
        error = error.abs() if self.config.kind == "l1" else error.square()
        if not self.config.net.mask_head:
            return error.mean(dim=(1, 2, 3)), error.new_zeros(len(error))
        brain = (target_BXYZ != 0).float()
        voxel = (error * brain).sum(dim=(1, 2, 3)) / brain.sum(dim=(1, 2, 3)).clamp(min=1)
        mask = F.binary_cross_entropy_with_logits(output[:, 1].float(), brain, reduction="none").mean(dim=(1, 2, 3))
        return voxel, mask

    def _further_losses(self, output: Tensor, target_BXYZ: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Weight and per-sample value [B] of each loss that is switched on."""
        config, spacing_mm = self.config, self.index.grid.spacing_mm
        x_BXYZ = torch.where(target_BXYZ != 0, output[:, 0].float(), 0.0)
        found = {}
        if config.ssim_weight:
            found["ssim"] = (config.ssim_weight, ssim_loss(x_BXYZ, target_BXYZ))
        if config.gradient_weight:
            found["gradient"] = (config.gradient_weight, gradient_loss(x_BXYZ, target_BXYZ, spacing_mm))
        if config.frequency_weight:
            found["frequency"] = (config.frequency_weight, frequency_loss(x_BXYZ, target_BXYZ))
        return found

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        batch = mirrored(batch, self.config.flip)
        features, target = self._inputs(batch)
        noise = self._noise(batch, features)
        sides: dict[str, Tensor] = {}
        if self.config.adversarial_weight:
            output, sides["adversarial"], sides["discriminator"] = model(features, noise, target)
        else:
            output = model(features, noise)
        voxel, mask = self._losses(output, target)
        total = voxel + self.config.mask_weight * mask
        logs = {"voxel": voxel, "mask": mask}
        for name, (weight, value) in self._further_losses(output, target).items():
            total = total + weight * value
            logs[name] = value
        if sides:
            total = total + self.config.adversarial_weight * sides["adversarial"] + sides["discriminator"]
        logs |= sides
        return total.mean(), {name: value.detach() for name, value in logs.items()}

    def _noise(self, batch: Batch, features_BND: Tensor) -> Tensor | None:
        """float32 [B, N, C] of each sample's own seed, None where there is no noise."""
        if not self.config.latent_noise:
            return None
        shape = (features_BND.shape[1], self.config.net.latent_channels)
        return self.config.latent_noise * randn_like_samples(batch.seeds, shape).to(features_BND.device)

    def _outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        features, target = self._inputs(batch)
        return model(features), target

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output, target = self._outputs(model, batch)
        return {"voxel": self._losses(output, target)[0], "brain_mse": brain_mse(to_volume(output), target)}

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        output, target = self._outputs(model, batch)
        return {"reconstruction": picture(torch.stack([target, to_volume(output)], dim=1))}


MASK_LOGITS = 6.0  # between brain and background in the linear path's first image of the mask


def _start(config: DecoderTaskConfig, features_BND: Tensor, patches_BNP: Tensor) -> Start:
    channels = config.net.latent_channels
    if config.projection == "regression":
        return regression(features_BND, patches_BNP, channels, config.pooled_channels)
    return pca(features_BND, channels) if config.projection == "pca" else identity(features_BND)


@torch.no_grad()
def _begin(net: Tokenizer, start: Start, features_BND: Tensor, patches_BNP: Tensor, place_rank: int) -> None:
    net.projection.weight.copy_(start.projection_CD)
    net.input_scale.fill_(start.scale)
    z_BNC = features_BND @ start.projection_CD.T.to(features_BND) / start.scale
    if net.linear is not None:
        _begin_path(net.linear, z_BNC, patches_BNP, place_rank)
        for parameter in net.decoder.head.parameters():  # the CNN begins with nothing to add
            nn.init.zeros_(parameter)
    if net.mask_linear is not None:
        _begin_path(net.mask_linear, z_BNC, MASK_LOGITS * ((patches_BNP != 0).to(z_BNC) - 0.5), place_rank)


def _begin_path(path: LinearPath, z_BNC: Tensor, target_BNP: Tensor, place_rank: int) -> None:
    found = image(z_BNC, target_BNP, place_rank, path.seen(z_BNC))
    path.to_patch.weight.copy_(found.shared_CP.T)
    path.mean.copy_(found.mean_NP)
    if found.place_NKR is not None and found.basis_RP is not None:
        path.place_NCR.copy_(found.place_NKR)
        path.basis_RP.copy_(found.basis_RP)
