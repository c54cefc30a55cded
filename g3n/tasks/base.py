"""The contract of a stage. The trainer knows nothing else about what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from g3n.config import G3nError, to_plain
from g3n.stream.index import ShardIndex
from g3n.stream.samples import Batch

_MIRROR = 0x4D495252  # keeps this draw apart from the others of a seed


class Task(Protocol):
    """One training stage: what is trained, what stays frozen, and what is minimized.

    Every draw a sample needs (mask, t, noise, dropped variables) comes from ``batch.seeds`` alone, so the loss of a
    global batch does not depend on world size or micro-batch size.
    """

    name: str
    unit: str  # what a sample is called in throughput figures: "volumes", "latents", "pairs"
    kind: Literal["volume", "latent", "pair"]  # which samples the stream must deliver
    history: int  # visits up to the baseline that a pair has; 1 is the baseline alone

    def build(self) -> nn.Module:
        """The trainable module on the CPU, initialized from torch's current seed. Its forward is called once a loss.

        A module in it that has an attribute ``train_step`` finds there how many steps were taken, before each step of training.
        """

    def frozen(self) -> Mapping[str, nn.Module]:
        """Modules the loss needs and never trains; the trainer moves them to the device, the engine never sees them."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the batch (fp32 scalar) and what to log, detached: scalars, or [B] where samples have their own.

        The trainer logs the mean, and of what samples have their own also the mean of each modality.
        """

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Per-sample figures, each float32 [B]; the trainer averages them with ``batch.weights``."""

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Pictures of this batch by name, uint8 [height, width]."""

    def artifact(self) -> Mapping[str, Any]:
        """What the next stage must check: fingerprints of inputs, grid, variables. Written to every checkpoint."""


def sample_generator(seed: int) -> torch.Generator:
    """A CPU generator whose draws are a function of ``seed`` alone."""
    return torch.Generator().manual_seed(int(seed) & 0x7FFF_FFFF_FFFF_FFFF)


def randn_like_samples(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 [B, *shape], row b drawn from ``seeds[b]`` alone."""
    return torch.stack([torch.randn(shape, generator=sample_generator(int(s))) for s in seeds])


def mirrored(batch: Batch, probability: float) -> Batch:
    """``batch`` with volumes turned left to right (axis 0 of the atlas grid), each with ``probability`` by its own seed.

    Brains are nearly symmetric, so a mirrored one is a person more to learn from.
    """
    if not probability:
        return batch
    draws = [torch.rand((), generator=sample_generator(int(s) ^ _MIRROR)) for s in batch.seeds]
    turn_B = torch.stack(draws) < probability
    volume_BXYZ = batch.tensors["volume"]
    turned_BXYZ = torch.where(turn_B.to(volume_BXYZ.device)[:, None, None, None], volume_BXYZ.flip(1), volume_BXYZ)
    return replace(batch, tensors={**batch.tensors, "volume": turned_BXYZ})


def check_grid(index: ShardIndex, volume_shape: tuple[int, int, int]) -> None:
    """Raise G3nError where the shards' volumes are not of the shape the model reads."""
    if tuple(index.grid.shape) != tuple(volume_shape):
        raise G3nError(
            f"shards '{index.url}' hold volumes of {tuple(index.grid.shape)}, but model.net.volume_shape is "
            f"{tuple(volume_shape)}; pack on that grid or change the config"
        )


def volume_artifact(index: ShardIndex) -> dict[str, Any]:
    """What later stages check about the volumes a stage was trained on."""
    parts = [source.fingerprint for source in index.sources] if len(index.sources) > 1 else []
    about = {"parts": parts} if parts else {}
    return {**about, "shards": index.fingerprint, "grid": to_plain(index.grid), "variables": to_plain(index.variables)}


def picture(volumes_BKXYZ: Tensor, rows: int = 4, window: tuple[float, float] = (-2.5, 2.5)) -> np.ndarray:
    """uint8 [rows * Y, K * X]: the middle axial slice of K z-scored LPS volumes a sample, anterior at the top.

    Exact zeros (background) are black.
    """
    v = volumes_BKXYZ[:rows, ..., volumes_BKXYZ.shape[-1] // 2].float().cpu().numpy()
    gray = np.clip((v - window[0]) / (window[1] - window[0]), 0, 1) * 255 * (v != 0)
    return np.concatenate([np.concatenate(list(row.transpose(0, 2, 1)), axis=1) for row in gray]).astype(np.uint8)
