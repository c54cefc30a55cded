"""A generator whose latents are the voxels themselves, so that what comes out of it is known in closed form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from g3n.generate import Generator
from g3n.latent import normalize
from g3n.models.conditioning import Variable, VariableSet
from g3n.models.pretrained import Run
from g3n.nifti import BRAIN_CENTER_MM, Grid, atlas_grid

GRID = atlas_grid((20, 24, 20), 8)
TABLE = {
    "modality": Variable(levels=("T1", "T2")),
    "age_years": Variable(low=0, high=110),
    "sex": Variable(levels=("F", "M")),
    "elapsed_years": Variable(low=0, high=20),
}
Model = Callable[..., Tensor]  # (x_BNC, t_B, cond_BV[, source_BNC]) -> velocity


class VoxelSpace(nn.Module):
    """z-scores as a latent of one channel a token, one token a voxel; background is where the brain mask of ``open`` is 0."""

    def __init__(self, grid: Grid, brain: np.ndarray) -> None:
        super().__init__()
        self.shape = grid.shape
        self.brain = torch.from_numpy(brain)
        self.mean = torch.zeros(int(np.prod(grid.shape)), 1)

    def encode(self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
        return normalize(volume_BXYZ, mean_B, rstd_B).flatten(1)[..., None]

    def decode(self, latent_BNC: Tensor) -> Tensor:
        return latent_BNC.reshape(-1, *self.shape) * self.brain


def world(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """World mm of each voxel, [X, Y, Z, 3]."""
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def ball(points: np.ndarray, center: tuple[float, ...] = BRAIN_CENTER_MM, radius_mm: float = 65) -> np.ndarray:
    return np.linalg.norm(points - np.array(center), axis=-1) < radius_mm


def blob(points: np.ndarray, center: np.ndarray, sd_mm: float = 10) -> np.ndarray:
    return np.exp(-((points - center) ** 2).sum(-1) / (2 * sd_mm**2))


def generator(model: Model, start_noise: float = 1.0, grid: Grid = GRID) -> Generator:
    brain = ball(world(grid.shape, grid.matrix), radius_mm=58)  # inside of the scans'
    run = Run(Path("runs/pixels"), "none", {}, {}, 1, {})
    space = VoxelSpace(grid, brain)
    return Generator(model, space, VariableSet(TABLE), grid, run, torch.device("cpu"), start_noise)  # type: ignore[arg-type]
