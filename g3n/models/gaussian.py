"""What simple statistics tell of latents: a mean that is linear in the variables, and how they vary together around it.

A DiT that begins there (``gaussian_rank``) spends its steps on what is left. For a forecaster it is the change since the
baseline, whose mean is linear in the baseline's principal components too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from g3n.flow import Gaussian, elapsed_gate, gaussian_velocity
from g3n.models.conditioning import VariableSet

HELD_OUT = 5  # every fifth subject tells how much of a new person lies outside the directions
LEAST_VARIANCE = 1e-4
# of the means' ridge regression, in scans; the best by leave-one-out is taken
PENALTIES = (1.0, 5.0, 25.0, 125.0, 625.0, 3125.0)
SOURCE_RANK = 32  # principal components of the baseline; 8 and 16 forecast ventricles less well (docs/log.md)
LEAST_GATE = 1e-3
# what a variable does to intensities depends on it: ventricles are dark in a T1 and bright in a T2
INTERACTS = "modality"


class GaussianStart(nn.Module):
    """The velocity of normal latents [N, C] under the variables: a mean linear in them, ``rank`` directions of covariance.

    Nothing of it is trained; ``fit`` fills it. Its directions are principal components of training scans: from few scans, they tell whom
    they came from (docs/results/demo.md). A null variable counts as its mean over the train split, so what it would have
    explained is missing from the covariance, and left to the network.

    For a forecaster (``of_change``) data is the change since the baseline over the gate of the elapsed time (``gate_years``, see
    tasks/forecast.py), and the noise at the start has the standard deviation ``noise``. With ``rank`` 0 draws differ by that noise
    alone: how widely changes spread is left to training.
    """

    center_K: Tensor
    scale_K: Tensor
    means_LNC: Tensor
    directions_RNC: Tensor
    variances_R: Tensor
    rest: Tensor
    source_SNC: Tensor

    def __init__(
        self,
        variables: VariableSet,
        tokens: int,
        channels: int,
        rank: int,
        of_change: bool = False,
        noise: float = 1.0,
        gate_years: float | None = None,
    ) -> None:
        super().__init__()
        self.variables, self.of_change, self.noise, self.gate_years = variables, of_change, noise, gate_years
        self.register_buffer("source_SNC", torch.zeros(SOURCE_RANK if of_change else 0, tokens, channels))
        columns = sum(len(v.levels) or 2 for v in variables.table.values()) + len(self.source_SNC)
        products = 1 + len(variables.levels.get(INTERACTS, ()))
        self.register_buffer("center_K", torch.zeros(columns))
        self.register_buffer("scale_K", torch.ones(columns))
        self.register_buffer("means_LNC", torch.zeros((columns + of_change) * products, tokens, channels))
        self.register_buffer("directions_RNC", torch.zeros(rank, tokens, channels))
        self.register_buffer("variances_R", torch.ones(rank))
        self.register_buffer("rest", torch.ones(()))

    def _columns(self, cond_BV: Tensor, source_BNC: Tensor | None) -> Tensor:
        """[B, K]: one column a level, the value and its square of a number, the baseline's components; NaN where null."""
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
        if source_BNC is not None:
            found.append(torch.einsum("bnc,snc->bs", source_BNC.float(), self.source_SNC))
        return torch.cat(found, dim=1)

    def _design(self, cond_BV: Tensor, source_BNC: Tensor | None) -> Tensor:
        """[B, L]: columns around their means in units of their spread, 0 where null, and their products with the levels of ``INTERACTS``."""
        columns_BK = ((self._columns(cond_BV, source_BNC) - self.center_K) / self.scale_K).nan_to_num(0.0)
        if self.of_change:  # whose mean is not 0, as that of standardized latents is
            columns_BK = torch.cat([columns_BK, torch.ones_like(columns_BK[:, :1])], dim=1)
        if INTERACTS not in self.variables.levels:
            return columns_BK
        value_B = cond_BV[:, self.variables.names.index(INTERACTS)]
        level_BM = (
            value_B[:, None] == torch.arange(len(self.variables.levels[INTERACTS]), device=value_B.device)
        ).float()
        return torch.cat([columns_BK, (level_BM[:, :, None] * columns_BK[:, None]).flatten(1)], dim=1)

    @torch.no_grad()
    def fit(
        self, latent_PNC: Tensor, cond_PV: Tensor, subjects: Sequence[str], source_PNC: Tensor | None = None
    ) -> None:
        """From standardized latents float32 [P, N, C] (of a forecaster: follow-ups) and encoded variables [P, V] of the train split.

        With few scans and many numbers, what is outside the directions looks far smaller in the scans they come from than it is
        in others: ``rest`` is measured on a fifth of the subjects with directions of the others. Fewer than ``HELD_OUT`` subjects
        tell nothing, and it stays the standard normal distribution. Directions that the latents do not have stay 0 and add nothing.
        """
        people = sorted(set(subjects))
        if len(people) < HELD_OUT:
            return
        flat_PD = latent_PNC.double().flatten(1)
        gate_P1 = torch.ones(len(flat_PD), 1, dtype=torch.float64)
        if source_PNC is not None:
            flat_PD = flat_PD - source_PNC.double().flatten(1)
            gate_P1 = self._gate(cond_PV).double()[:, None]
            directions_SD, _ = components(source_PNC.double().flatten(1), SOURCE_RANK)
            self.source_SNC[: len(directions_SD)] = directions_SD.view(-1, *source_PNC.shape[1:]).float()
        columns_PK = self._columns(cond_PV, source_PNC)
        self.center_K.copy_(columns_PK.nanmean(dim=0).nan_to_num(0.0))
        spread_K = (columns_PK - self.center_K).square().nanmean(dim=0).sqrt().nan_to_num(0.0)
        self.scale_K.copy_(torch.where(spread_K > 1e-6, spread_K, 1.0))
        # a change is its mean times the gate: that is what is regressed, so that short times do not shout
        size = gate_P1.square().mean().sqrt().clamp(min=LEAST_GATE)
        design_PL = gate_P1 / size * self._design(cond_PV, source_PNC).double()
        means_LD = ridge(design_PL, flat_PD)
        self.means_LNC.copy_((means_LD / size).view_as(self.means_LNC))
        flat_PD = (flat_PD - design_PL @ means_LD) / size
        rank = len(self.variances_R)
        if rank == 0:
            self.rest.fill_(self.noise**2)
            return
        apart = set(people[::HELD_OUT])
        out_P = torch.tensor([subject in apart for subject in subjects])
        directions_RD, _ = components(flat_PD[~out_P], rank)
        new_PD = flat_PD[out_P]
        left_PD = new_PD - (new_PD @ directions_RD.T) @ directions_RD
        rest = float(left_PD.square().sum()) / max(1, len(new_PD) * (flat_PD.shape[1] - len(directions_RD)))
        self.rest.fill_(max(rest, LEAST_VARIANCE))
        directions_RD, variances_R = components(flat_PD, rank)
        self.directions_RNC[: len(variances_R)] = directions_RD.view(-1, *latent_PNC.shape[1:]).float()
        self.variances_R[: len(variances_R)] = variances_R.clamp(min=LEAST_VARIANCE).float()

    def mean(self, cond_BV: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        """float32 [B, N, C]."""
        return torch.einsum("bl,lnc->bnc", self._design(cond_BV, source_BNC), self.means_LNC)

    def _gate(self, cond_BV: Tensor) -> Tensor:
        """[B], 1 where the time is not known."""
        return elapsed_gate(cond_BV[:, self.variables.names.index("elapsed_years")], self.gate_years)

    def forward(self, x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        """float32 [B, N, C]; of a forecaster, whose ``source_BNC`` is the baseline, before the gate."""
        data = Gaussian(self.directions_RNC, self.variances_R, self.rest, self.noise)
        with torch.autocast(x_BNC.device.type, enabled=False):  # sums of many numbers of very different sizes
            x_BNC = x_BNC.float()
            if source_BNC is not None:
                x_BNC = (x_BNC - source_BNC.float()) / self._gate(cond_BV).clamp(min=LEAST_GATE)[:, None, None]
            return gaussian_velocity(x_BNC, t_B.float(), data, self.mean(cond_BV, source_BNC))


def ridge(x_PL: Tensor, y_PD: Tensor) -> Tensor:
    """[L, D]: ridge regression without a constant, float64, with the one of ``PENALTIES`` that predicts rows left out best."""
    u_PL, s_L, v_LL = torch.linalg.svd(x_PL, full_matrices=False)
    along_LD = u_PL.T @ y_PD
    found = []
    for penalty in PENALTIES:
        kept_L = s_L**2 / (s_L**2 + penalty)
        left_PD = y_PD - u_PL @ (kept_L[:, None] * along_LD)
        influence_P = (u_PL**2) @ kept_L
        found.append(float((left_PD / (1 - influence_P)[:, None].clamp(min=1e-9)).square().sum()))
    penalty = PENALTIES[found.index(min(found))]
    return v_LL.T @ ((s_L / (s_L**2 + penalty))[:, None] * along_LD)


def components(x_PD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(orthonormal directions [R, D], variance along each [R]) of the second moments of ``x_PD``, the widest first; at most ``rank``."""
    values_P, vectors_PP = torch.linalg.eigh(x_PD @ x_PD.T)
    told = int((values_P > 1e-9 * values_P[-1]).sum())  # the rest is rounding
    values_R, vectors_PR = (v.flip(-1)[..., : min(rank, told)] for v in (values_P, vectors_PP))
    return (vectors_PR.T @ x_PD) / values_R.sqrt()[:, None], values_R / len(x_PD)
