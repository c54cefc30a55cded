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
from g3n.models.decoder import Tokenizer, TokenizerConfig, to_volume
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch
from g3n.tasks.base import check_grid, picture, volume_artifact


@dataclass(frozen=True)
class DecoderTaskConfig:
    encoder: str  # the MAE run
    net: TokenizerConfig = field(default_factory=TokenizerConfig)
    projection: Literal["regression", "random"] = "regression"
    init_volumes: int = 32  # training volumes that set P and the decoder's input scale before step 0
    kind: Literal["l1", "l2"] = "l1"  # of the voxel loss; l2 is what PSNR measures
    mask_weight: float = 0.1  # weight of the brain-mask loss; only with net.mask_head

    def __post_init__(self) -> None:
        if self.init_volumes < 1 or self.mask_weight < 0:
            raise ValueError(f"init_volumes {self.init_volumes} must be >= 1 and mask_weight {self.mask_weight} >= 0")


@dataclass(frozen=True)
class Regression:
    """z' = P f; patch = patch_PC z' + mean of its place. ``scale`` is the standard deviation of z' around its means."""

    projection_CD: Tensor
    scale: float
    patch_PC: Tensor
    mean_NP: Tensor


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
        self.config, self.index = config, index

    def build(self) -> nn.Module:
        net = Tokenizer(self.config.net, self.mae.width, self.mae.tokens, self.mae.patch)
        start = self._regression()
        if self.config.projection == "regression":
            net.projection.weight.data.copy_(start.projection_CD)
            net.input_scale.fill_(start.scale)
            if net.linear is not None:
                net.linear.to_patch.weight.data.copy_(start.patch_PC * start.scale)
                net.linear.mean.data.copy_(start.mean_NP)
                nn.init.zeros_(net.decoder.head.weight)  # the CNN begins with nothing to add
        return net

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"encoder": self.encoder}

    def artifact(self) -> Mapping[str, Any]:
        return {**volume_artifact(self.index), "encoder": self.encoder_fingerprint}

    @torch.no_grad()
    def _regression(self) -> Regression:
        """Reduced-rank regression of normalized patches on encoder features, both around their mean at each place.

        The best linear map from features to voxels through C channels (Izenman 1975). Starting from it instead of a
        random P is worth decibels on short runs (docs/log.md).
        """
        features, patches = [], []
        device = next(self.encoder.parameters()).device
        batches = eval_batches(self.index, None, "volume", "train", micro_batch=4, rank=0, world=1, seed=0)
        for batch in batches:
            volume, mean, rstd = (batch.tensors[k].to(device) for k in ("volume", "mean", "rstd"))
            features.append(self.encoder(volume, mean, rstd))
            patches.append(ops.patchify3d(volume, self.mae.patch, None, mean, rstd))
            if sum(map(len, features)) >= self.config.init_volumes:
                break
        f_BND, x_BNP = torch.cat(features).double(), torch.cat(patches).double()
        f_ND, x_NP = f_BND.mean(0), x_BNP.mean(0)
        f_MD, x_MP = (f_BND - f_ND).flatten(0, 1), (x_BNP - x_NP).flatten(0, 1)
        gram_DD = f_MD.T @ f_MD
        ridge = 1e-3 * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=device)
        weight_DP = torch.linalg.solve(gram_DD + ridge, f_MD.T @ x_MP)
        fitted_MP = f_MD @ weight_DP
        _, vectors_PP = torch.linalg.eigh(fitted_MP.T @ fitted_MP)
        patch_PC = vectors_PP[:, -self.config.net.latent_channels :]
        p_DC = weight_DP @ patch_PC
        mean_NP = x_NP - f_ND @ p_DC @ patch_PC.T
        return Regression(p_DC.T.float(), float((f_MD @ p_DC).std()), patch_PC.float(), mean_NP.float())

    def _outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        volume, mean, rstd = (batch.tensors[k] for k in ("volume", "mean", "rstd"))
        with (
            torch.no_grad(),
            torch.autocast("cuda" if volume.is_cuda else "cpu", torch.bfloat16, enabled=volume.is_cuda),
        ):
            features = self.encoder(volume, mean, rstd)
        return model(features), normalize(volume, mean, rstd)

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

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        voxel, mask = self._losses(*self._outputs(model, batch))
        loss = (voxel + self.config.mask_weight * mask).mean()
        return loss, {"voxel": voxel.detach(), "mask": mask.detach()}

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        output, target = self._outputs(model, batch)
        brain = target != 0
        squared = ((to_volume(output) - target) ** 2 * brain).sum(dim=(1, 2, 3)) / brain.sum(dim=(1, 2, 3)).clamp(min=1)
        return {"voxel": self._losses(output, target)[0], "brain_mse": squared}

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        output, target = self._outputs(model, batch)
        return {"reconstruction": picture(torch.stack([target, to_volume(output)], dim=1))}
