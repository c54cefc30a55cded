"""How close two volumes are, over the brain."""

from __future__ import annotations

import torch
from monai.metrics import SSIMMetric
from torch import Tensor


def brain_mse(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Mean squared difference over the target's non-zero voxels, float32 [B]; NaN for an empty target."""
    brain = target_BXYZ != 0
    squares = (x_BXYZ.float() - target_BXYZ.float()).square() * brain
    return squares.sum(dim=(1, 2, 3)) / brain.sum(dim=(1, 2, 3))


def brain_mae(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Mean absolute difference over the target's non-zero voxels, float32 [B]."""
    brain = target_BXYZ != 0
    return ((x_BXYZ - target_BXYZ).abs() * brain).sum(dim=(1, 2, 3)) / brain.sum(dim=(1, 2, 3))


def brain_range(target_BXYZ: Tensor) -> Tensor:
    """Largest minus smallest intensity of each target's brain, float32 [B]."""
    brain = target_BXYZ != 0
    high = torch.where(brain, target_BXYZ, -torch.inf).amax(dim=(1, 2, 3))
    return high - torch.where(brain, target_BXYZ, torch.inf).amin(dim=(1, 2, 3))


def psnr_db(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """10 log10(range^2 / mse), both over the target's brain, float32 [B]."""
    return 10 * torch.log10(brain_range(target_BXYZ) ** 2 / brain_mse(x_BXYZ, target_BXYZ))


def ssim(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Structural similarity of whole volumes (MONAI: 3D, Gaussian window of 11), range of the target's brain; [B]."""
    ranges = brain_range(target_BXYZ).tolist()
    values = [
        SSIMMetric(spatial_dims=3, data_range=r)(x[None, None].float(), y[None, None].float())
        for x, y, r in zip(x_BXYZ, target_BXYZ, ranges, strict=True)
    ]
    return torch.cat([torch.as_tensor(value).reshape(1) for value in values])
