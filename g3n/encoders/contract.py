"""What every frozen encoder is: a name, a fingerprint, the grid it reads, and features of a batch of scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from g3n.nifti import Grid, atlas_grid

WHOLE_BRAIN = atlas_grid((160, 192, 160), 1.0)  # of files, for encoders that read any grid


@dataclass(frozen=True)
class Scans:
    """B scans on one grid of the atlas (axes to L, P, S).

    ``volume_BXYZ`` is int16 or float32, intensities >= 0 on any scale, background exactly 0; ``mean_B`` and ``rstd_B`` float32 are
    of the brain (non-zero voxels) in the same units; ``modalities`` T1, T1c, T2, FLAIR, or empty where unknown.
    """

    volume_BXYZ: Tensor
    mean_B: Tensor
    rstd_B: Tensor
    grid: Grid
    modalities: tuple[str, ...]


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder on its device.

    ``grid`` is where it wants the voxels; None: on any grid of the atlas box (a file then comes on ``WHOLE_BRAIN``). ``about`` says
    what it does to intensities, orientation and size, and which weights it found. ``features`` maps a batch to float32 [B, d] of each kind
    (mean, cls, latent, ...), without gradients; ``tokens``, where there are any, to float32 [B, N, d].
    Neither depends on the other scans of the batch. On a GPU arithmetic is bf16 where the training's is.
    """

    name: str
    fingerprint: str
    grid: Grid | None
    about: Mapping[str, Any]
    features: Callable[[Scans], dict[str, Tensor]]
    tokens: Callable[[Scans], Tensor] | None = None


def arithmetic(device: torch.device) -> torch.autocast:
    """fp32 on a CPU, bf16 on a GPU, as the tokenizer encodes."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def to_ras(volume_BXYZ: Tensor) -> Tensor:
    """Axes to L, P, S -> axes to R, A, S."""
    return volume_BXYZ.flip(1, 2)
