"""Phase 1: masked autoencoding of volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from g3n import ops
from g3n.latent import normalize
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.index import ShardIndex
from g3n.stream.samples import Batch
from g3n.tasks.base import check_grid, mirrored, picture, sample_generator, volume_artifact


@dataclass(frozen=True)
class MAETaskConfig:
    net: MAEConfig = field(default_factory=MAEConfig)
    mask_ratio: float = 0.70
    visible_weight: float = 0.0  # weight of the loss on visible patches beside the masked ones
    norm_target: bool = False  # standardize each target patch, as He 2022
    kind: Literal["l1", "l2"] = "l1"
    flip: float = 0.0  # share of training volumes that are turned left to right

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1 or self.visible_weight < 0:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} must lie in (0, 1), visible_weight {self.visible_weight} >= 0"
            )
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip {self.flip} must lie in [0, 1]")


class MAETask:
    """Predict the masked patches of a volume from the visible ones."""

    Config = MAETaskConfig
    name = "mae"
    unit = "volumes"
    kind: Literal["volume"] = "volume"
    history = 1

    def __init__(self, config: MAETaskConfig, index: ShardIndex) -> None:
        check_grid(index, config.net.volume_shape)
        self.config, self.index = config, index
        self.n_tokens = int(np.prod(config.net.tokens))
        self.n_visible = int((1 - config.mask_ratio) * self.n_tokens)

    def build(self) -> nn.Module:
        return MAE(self.config.net)

    def frozen(self) -> Mapping[str, nn.Module]:
        return {}

    def artifact(self) -> Mapping[str, Any]:
        return volume_artifact(self.index)

    def _split(self, seeds_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Sorted indices of visible [B, K] and masked [B, N - K] patches, from each sample's seed."""
        order = torch.stack([torch.randperm(self.n_tokens, generator=sample_generator(int(s))) for s in seeds_B])
        visible, masked = order[:, : self.n_visible], order[:, self.n_visible :]
        return visible.sort(dim=1).values.to(device), masked.sort(dim=1).values.to(device)

    def _loss(self, pred_BKP: Tensor, batch: Batch, index_BK: Tensor, rows: slice = slice(None)) -> Tensor:
        volume, mean, rstd = (batch.tensors[k][rows] for k in ("volume", "mean", "rstd"))
        net, config = self.config.net, self.config
        return ops.masked_patch_loss(
            pred_BKP[rows], volume, index_BK[rows], net.patch, mean, rstd, config.norm_target, config.kind
        )

    def _places(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """(volume, mean, rstd), visible places [B, K] and masked places [B, N - K]."""
        inputs = tuple(batch.tensors[k] for k in ("volume", "mean", "rstd"))
        return (inputs, *self._split(batch.seeds, inputs[0].device))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        batch = mirrored(batch, self.config.flip)
        inputs, visible, masked = self._places(batch)
        if self.config.visible_weight == 0:
            loss = self._loss(model(*inputs, visible, masked), batch, masked)
            return loss, {"masked": loss.detach()}
        pred_BNP = model(*inputs, visible)
        masked_loss = self._loss(_at(pred_BNP, masked), batch, masked)
        visible_loss = self._loss(_at(pred_BNP, visible), batch, visible)
        logs = {"masked": masked_loss.detach(), "visible": visible_loss.detach()}
        return masked_loss + self.config.visible_weight * visible_loss, logs

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs, visible, masked = self._places(batch)
        pred_BKP = model(*inputs, visible, masked)
        rows = [slice(i, i + 1) for i in range(len(batch))]
        return {"masked": torch.stack([self._loss(pred_BKP, batch, masked, row) for row in rows])}

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of volume, what the encoder saw, and the prediction with the visible patches put back."""
        inputs, visible, _ = self._places(batch)
        pred = model(*inputs, visible)
        volume = normalize(*(batch.tensors[k] for k in ("volume", "mean", "rstd")))
        patch, tokens = self.config.net.patch, self.config.net.tokens
        truth = ops.patchify3d(volume, patch)
        seen = torch.zeros(truth.shape[:2], dtype=torch.bool, device=truth.device).scatter(1, visible, True)[..., None]
        filled = torch.where(seen, truth, pred.float())
        shown = [volume, ops.unpatchify3d(truth * seen, patch, tokens), ops.unpatchify3d(filled, patch, tokens)]
        return {"reconstruction": picture(torch.stack(shown, dim=1))}


def _at(pred_BNP: Tensor, index_BK: Tensor) -> Tensor:
    return pred_BNP.gather(1, index_BK[..., None].expand(-1, -1, pred_BNP.shape[-1]))
