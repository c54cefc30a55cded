"""Samplers against closed forms, guidance, and the velocity of normal data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from g3n.flow import Sampler, Velocity, gaussian_velocity, guided, integrate, invert, path, shifted


class Counted:
    """A velocity that remembers the times it was asked for."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity, self.times = velocity, list[float]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert (t == t[0]).all()
        self.times.append(float(t[0]))
        return self.velocity(x, t)


def error(sampler: Sampler, steps: int, shift: float) -> float:
    """Of dx/dt = x cos(5 t) from 1: the solution is exp(sin(5 t) / 5)."""
    x0 = torch.ones(2, 3, 4)
    x1 = integrate(lambda x, t: x * torch.cos(5 * t)[:, None, None], x0, steps, sampler, shift)
    return float((x1 - math.exp(math.sin(5.0) / 5)).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_order_of_convergence(sampler: Sampler, order: int, shift: float) -> None:
    """Halved steps, equal ones and unequal ones: the error falls by 2 to the order."""
    found = math.log2(error(sampler, 32, shift) / error(sampler, 64, shift))
    assert found == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 10), ("heun", 20), ("multistep", 11)])
def test_evaluations_a_step(sampler: Sampler, evaluations: int) -> None:
    counted = Counted(lambda x, t: x)
    integrate(counted, torch.zeros(1, 1, 1), 10, sampler)
    assert len(counted.times) == evaluations


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_two_steps_of_the_multistep_sampler_are_exact_for_a_velocity_linear_in_time(shift: float) -> None:
    """Adams-Bashforth of second order integrates a line exactly, whatever the steps; equal weights 3/2, -1/2 would not."""
    x1 = integrate(lambda x, t: (2 * t)[:, None, None].expand_as(x), torch.zeros(1, 1, 1), 7, "multistep", shift)
    assert float(x1) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("a", [0.5, 1.0, 3.06])
def test_shift_is_that_of_esser_with_time_turned_round(a: float) -> None:
    ours = torch.linspace(0, 1, 11, dtype=torch.float64)
    theirs = 1 - ours
    assert torch.allclose(shifted(ours, a), 1 - a * theirs / (1 + (a - 1) * theirs))
    assert shifted(0.5, 3.0) == pytest.approx(0.25)  # more of the way near the noise
    assert (shifted(0.0, a), shifted(1.0, a)) == (0.0, 1.0)


def test_the_shifted_grid_has_its_steps_near_the_noise() -> None:
    counted = Counted(lambda x, t: x)
    integrate(counted, torch.zeros(1, 1, 1), 4, "euler", shift=3.0)
    assert counted.times == pytest.approx([0.0, 1 / 10, 1 / 4, 1 / 2])


def test_inversion_is_undone_by_integration_and_follows_the_solution_in_second_order() -> None:
    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x) + x.flip(-1) * torch.cos(5 * t)[:, None, None]

    x1 = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    for steps in (10, 40):
        there_and_back = integrate(velocity, invert(velocity, x1, steps), steps)
        assert float((there_and_back - x1).abs().max()) < 1e-5
    end = torch.full((2, 3, 4), math.exp(math.sin(5.0) / 5))  # of dx/dt = x cos(5 t), which starts at 1

    def off(steps: int, corrections: int) -> float:
        x0 = invert(lambda x, t: x * torch.cos(5 * t)[:, None, None], end, steps, corrections)
        return float((x0 - 1).abs().max())

    for corrections in (1, 8):
        assert math.log2(off(16, corrections) / off(32, corrections)) == pytest.approx(2, abs=0.25)
    with pytest.raises(ValueError, match="steps 0 and corrections 8"):
        invert(velocity, x1, 0)


def test_path_and_velocity() -> None:
    x0, x1 = torch.randn(3, 2, 2), torch.randn(3, 2, 2)
    t = torch.tensor([0.0, 0.25, 1.0])
    xt, velocity = path(x0, x1, t)
    assert torch.equal(xt[0], x0[0])
    assert torch.allclose(xt[1], 0.75 * x0[1] + 0.25 * x1[1])
    assert torch.equal(xt[2], x1[2])
    assert torch.equal(velocity, x1 - x0)


def test_guidance() -> None:
    conditional, unconditional = (lambda x, t: x + 1), (lambda x, t: x - 1)
    x, t = torch.zeros(1, 1, 1), torch.zeros(1)
    assert [float(guided(conditional, unconditional, w)(x, t)) for w in (0.0, 1.0, 2.0)] == [-1.0, 1.0, 3.0]


def test_guidance_acts_inside_its_interval_only_and_asks_for_the_null_velocity_there_only() -> None:
    """Ten Euler steps at t = 0, 0.1, ...: inside [0.2, 0.5] four, ends included, move by w = 3, the other six by 1."""
    conditional, null = Counted(lambda x, t: torch.ones_like(x)), Counted(lambda x, t: torch.zeros_like(x))
    made = integrate(guided(conditional, null, 3.0, (0.2, 0.5)), torch.zeros(2, 1, 1), 10, "euler")
    assert null.times == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert len(conditional.times) == 10
    assert made.flatten().tolist() == pytest.approx([0.1 * (4 * 3 + 6)] * 2)


def test_guidance_interval_of_samples_at_different_times() -> None:
    velocity = guided(lambda x, t: x + 1, lambda x, t: x - 1, 2.0, (0.3, 0.6))
    assert velocity(torch.zeros(3, 1, 1), torch.tensor([0.1, 0.3, 0.7])).flatten().tolist() == [1.0, 3.0, 1.0]


def test_guidance_everywhere_is_the_whole_interval() -> None:
    null = Counted(lambda x, t: torch.zeros_like(x))
    integrate(guided(lambda x, t: torch.ones_like(x), null, 3.0), torch.zeros(1, 1, 1), 10, "euler")
    assert len(null.times) == 10


def test_velocity_of_normal_data_leaves_it_normal() -> None:
    """Noise goes to data of unit variance, and the regression of velocity on x_t has this slope."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 500, 50, generator=generator)
    made = integrate(gaussian_velocity, noise, 100)
    assert float(made.std()) == pytest.approx(1.0, abs=0.02)
    data = torch.randn(noise.shape, generator=generator)
    for t in (0.1, 0.5, 0.8):
        xt, velocity = path(noise, data, torch.full((4,), t))
        slope = float((xt * velocity).mean() / (xt * xt).mean())
        expected = float(gaussian_velocity(torch.ones(1, 1, 1), torch.tensor([t])))
        assert slope == pytest.approx(expected, abs=0.02)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="steps 0 must be >= 1"):
        integrate(lambda x, t: x, torch.zeros(1, 1, 1), 0)
    with pytest.raises(ValueError, match=r"shift 0\.0 > 0 and sampler 'heun' one of euler, heun, multistep"):
        integrate(lambda x, t: x, torch.zeros(1, 1, 1), 1, shift=0.0)
