"""What one decoded sample and one batch look like. Reading them is in index.py and lanes.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tensors by sample kind (B samples):
      volume: ``volume`` int16 [B, X, Y, Z] in stored units, ``mean`` and ``rstd`` float32 [B] of the brain in stored
              units: ``(volume - mean) * rstd`` where volume != 0, else 0, is the network's input
      latent: ``latent`` float32 [B, N, C], raw projected tokens (LatentSpace standardizes them)
      pair:   ``baseline`` and ``target`` float32 [B, N, C] raw, ``elapsed_years`` float32 [B]
    """

    tensors: dict[str, Tensor]
    variables: list[dict[str, Any]]  # the clinical variables of each sample; a missing one is absent or None
    keys: list[str]
    seeds: Tensor  # int64 [B]: all random draws of a sample come from its seed alone
    lanes: Tensor  # int64 [B]
    positions: Tensor  # int64 [B]: the lane's cursor after this sample
    weights: Tensor  # float32 [B]: 0 for the padding of validation batches, else 1

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its data tensors on ``device`` (seeds and cursors stay on the CPU)."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved, weights=self.weights.to(device))
