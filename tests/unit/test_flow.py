"""Samplers against closed forms, guidance, and the velocity of normal data."""

from __future__ import annotations

import math

import pytest
import torch

from g3n.flow import gaussian_velocity, guided, integrate, invert, path


def error(sampler: str, steps: int) -> float:
    """Of dx/dt = x cos(5 t) from 1: the solution is exp(sin(5 t) / 5)."""
    x0 = torch.ones(2, 3, 4)
    x1 = integrate(lambda x, t: x * torch.cos(5 * t)[:, None, None], x0, steps, sampler)  # type: ignore[arg-type]
    return float((x1 - math.exp(math.sin(5.0) / 5)).abs().max())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    found = math.log2(error(sampler, 16) / error(sampler, 32))
    assert found == pytest.approx(order, abs=0.25)


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
