"""How close two volumes are, over the brain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric
from torch import Tensor

HIGH_FREQUENCY = 0.5  # of Nyquist: detail of less than 4 voxels from crest to crest
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang 2003, from fine to coarse
_WINDOW = 11


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


def ms_ssim_scales(shape: Sequence[int]) -> int:
    """How many of the five scales a volume allows: the window of 11 must fit into the coarsest, and MONAI asks for
    more than 10 (scales - 1)^2 voxels. 4 at 160x192x160, 2 at 40x48x40."""
    fits = [s for s in range(1, 6) if min(shape) // 2 ** (s - 1) >= _WINDOW and min(shape) // max(1, s - 1) ** 2 > 10]
    return max(fits, default=1)


def ms_ssim(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Multi-scale structural similarity of whole volumes (Wang, Simoncelli, Bovik 2003; MONAI), float32 [B].

    ``ms_ssim_scales`` says how many scales; their weights are Wang's first ones divided by their sum, so with one scale
    this is ``ssim``. Range of each target's brain. Raises ValueError for volumes smaller than the window of 11.
    """
    chosen = MS_SSIM_WEIGHTS[: ms_ssim_scales(target_BXYZ.shape[1:])]
    weights = [w / sum(chosen) for w in chosen]
    values = [
        MultiScaleSSIMMetric(spatial_dims=3, data_range=r, weights=weights)(
            x[None, None].float(), y[None, None].float()
        )
        for x, y, r in zip(x_BXYZ, target_BXYZ, brain_range(target_BXYZ).tolist(), strict=True)
    ]
    return torch.cat([torch.as_tensor(value).reshape(1) for value in values])


def high_frequency_error(x_BXYZ: Tensor, target_BXYZ: Tensor, above: float = HIGH_FREQUENCY) -> Tensor:
    """Energy of the error over energy of the target, both at spatial frequencies above ``above`` of Nyquist; float32 [B].

    0 is perfect, 1 is an error as large as the detail itself, as where all detail is smoothed away. By FFT over the box of the
    target's brain, voxels outside the brain 0 in both; frequencies are radial, in cycles a voxel (Nyquist 0.5), so on a grid
    of spacing s mm the limit is ``above`` / (2 s) per mm. NaN for an empty target.
    """
    values = [_high_frequency_error(x.float(), y.float(), above) for x, y in zip(x_BXYZ, target_BXYZ, strict=True)]
    return torch.stack(values)


def _high_frequency_error(x_XYZ: Tensor, target_XYZ: Tensor, above: float) -> Tensor:
    places = torch.nonzero(target_XYZ)
    if not len(places):
        return torch.tensor(torch.nan, device=target_XYZ.device)
    box = tuple(slice(int(a), int(b) + 1) for a, b in zip(places.amin(0), places.amax(0), strict=True))
    target = target_XYZ[box]
    error = (x_XYZ[box] - target) * (target != 0)
    squares = [torch.fft.fftfreq(n, device=target.device).square() for n in target.shape]
    radius = (squares[0][:, None, None] + squares[1][:, None] + squares[2]).sqrt()
    high = radius > above * 0.5
    return torch.fft.fftn(error).abs().square()[high].sum() / torch.fft.fftn(target).abs().square()[high].sum()


def brain_dice(x_BXYZ: Tensor, target_BXYZ: Tensor) -> Tensor:
    """Dice overlap of the non-zero voxels of both, float32 [B]; NaN where both are empty.

    Says something only of volumes whose background is exactly 0, as that of decoders with a mask head.
    """
    x, target = x_BXYZ != 0, target_BXYZ != 0
    return 2 * (x & target).sum(dim=(1, 2, 3)) / (x.sum(dim=(1, 2, 3)) + target.sum(dim=(1, 2, 3)))
