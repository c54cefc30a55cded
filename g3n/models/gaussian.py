"""What simple statistics tell of latents: a mean that is linear in the variables, and how they vary together around it.

A DiT that begins there (``gaussian_rank``) spends its steps on what is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from g3n.flow import Gaussian, gaussian_velocity
from g3n.models.conditioning import VariableSet

HELD_OUT = 5  # every fifth subject tells how much of a new person lies outside the directions
LEAST_VARIANCE = 1e-4
PENALTY = 5.0  # of the means' ridge regression: as much as so many scans
INTERACTS = (
    "modality"  # what a variable does to intensities depends on it: ventricles are dark in a T1 and bright in a T2
)


class GaussianStart(nn.Module):
    """The velocity of normal latents [N, C] under the variables: a mean linear in them, ``rank`` directions of covariance.

    Nothing of it is trained; ``fit`` fills it. A null variable counts as its mean over the train split, so what it would have
    explained is missing from the covariance, and left to the network.
    """

    center_K: Tensor
    means_LNC: Tensor
    directions_RNC: Tensor
    variances_R: Tensor
    rest: Tensor

    def __init__(self, variables: VariableSet, tokens: int, channels: int, rank: int) -> None:
        super().__init__()
        self.variables = variables
        names = variables.names
        one, columns = torch.zeros(1, len(names)), self._columns(torch.zeros(1, len(names))).shape[1]
        self.register_buffer("center_K", torch.zeros(columns))
        self.register_buffer("means_LNC", torch.zeros(self._design(one).shape[1], tokens, channels))
        self.register_buffer("directions_RNC", torch.zeros(rank, tokens, channels))
        self.register_buffer("variances_R", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))

    def _columns(self, cond_BV: Tensor) -> Tensor:
        """[B, K]: one column a level, the value and its square of a number; NaN where the variable is null."""
        found = []
        for i, variable in enumerate(self.variables.table.values()):
            value_B = cond_BV[:, i].float()
            if variable.levels:
                levels_L = torch.arange(len(variable.levels), device=value_B.device)
                found.append(torch.where(value_B.isnan()[:, None], torch.nan, (value_B[:, None] == levels_L).float()))
            else:
                low, high = variable.bounds
                u_B = 2 * (value_B - low) / (high - low) - 1
                found.append(torch.stack([u_B, u_B**2], dim=1))
        return torch.cat(found, dim=1)

    def _design(self, cond_BV: Tensor) -> Tensor:
        """[B, L]: columns around their means, 0 where null; and the products of each with the levels of ``INTERACTS``."""
        columns_BK = (self._columns(cond_BV) - self.center_K).nan_to_num(0.0)
        if INTERACTS not in self.variables.levels:
            return columns_BK
        value_B = cond_BV[:, self.variables.names.index(INTERACTS)]
        level_BM = (
            value_B[:, None] == torch.arange(len(self.variables.levels[INTERACTS]), device=value_B.device)
        ).float()
        return torch.cat([columns_BK, (level_BM[:, :, None] * columns_BK[:, None]).flatten(1)], dim=1)

    @torch.no_grad()
    def fit(self, latent_PNC: Tensor, cond_PV: Tensor, subjects: Sequence[str]) -> None:
        """From standardized latents float32 [P, N, C] and encoded variables [P, V] of the train split.

        With few scans and many numbers, what is outside the directions looks far smaller in the scans they come from than it is
        in others: ``rest`` is measured on a fifth of the subjects with directions of the others. Fewer than ``HELD_OUT`` subjects
        tell nothing, and it stays the standard normal distribution. Directions that the latents do not have stay 0 and add nothing.
        """
        people = sorted(set(subjects))
        if len(people) < HELD_OUT:
            return
        columns_PK = self._columns(cond_PV)
        self.center_K.copy_(columns_PK.nanmean(dim=0).nan_to_num(0.0))
        design_PL, flat_PD = self._design(cond_PV).double(), latent_PNC.double().flatten(1)
        gram_LL = design_PL.T @ design_PL + PENALTY * torch.eye(design_PL.shape[1], dtype=torch.float64)
        means_LD = torch.linalg.solve(gram_LL, design_PL.T @ flat_PD)
        self.means_LNC.copy_(means_LD.view_as(self.means_LNC))
        flat_PD = flat_PD - design_PL @ means_LD
        apart = set(people[::HELD_OUT])
        out_P = torch.tensor([subject in apart for subject in subjects])
        rank = len(self.variances_R)
        directions_RD, _ = components(flat_PD[~out_P], rank)
        new_PD = flat_PD[out_P]
        left_PD = new_PD - (new_PD @ directions_RD.T) @ directions_RD
        rest = float(left_PD.square().sum()) / max(1, len(new_PD) * (flat_PD.shape[1] - len(directions_RD)))
        self.rest.fill_(max(rest, LEAST_VARIANCE))
        directions_RD, variances_R = components(flat_PD, rank)
        self.directions_RNC[: len(variances_R)] = directions_RD.view(-1, *latent_PNC.shape[1:]).float()
        self.variances_R[: len(variances_R)] = variances_R.clamp(min=LEAST_VARIANCE).float()

    def mean(self, cond_BV: Tensor) -> Tensor:
        """float32 [B, N, C]."""
        return torch.einsum("bl,lnc->bnc", self._design(cond_BV), self.means_LNC)

    def forward(self, x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor) -> Tensor:
        """float32 [B, N, C]."""
        data = Gaussian(self.directions_RNC, self.variances_R, self.rest)
        return gaussian_velocity(x_BNC.float(), t_B.float(), data, self.mean(cond_BV))


def components(x_PD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(orthonormal directions [R, D], variance along each [R]) of the second moments of ``x_PD``, the widest first; at most ``rank``."""
    values_P, vectors_PP = torch.linalg.eigh(x_PD @ x_PD.T)
    told = int((values_P > 1e-9 * values_P[-1]).sum())  # the rest is rounding
    values_R, vectors_PR = (v.flip(-1)[..., : min(rank, told)] for v in (values_P, vectors_PP))
    return (vectors_PR.T @ x_PD) / values_R.sqrt()[:, None], values_R / len(x_PD)
