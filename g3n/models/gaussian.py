"""How latents vary together: the normal distribution that is nearest to those of a train split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from g3n.flow import Gaussian

HELD_OUT = 5  # every fifth subject tells how much of a new person lies outside the directions
LEAST_VARIANCE = 1e-4


def fit_gaussian(latent_PNC: Tensor, subjects: Sequence[str], rank: int) -> Gaussian:
    """Principal components of standardized latents float32 [P, N, C] (mean 0): ``rank`` of them, or as many as there are.

    With few scans and many numbers, what is outside the ``rank`` directions looks far smaller in the scans they come from than it is
    in others: ``rest`` is measured on a fifth of the subjects with directions of the others. Fewer than ``HELD_OUT`` subjects tell
    nothing: the standard normal distribution, without directions.
    """
    people = sorted(set(subjects))
    if len(people) < HELD_OUT:
        return Gaussian(torch.zeros(0, *latent_PNC.shape[1:]), torch.zeros(0), torch.ones(()))
    flat_PD = latent_PNC.double().flatten(1)
    apart = set(people[::HELD_OUT])
    out_P = torch.tensor([subject in apart for subject in subjects])
    kept_PD, new_PD = flat_PD[~out_P], flat_PD[out_P]
    directions_RD, _ = _components(kept_PD, rank)
    left_PD = new_PD - (new_PD @ directions_RD.T) @ directions_RD
    rest = float(left_PD.square().sum()) / (len(new_PD) * (flat_PD.shape[1] - len(directions_RD)))
    directions_RD, variances_R = _components(flat_PD, rank)
    return Gaussian(
        directions_RD.view(-1, *latent_PNC.shape[1:]).float(),
        variances_R.clamp(min=LEAST_VARIANCE).float(),
        torch.tensor(max(rest, LEAST_VARIANCE), dtype=torch.float32),
    )


def _components(x_PD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(orthonormal directions [R, D], variance along each [R]) of the second moments of ``x_PD``, the widest first."""
    values_P, vectors_PP = torch.linalg.eigh(x_PD @ x_PD.T)
    told = int((values_P > 1e-9 * values_P[-1]).sum())  # the rest is rounding
    values_R, vectors_PR = (v.flip(-1)[..., : min(rank, told)] for v in (values_P, vectors_PP))
    return (vectors_PR.T @ x_PD) / values_R.sqrt()[:, None], values_R / len(x_PD)
