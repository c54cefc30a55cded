"""Losses of a drawn volume beside the voxel loss, each of one sample alone. Shapes never depend on values, so the meta device counts them.

All look at brain voxels: ``x`` and ``target`` are z-scored volumes that are 0 outside of the target's brain. A volume without brain
has loss 0 and gradients 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03  # of Wang 2004


def brain_mse(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Mean squared error over the target's brain, float32 [B]."""
    brain = target_BXYZ != 0
    squares = (x_BXYZ - target_BXYZ) ** 2 * brain
    return squares.sum(dim=(1, 2, 3)) / brain.sum(dim=(1, 2, 3)).clamp(min=1)


def brain_box(target_BXYZ: Tensor) -> Tensor:
    """bool [B, X, Y, Z]: the smallest box around the voxels that are not 0, empty where there are none."""
    brain = target_BXYZ != 0
    box = torch.ones_like(brain)
    for axis in (1, 2, 3):
        others = [a for a in (1, 2, 3) if a != axis]
        there = brain.any(dim=others[1], keepdim=True).any(dim=others[0], keepdim=True).int()
        after, before = there.cummax(axis).values, there.flip(axis).cummax(axis).values.flip(axis)
        box = box & (after & before).bool()
    return box


def _blur(x_KXYZ: Tensor) -> Tensor:
    """Gaussian window along each axis in turn; the volume goes on with zeros beyond its edges."""
    at = torch.arange(_WINDOW, device=x_KXYZ.device, dtype=torch.float32) - _WINDOW // 2
    kernel = torch.exp(-0.5 * (at / _SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    x = x_KXYZ[:, None]
    for axis in range(3):
        shape, pad = [1, 1, 1], [0, 0, 0]
        shape[axis], pad[axis] = _WINDOW, _WINDOW // 2
        x = F.conv3d(x, kernel.view(1, 1, *shape), padding=pad)
    return x[:, 0]


def ssim_loss(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """1 - SSIM (Wang 2004) in 3D, mean over windows centered in the target's brain box; float32 [B].

    Gaussian windows of 11 voxels, as MONAI's ``SSIMMetric`` has them, but taken axis by axis: 33 products a voxel instead of
    1331. The range is that of the target's brain, at least 1 (a standard deviation).
    """
    x, y, brain = x_BXYZ.float(), target_BXYZ.float(), target_BXYZ != 0
    high = torch.where(brain, y, -torch.inf).amax(dim=(1, 2, 3))
    span_B = (high - torch.where(brain, y, torch.inf).amin(dim=(1, 2, 3))).clamp(min=1)
    c1, c2 = ((k * span_B).square().view(-1, 1, 1, 1) for k in (_K1, _K2))
    mx, my, xx, yy, xy = _blur(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    ssim = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    box = brain_box(y)
    return ((1 - ssim) * box).sum(dim=(1, 2, 3)) / box.sum(dim=(1, 2, 3)).clamp(min=1)


def gradient_loss(x_BXYZ: Tensor, target_BXYZ: Tensor, spacing_mm: tuple[float, float, float]) -> Tensor:
    """Mean absolute error of differences between neighbors, z-score per mm, float32 [B].

    Pairs of brain voxels count; the mean of each axis is averaged over the three (Mathieu 2016, arXiv 1511.05440).
    """
    error, brain = x_BXYZ.float() - target_BXYZ.float(), target_BXYZ != 0
    means = []
    for axis, step_mm in zip((1, 2, 3), spacing_mm, strict=True):
        n = error.shape[axis] - 1
        both = brain.narrow(axis, 0, n) & brain.narrow(axis, 1, n)
        slope = error.diff(dim=axis).abs() / step_mm * both
        means.append(slope.sum(dim=(1, 2, 3)) / both.sum(dim=(1, 2, 3)).clamp(min=1))
    return torch.stack(means).mean(0)


def frequency_loss(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Focal frequency loss (Jiang 2021, arXiv 2012.12821, alpha 1) of whole volumes, float32 [B].

    Squared error of the spectrum (orthonormal, so its plain mean is that of the voxels), each frequency weighted by its
    error as a share of the volume's largest; no gradient goes through the weights.
    """
    spectrum = torch.view_as_real(torch.fft.fftn(x_BXYZ.float() - target_BXYZ.float(), dim=(1, 2, 3), norm="ortho"))
    squares = spectrum.square().sum(-1)
    with torch.no_grad():
        error = squares.sqrt()
        weight = error / error.amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(error.dtype).tiny)
    return (weight * squares).mean(dim=(1, 2, 3))
