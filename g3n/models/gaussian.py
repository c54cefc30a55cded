"""How latents vary together: the normal distribution that is nearest to those of a train split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from g3n.flow import Gaussian

HELD_OUT = 5  # every fifth subject tells how much of a new person lies outside the directions
LEAST_VARIANCE = 1e-4


def fit_gaussian(latent_PNC: Tensor, subjects: Sequence[str], rank: int) -> Gaussian:
    """Principal components of standardized latents float32 [P, N, C] (mean 0), float32.

    With few scans and many numbers, what is outside the ``rank`` directions looks far smaller in the scans they come from than it is
    in others: ``rest`` is measured on a fifth of the subjects with directions of the others. Raises ValueError for a ``rank``
    that the latents do not have, or fewer than ``HELD_OUT`` subjects.
    """
    people = sorted(set(subjects))
    if len(people) < HELD_OUT or not 0 < rank < min(len(latent_PNC), latent_PNC[0].numel()):
        raise ValueError(
            f"rank {rank} needs more than {rank} latents of at least {HELD_OUT} subjects, not {len(latent_PNC)} of {len(people)}"
        )
    flat_PD = latent_PNC.double().flatten(1)
    apart = set(people[::HELD_OUT])
    out_P = torch.tensor([subject in apart for subject in subjects])
    kept_PD, new_PD = flat_PD[~out_P], flat_PD[out_P]
    directions_RD, _ = _components(kept_PD, min(rank, len(kept_PD) - 1))
    left_PD = new_PD - (new_PD @ directions_RD.T) @ directions_RD
    rest = float(left_PD.square().sum()) / (len(new_PD) * (flat_PD.shape[1] - len(directions_RD)))
    directions_RD, variances_R = _components(flat_PD, rank)
    return Gaussian(
        directions_RD.view(rank, *latent_PNC.shape[1:]).float(),
        variances_R.clamp(min=LEAST_VARIANCE).float(),
        torch.tensor(max(rest, LEAST_VARIANCE), dtype=torch.float32),
    )


def _components(x_PD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(orthonormal directions [R, D], variance along each [R]) of the second moments of ``x_PD``, the widest first."""
    values, vectors_PP = np.linalg.eigh((x_PD @ x_PD.T).numpy())
    values, vectors_PP = values[::-1][:rank].copy(), vectors_PP[:, ::-1][:, :rank].copy()
    scale_R = torch.from_numpy(np.sqrt(np.maximum(values, 1e-12 * values[0])))
    directions_RD = (torch.from_numpy(vectors_PP).T @ x_PD) / scale_R[:, None]
    return directions_RD, torch.from_numpy(np.maximum(values, 0)) / len(x_PD)
