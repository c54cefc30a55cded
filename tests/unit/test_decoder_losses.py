"""Losses of the tokenizer beside the voxel loss: closed forms, MONAI's SSIM, and what an empty volume does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.metrics import SSIMMetric
from torch import Tensor
from torch.nn import functional as F

from g3n.tasks.voxel_losses import brain_box, frequency_loss, gradient_loss, ssim_loss

SHAPE = (12, 14, 16)


def waves(*terms: tuple[float, int, int]) -> Tensor:
    """[1, X, Y, Z]: sum of A cos(2 pi k i / n) along an axis each."""
    total = torch.zeros(SHAPE)
    for amplitude, k, axis in terms:
        at = torch.arange(SHAPE[axis]) * (2 * math.pi * k / SHAPE[axis])
        view = [1, 1, 1]
        view[axis] = -1
        total = total + amplitude * torch.cos(at).view(view)
    return total[None]


def brains(count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two random volumes, 0 outside of one box, and a drawing of each."""
    g = torch.Generator().manual_seed(seed)
    target, x = torch.zeros(count, *SHAPE), torch.zeros(count, *SHAPE)
    target[:, 2:10, 3:12, 4:15] = torch.randn(count, 8, 9, 11, generator=g)
    x[:, 2:10, 3:12, 4:15] = target[:, 2:10, 3:12, 4:15] + 0.7 * torch.randn(count, 8, 9, 11, generator=g)
    return x, target


def test_the_box_is_the_smallest_around_the_brain() -> None:
    target = torch.zeros(3, *SHAPE)
    target[0, 2, 3, 4], target[0, 5, 9, 4] = 1.0, -1.0
    target[1, 0, 0, 15] = 2.0
    box = brain_box(target)
    expected = torch.zeros_like(box)
    expected[0, 2:6, 3:10, 4:5] = True
    expected[1, 0, 0, 15] = True
    assert torch.equal(box, expected)  # the third is empty


def test_ssim_is_monais_over_the_box() -> None:
    """MONAI takes whole windows only: around the box 5 voxels of what surrounds it make its windows those centered in it."""
    x, target = brains()
    for i, loss in enumerate(ssim_loss(x, target)):
        a, b = (F.pad(v[i], [5] * 6)[2 : 10 + 10, 3 : 12 + 10, 4 : 15 + 10] for v in (x, target))
        span = float(target[i].max() - target[i].min())
        expected = 1 - float(SSIMMetric(3, data_range=span)(a[None, None], b[None, None]))
        assert float(loss) == pytest.approx(expected, abs=2e-5)
        assert expected > 0.05
    assert ssim_loss(target, target).abs().max() < 1e-5


def test_the_gradient_of_a_ramp_is_its_slope_a_millimeter() -> None:
    """A ramp of 0.6 a voxel of 2 mm missing along x: 0.3 a mm on one of three axes. A constant offset costs nothing."""
    ramp = 0.6 * torch.arange(SHAPE[0]).view(1, -1, 1, 1).expand(1, *SHAPE) + 1
    found = gradient_loss(torch.full((1, *SHAPE), 0.5), ramp, (2.0, 1.0, 1.0))
    assert float(found) == pytest.approx(0.3 / 3, rel=1e-5)
    assert float(gradient_loss(ramp + 4, ramp, (2.0, 1.0, 1.0))) == pytest.approx(0, abs=1e-5)


def test_edges_of_the_brain_are_no_gradient() -> None:
    """Two columns of brain with another error each: only pairs inside of a column count."""
    target, x = torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE)
    target[0, 3], target[0, 4] = 1.0, 1.0
    x[0, 3], x[0, 4] = 1.0, 3.0
    assert float(gradient_loss(x, target, (1.0, 1.0, 1.0))) == pytest.approx(2 / 3, rel=1e-6)


def test_one_frequency_costs_its_power_and_a_weaker_one_less() -> None:
    """By Parseval a cosine's power is A^2 / 2; half the amplitude has half the weight."""
    zero = torch.zeros(1, *SHAPE)
    assert float(frequency_loss(waves((3.0, 2, 0)), zero)) == pytest.approx(4.5, rel=1e-5)
    both = frequency_loss(waves((2.0, 2, 0), (1.0, 3, 2)), zero)
    assert float(both) == pytest.approx(2**2 / 2 + 0.5 * 1**2 / 2, rel=1e-5)


def test_frequency_weights_carry_no_gradient() -> None:
    """The derivative of a cosine's loss by its amplitude is A, as if the weight were a number."""
    a = torch.tensor(2.0, requires_grad=True)
    frequency_loss(a * waves((1.0, 2, 1)), torch.zeros(1, *SHAPE)).sum().backward()
    assert float(a.grad) == pytest.approx(2.0, rel=1e-5)  # type: ignore[arg-type]


LOSSES: list[Callable[..., Tensor]] = [ssim_loss, lambda x, y: gradient_loss(x, y, (1.0, 1.0, 1.0)), frequency_loss]


@pytest.mark.parametrize("loss", LOSSES, ids=["ssim", "gradient", "frequency"])
def test_samples_do_not_see_each_other_and_nothing_is_ever_infinite(loss: Any) -> None:
    x, target = brains(3)
    target[1], x[1] = 0, 0  # no brain at all
    target[2] = (target[2] != 0).float()  # a brain of one intensity, drawn exactly
    x[2] = target[2]
    x.requires_grad_(True)
    found = loss(x, target)
    assert torch.equal(found[0], loss(x[:1], target[:1])[0])
    assert found[1].abs() < 1e-6
    assert found[2].abs() < 1e-5
    found.sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad[0].abs().max()) > 0
    assert float(x.grad[1].abs().max()) < 1e-4


@pytest.mark.parametrize("loss", LOSSES, ids=["ssim", "gradient", "frequency"])
def test_its_gradient_is_right_and_shapes_suffice(loss: Any) -> None:
    """The slope along the gradient by a difference; and the meta device, which counts FLOPs, has no values."""
    x, target = brains(1)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(x, target).sum(), x)
    step = 1e-2 * grad / grad.norm()
    slope = (loss(x + step, target) - loss(x - step, target)).sum().detach() / 2e-2
    tolerance = 0.5 if loss is frequency_loss else 0.03  # its weights move too, which its gradient leaves out
    assert float(slope) == pytest.approx(float(grad.norm()), rel=tolerance)
    assert loss(x.detach().to("meta"), target.to("meta")).shape == (1,)
