"""Flow matching on straight paths (Lipman 2023, arXiv 2210.02747) and its samplers.

The path runs from x0 at t = 0 (noise, or a baseline's latent for a forecast: Albergo 2024, arXiv 2310.03725) to data x1 at
t = 1: x_t = (1 - t) x0 + t x1 with velocity x1 - x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_BNC, t_B) -> float32 [B, N, C]
Sampler = Literal["euler", "heun", "multistep"]
_TINY = 1e-12
Time = TypeVar("Time", float, Tensor)


def path(x0_BNC: Tensor, x1_BNC: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity), each [B, N, C]."""
    t_B11 = t_B[:, None, None]
    return (1 - t_B11) * x0_BNC + t_B11 * x1_BNC, x1_BNC - x0_BNC


def shifted(t: Time, shift: float) -> Time:
    """Times t in [0, 1] moved toward the noise by ``shift`` >= 1 (below 1: toward the data; 1: not at all).

    Esser 2024 (arXiv 2403.03206, eq. 23) maps s to a s / (1 + (a - 1) s), where s = 0 is data and s = 1 noise, with
    a = sqrt(m / n) for data of m numbers under a schedule that suits n: the more numbers tell of one thing, the more noise it
    takes to hide it. Ours runs the other way. With t = 1 - s, t' = 1 - a (1 - t) / (1 + (a - 1) (1 - t)) = t / (t + a (1 - t)):
    the odds t / (1 - t) of data against noise are divided by a.
    """
    return t / (t + shift * (1 - t))


def guided(
    conditional: Velocity, unconditional: Velocity, guidance: float, interval: tuple[float, float] = (0.0, 1.0)
) -> Velocity:
    """Classifier-free guidance (Ho 2022, arXiv 2207.12598): v_null + w (v_cond - v_null); w = 1 asks for v_cond alone.

    Guidance acts for t in ``interval``, both ends included (Kynkäänniemi 2024, arXiv 2404.07724, whose noise levels sigma are
    (1 - t) / t here). Elsewhere the velocity is v_cond, and v_null is asked for only where some t lies inside.
    """
    low, high = interval
    if guidance == 1.0:
        return conditional

    def velocity(x_BNC: Tensor, t_B: Tensor) -> Tensor:
        v_BNC = conditional(x_BNC, t_B)
        if interval == (0.0, 1.0):  # no look at t, which would wait for the GPU
            v_null = unconditional(x_BNC, t_B)
            return v_null + guidance * (v_BNC - v_null)
        inside_B = (t_B >= low) & (t_B <= high)
        if not bool(inside_B.any()):
            return v_BNC
        v_null = unconditional(x_BNC, t_B)
        return torch.where(inside_B[:, None, None], v_null + guidance * (v_BNC - v_null), v_BNC)

    return velocity


@dataclass(frozen=True)
class Gaussian:
    """Normal data around a mean: ``variances_R`` along orthonormal ``directions_RNC``, variance ``rest`` (a scalar) along all others.

    ``noise`` is the standard deviation of x0, which is normal around 0.
    """

    directions_RNC: Tensor
    variances_R: Tensor
    rest: Tensor
    noise: float = 1.0


def gaussian_velocity(
    x_BNC: Tensor, t_B: Tensor, data: Gaussian | None = None, mean_BNC: Tensor | None = None
) -> Tensor:
    """The mean velocity at x_t if data were normal around ``mean_BNC`` m (None: 0).

    It is m + slope (x_t - t m), and along a direction of variance v the slope is (t v - (1 - t) s^2) / (t^2 v + (1 - t)^2 s^2) for
    noise of standard deviation s. ``data`` None is v = s = 1. A network that predicts the rest need not learn to pass its input through (the idea of Karras
    2022, arXiv 2206.00364), nor, with ``data``, how latents vary together.
    """
    t_B11 = t_B[:, None, None]
    if mean_BNC is not None:
        return mean_BNC + gaussian_velocity(x_BNC - t_B11 * mean_BNC, t_B, data)
    if data is None:
        return _slope(torch.ones_like(t_B11), t_B11, 1.0) * x_BNC
    rest_B11 = _slope(data.rest, t_B11, data.noise)
    along_BR = torch.einsum("bnc,rnc->br", x_BNC, data.directions_RNC)
    more_BR = _slope(data.variances_R, t_B[:, None], data.noise) - rest_B11[..., 0]
    return rest_B11 * x_BNC + torch.einsum("br,rnc->bnc", more_BR * along_BR, data.directions_RNC)


def _slope(variance: Tensor, t: Tensor, noise: float) -> Tensor:
    from_noise = (1 - t) * noise**2
    return (t * variance - from_noise) / (t**2 * variance + (1 - t) * from_noise).clamp(min=_TINY)


def elapsed_gate(elapsed_years_B: Tensor, tau_years: float | None) -> Tensor:
    """1 - exp(-elapsed / tau), float32 [B]: exactly 0 at 0 years; 1 where the time is unknown (NaN) or ``tau_years`` is None."""
    if tau_years is None:
        return torch.ones_like(elapsed_years_B, dtype=torch.float32)
    return (-torch.expm1(-elapsed_years_B.float() / tau_years)).nan_to_num(1.0)


@torch.no_grad()
def integrate(velocity: Velocity, x0_BNC: Tensor, steps: int, sampler: Sampler = "heun", shift: float = 1.0) -> Tensor:
    """Solve dx/dt = velocity(x, t) from t = 0 to 1 in ``steps`` steps, equal ones before they are ``shifted``; float32 [B, N, C].

    euler: first order, one velocity a step. heun: second order, two. multistep: second order, one, and one more in the first
    step, which is Heun's: Adams-Bashforth (Hairer 1993, III.1 and III.5 for unequal steps) goes on along the line through this
    velocity and the last. Raises ValueError for steps < 1, shift <= 0 or an unknown sampler.
    """
    if steps < 1 or shift <= 0 or sampler not in get_args(Sampler):
        raise ValueError(
            f"steps {steps} must be >= 1, shift {shift} > 0 and sampler '{sampler}' one of {', '.join(get_args(Sampler))}"
        )
    x_BNC = x0_BNC.float()
    times = [shifted(i / steps, shift) for i in range(steps + 1)]
    last_BNC, last_h = x_BNC, 0.0
    for t, then in zip(times[:-1], times[1:], strict=True):
        h = then - t
        v_BNC = velocity(x_BNC, x_BNC.new_full((len(x_BNC),), t))
        if sampler == "heun" or (sampler == "multistep" and last_h == 0):
            ahead_BNC = velocity(x_BNC + h * v_BNC, x_BNC.new_full((len(x_BNC),), then))
            step_BNC = (v_BNC + ahead_BNC) / 2
        elif sampler == "multistep":
            step_BNC = v_BNC + h / (2 * last_h) * (v_BNC - last_BNC)
        else:
            step_BNC = v_BNC
        x_BNC = x_BNC + h * step_BNC
        last_BNC, last_h = v_BNC, h
    return x_BNC


@torch.no_grad()
def invert(velocity: Velocity, x1_BNC: Tensor, steps: int, corrections: int = 8) -> Tensor:
    """The x0 that ``integrate(velocity, x0, steps, "heun")`` takes to ``x1_BNC``; float32 [B, N, C].

    Each step backward is an Euler step and ``corrections`` fixed-point iterations of Heun's step, 1 + 2 ``corrections``
    velocities in all. The first correction makes it second order; each further one brings it nearer to the exact inverse of
    Heun's step by a factor of about (step length) x (Lipschitz constant of the velocity), which must be below 1 (fixed-point
    inversion, Meiri 2023, arXiv 2312.12540). Raises ValueError for steps or corrections < 1.
    """
    if steps < 1 or corrections < 1:
        raise ValueError(f"steps {steps} and corrections {corrections} must be >= 1")
    x_BNC = x1_BNC.float()
    h = 1.0 / steps
    for i in reversed(range(steps)):
        t_B = torch.full((len(x_BNC),), i * h, device=x_BNC.device)
        after_BNC = x_BNC
        x_BNC = after_BNC - h * velocity(after_BNC, t_B + h)
        for _ in range(corrections):
            v_BNC = velocity(x_BNC, t_B)
            x_BNC = after_BNC - h * (v_BNC + velocity(x_BNC + h * v_BNC, t_B + h)) / 2
    return x_BNC
