"""Flow matching on straight paths (Lipman 2023, arXiv 2210.02747) and its samplers.

The path runs from x0 at t = 0 (noise, or a baseline's latent for a forecast: Albergo 2024, arXiv 2310.03725) to data x1 at
t = 1: x_t = (1 - t) x0 + t x1 with velocity x1 - x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_BNC, t_B) -> float32 [B, N, C]
Sampler = Literal["euler", "heun"]


def path(x0_BNC: Tensor, x1_BNC: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, velocity), each [B, N, C]."""
    t_B11 = t_B[:, None, None]
    return (1 - t_B11) * x0_BNC + t_B11 * x1_BNC, x1_BNC - x0_BNC


def guided(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance (Ho 2022, arXiv 2207.12598): v_null + w (v_cond - v_null); w = 1 asks for v_cond alone."""
    if guidance == 1.0:
        return conditional

    def velocity(x_BNC: Tensor, t_B: Tensor) -> Tensor:
        v_null = unconditional(x_BNC, t_B)
        return v_null + guidance * (conditional(x_BNC, t_B) - v_null)

    return velocity


def gaussian_velocity(x_BNC: Tensor, t_B: Tensor) -> Tensor:
    """The mean velocity at x_t if data were standard normal like the noise: (2t - 1) / (t^2 + (1 - t)^2) x_t.

    A network that predicts the rest need not learn to pass its input through (the idea of Karras 2022, arXiv 2206.00364).
    """
    t_B11 = t_B[:, None, None]
    return (2 * t_B11 - 1) / (t_B11**2 + (1 - t_B11) ** 2) * x_BNC


@torch.no_grad()
def integrate(velocity: Velocity, x0_BNC: Tensor, steps: int, sampler: Sampler = "heun") -> Tensor:
    """Solve dx/dt = velocity(x, t) from t = 0 to 1 in ``steps`` equal steps; float32 [B, N, C].

    Heun takes two velocities a step (second order), Euler one. Raises ValueError for steps < 1 or an unknown sampler.
    """
    if steps < 1 or sampler not in ("euler", "heun"):
        raise ValueError(f"steps {steps} must be >= 1 and sampler '{sampler}' one of euler, heun")
    x_BNC = x0_BNC.float()
    h = 1.0 / steps
    for i in range(steps):
        t_B = torch.full((len(x_BNC),), i * h, device=x_BNC.device)
        v_BNC = velocity(x_BNC, t_B)
        if sampler == "heun":
            v_BNC = (v_BNC + velocity(x_BNC + h * v_BNC, t_B + h)) / 2
        x_BNC = x_BNC + h * v_BNC
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
