"""What one decoded sample and one batch look like, and how the first become the second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g3n.stream.decode import read_latent_sample, read_volume_sample
from g3n.stream.index import Sample, Shard, ShardIndex
from g3n.stream.keep import Keep
from g3n.stream.pairs import elapsed_years


def subject_of(key: str) -> str:
    """``sub-<hash>`` of a sample's key."""
    return key.split("_")[0]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    tensors by sample kind (B samples):
      volume: ``volume`` int16 [B, X, Y, Z] in stored units, ``mean`` and ``rstd`` float32 [B] of the brain in stored
              units: ``(volume - mean) * rstd`` where volume != 0, else 0, is the network's input
      latent: ``latent`` float32 [B, N, C], raw projected tokens (LatentSpace standardizes them)
      pair:   ``baseline`` and ``target`` float32 [B, N, C] raw, ``elapsed_years`` float32 [B]; with a history of H > 1 also
              ``earlier`` float32 [B, H - 1, N, C] raw, the visits before the baseline, the latest first, and
              ``earlier_years`` float32 [B, H - 1] from each to the baseline, NaN where there is no such visit or no date
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


@dataclass(frozen=True)
class Item:
    """One sample on its way to a batch. ``tensors`` as in Batch without the batch axis, scalars as floats."""

    tensors: dict[str, Tensor | float]
    variables: dict[str, Any]
    key: str
    seed: int = 0
    lane: int = 0
    position: int = 0
    weight: float = 1.0
    damaged: tuple[str, ...] = ()  # what the stream skipped on the way to this sample


def read_item(
    index: ShardIndex, shard: Shard, sample: Sample, visits: tuple[int, ...], keep: Keep | None = None
) -> Item:
    """Decode a volume (``visits`` empty), one visit's latent, or a (baseline, target) pair. Raises Damage, G3nError.

    What ``keep`` has is not read again.
    """
    keep = keep or Keep(0)
    if not visits:
        volume = keep.read(shard, sample, lambda: read_volume_sample(index, shard, sample))
        scalars: dict[str, Tensor | float] = {"mean": volume.brain_mean, "rstd": 1.0 / volume.brain_std}
        return Item({**scalars, "volume": torch.from_numpy(volume.voxels)}, volume.variables, sample.key)
    latents = keep.read(shard, sample, lambda: read_latent_sample(index, shard, sample))
    read = [i for i in visits if i >= 0]
    tokens = [torch.from_numpy(latents.tokens[i]).float() for i in read]
    chosen = [latents.visits[i] for i in read]
    key = f"{sample.key}_visit-{'-'.join(f'{i + 1:02d}' for i in read)}"
    if len(visits) == 1:
        return Item({"latent": tokens[0]}, chosen[0].variables, key)
    pair: dict[str, Tensor | float] = {
        "baseline": tokens[-2],
        "target": tokens[-1],
        "elapsed_years": elapsed_years(chosen[-2], chosen[-1]),
    }
    missing = len(visits) - len(read)
    if len(visits) > 2:
        pair["earlier"] = torch.stack([*tokens[-3::-1], *[torch.zeros_like(tokens[0])] * missing])
        years = [elapsed_years(visit, chosen[-2]) for visit in chosen[-3::-1]]
        pair["earlier_years"] = torch.tensor([*years, *[math.nan] * missing])
    return Item(pair, chosen[-1].variables, key)


def _stacked(values: Sequence[Tensor], pin: bool) -> Tensor:
    """[B, ...] by numpy: it asks for large pages, and its copies start no threads that the training thread needs."""
    shape = (len(values), *values[0].shape)
    if pin:
        out = torch.empty(shape, dtype=values[0].dtype, pin_memory=True)
    else:
        out = torch.from_numpy(np.empty(shape, values[0].numpy().dtype))
    np.stack([value.numpy() for value in values], out=out.numpy())
    return out


def collate(items: Sequence[Item]) -> Batch:
    """Stack samples of one kind; tensors go straight into pinned memory where there is a GPU to feed."""
    pin = torch.cuda.is_available()
    tensors = {}
    for name, first in items[0].tensors.items():
        values = [item.tensors[name] for item in items]
        if isinstance(first, Tensor):
            tensors[name] = _stacked(values, pin)  # type: ignore[arg-type]
        else:
            tensors[name] = torch.tensor(values, dtype=torch.float32)
    return Batch(
        tensors=tensors,
        variables=[item.variables for item in items],
        keys=[item.key for item in items],
        seeds=torch.tensor([item.seed for item in items], dtype=torch.int64),
        lanes=torch.tensor([item.lane for item in items], dtype=torch.int64),
        positions=torch.tensor([item.position for item in items], dtype=torch.int64),
        weights=torch.tensor([item.weight for item in items], dtype=torch.float32),
    )
