"""The forecaster: a flow that starts at the baseline scan's latent and ends at the follow-up's.

A stochastic interpolant with data-dependent coupling (Albergo 2024, arXiv 2310.03725).

With ``elapsed_gate`` everything that departs from the baseline b, the noise at the start and the velocity, is scaled by
g(elapsed) = 1 - exp(-elapsed / tau): x0 = b + g s n, velocity = g u(x, t). Then

- at 0 years x0 = b and the velocity is 0, so the forecast is the baseline, bit for bit, whatever the weights, the noise, the
  guidance and the sampler;
- what is trained is ordinary flow matching of r = (x - b) / g, from s n to (target - b) / g, so the gate biases nothing, and
  since change and gate both begin in proportion to time, what the network must predict stays of one size;
- for a bounded u, change grows continuously from 0, at most in proportion to elapsed / tau.

To keep the noise as it is at 0 years and subtract it from the velocity instead (velocity = g u - s n) would return the baseline
too, but it is not the velocity of any flow: for normal changes as wide as the noise the forecasts then spread half as wide as
the truth (0.49 of it, tests/unit/test_forecast.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from g3n.flow import elapsed_gate, integrate, path
from g3n.models.conditioning import VariableSet, drop_variables
from g3n.models.dit import DiT, DiTConfig
from g3n.models.gaussian import GaussianStart
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch, subject_of
from g3n.tasks.base import picture
from g3n.tasks.dit import (
    GAUSSIAN_LATENTS,
    DiTTask,
    DiTTaskConfig,
    check_levels,
    draw,
    open_space,
    training_times,
    velocity_errors,
)


@dataclass(frozen=True)
class ForecastTaskConfig(DiTTaskConfig):
    noise: float = 0.1  # standard deviation added to the standardized baseline at t = 0
    elapsed_gate: bool = False  # scale noise and velocity by a function of elapsed time that is 0 at 0 years
    history: int = 1  # scans of the past it reads: the baseline and those just before it, where there are any
    gate_years: float = 1.0  # tau: the gate is 0.63 there

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must be >= 0")
        if self.time_shift == "auto":
            raise ValueError("time_shift auto is for paths that start at noise, not at a baseline; give a number")
        if self.history < 1:
            raise ValueError(f"history {self.history} must be >= 1")
        if self.gate_years <= 0:
            raise ValueError(f"gate_years {self.gate_years} must be > 0")
        if "elapsed_years" not in self.net.variables:
            raise ValueError("net.variables needs elapsed_years (low, high): the time between the two scans")

    @property
    def tau_years(self) -> float | None:
        """``gate_years`` where there is a gate."""
        return self.gate_years if self.elapsed_gate else None


def keep_elapsed(variables: VariableSet, drop_BV: Tensor, tau_years: float | None) -> Tensor:
    """Where there is a gate, the time it goes by is never dropped: neither in training nor for guidance."""
    if tau_years is None:
        return drop_BV
    column_V = torch.tensor([name == "elapsed_years" for name in variables.names], device=drop_BV.device)
    return drop_BV & ~column_V


def with_elapsed(variables: list[dict[str, Any]], elapsed_years_B: Tensor) -> list[dict[str, Any]]:
    """The target's variables and the years since the baseline."""
    return [{**v, "elapsed_years": float(e)} for v, e in zip(variables, elapsed_years_B, strict=True)]


def gated(model: Callable[..., Tensor], gate_B: Tensor) -> Callable[..., Tensor]:
    """``model`` with its velocity times ``gate_B``."""
    return lambda *inputs: gate_B[:, None, None] * model(*inputs)


def start_from(baseline_BNC: Tensor, noise_BNC: Tensor, std: float, gate_B: Tensor) -> Tensor:
    """x0 float32 [B, N, C]: the baseline and its noise."""
    return baseline_BNC + std * gate_B[:, None, None] * noise_BNC


def forecast_net(net: DiTConfig, noise: float, history: int, gate_years: float | None) -> DiT:
    """``gate_years`` None is a forecaster without a gate."""
    return DiT(net, source_channels(net.channels, history), noise, gate_years)


def source_channels(channels: int, history: int) -> int:
    """Channels the network reads beside x_t."""
    return channels + (history - 1) * (channels + 2)


def with_history(baseline_BNC: Tensor, earlier_BHNC: Tensor, years_BH: Tensor) -> Tensor:
    """The baseline's channels, and of each earlier visit, the latest first, its latent, the decades from it to the baseline and
    a mask: [B, N, C + H (C + 2)]. Latents are standardized; a visit whose years are NaN is missing, all its channels 0."""
    known_BH11 = ~years_BH.isnan()[..., None, None]
    latents_BHNC = torch.where(known_BH11, earlier_BHNC, 0.0)
    one_BHN1 = torch.ones_like(latents_BHNC[..., :1]) * known_BH11
    decades_BHN1 = one_BHN1 * (years_BH.nan_to_num(0.0) / 10)[..., None, None]
    channels_BHNK = torch.cat([latents_BHNC, decades_BHN1, one_BHN1], dim=-1)
    return torch.cat([baseline_BNC, *channels_BHNK.unbind(1)], dim=-1)


class ForecastTask:
    """Velocity matching from a baseline latent to a follow-up latent of the same subject and modality."""

    Config = ForecastTaskConfig
    name = "forecast"
    unit = "pairs"
    kind: Literal["pair"] = "pair"
    history: int

    def __init__(self, config: ForecastTaskConfig, index: ShardIndex) -> None:
        self.config, self.index, self.history = config, index, config.history
        self.space = open_space(config, index)
        self.variables = VariableSet(config.net.variables)
        check_levels(self.variables, index)

    def build(self) -> nn.Module:
        config = self.config
        net = forecast_net(config.net, config.noise, config.history, config.tau_years)
        net.latent_mean.copy_(self.space.mean)
        net.latent_scale.copy_(self.space.scale)
        if net.start is not None:
            self._fit(net.start)
        return net

    def _fit(self, start: GaussianStart) -> None:
        """On up to ``GAUSSIAN_LATENTS`` dated pairs, first and last visits, of the train split."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        subjects: list[str] = []
        device = self.space.mean.device
        for batch in eval_batches(self.index, None, "pair", "train", micro_batch=8, rank=0, world=1, seed=0):
            used_B = (batch.weights > 0) & batch.tensors["elapsed_years"].isfinite()
            pair = [self.space.standardize(batch.tensors[k].to(device))[used_B].cpu() for k in ("baseline", "target")]
            parts.append((pair[0], pair[1], self._conditions(batch)[used_B]))
            subjects += [subject_of(key) for key, used in zip(batch.keys, used_B, strict=True) if used]
            if len(subjects) >= GAUSSIAN_LATENTS:
                break
        baseline_PNC, target_PNC, cond_PV = (torch.cat(part) for part in zip(*parts, strict=True))
        start.fit(target_PNC, cond_PV, subjects, baseline_PNC)

    frozen = DiTTask.frozen
    artifact = DiTTask.artifact

    def _start(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(baseline, noisy start, target latents, t, dropped variables)."""
        baseline = self.space.standardize(batch.tensors["baseline"])
        target = self.space.standardize(batch.tensors["target"])
        config = self.config
        shape = (baseline.shape[1], baseline.shape[2])
        draws = draw(batch.seeds, len(self.variables.names), shape, config.drop_each, config.drop_all)
        device = baseline.device
        start = start_from(baseline, draws.noise.to(device), config.noise, self._gate(batch))
        return baseline, start, target, draws.t.to(device), keep_elapsed(self.variables, draws.drop, config.tau_years)

    def _source(self, batch: Batch, baseline_BNC: Tensor) -> Tensor:
        """What the network reads beside x_t."""
        if self.config.history == 1:
            return baseline_BNC
        earlier = self.space.standardize(batch.tensors["earlier"])
        return with_history(baseline_BNC, earlier, batch.tensors["earlier_years"])

    def _gate(self, batch: Batch) -> Tensor:
        """[B]; of the true elapsed time, also where the network's copy of it is dropped."""
        return elapsed_gate(batch.tensors["elapsed_years"], self.config.tau_years)

    def _conditions(self, batch: Batch) -> Tensor:
        elapsed_B = batch.tensors["elapsed_years"]  # a meta tensor, of which only shapes are asked, has no values
        return self.variables.encode(
            with_elapsed(batch.variables, torch.zeros(len(batch)) if elapsed_B.is_meta else elapsed_B.cpu())
        )

    def _errors(self, model: nn.Module, batch: Batch, training: bool) -> Tensor:
        baseline, start, target, t_B, drop_BV = self._start(batch)
        cond_BV = self._conditions(batch)
        config, scale_C = self.config, None
        if training:
            cond_BV, t_B = drop_variables(cond_BV, drop_BV), training_times(config, t_B)
            scale_C = self.space.scale if config.channel_weights == "variance" else None
        xt_BNC, velocity_BNC = path(start, target, t_B)
        read = self._source(batch, baseline)
        predicted = gated(model, self._gate(batch))(xt_BNC, t_B, cond_BV.to(xt_BNC.device), read)
        return velocity_errors(predicted, velocity_BNC, scale_C)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        errors = self._errors(model, batch, training=True)
        return errors.mean(), {"velocity": errors.detach()}

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        baseline, target = (self.space.standardize(batch.tensors[k]) for k in ("baseline", "target"))
        return {
            "velocity": self._errors(model, batch, training=False),
            "no_change": (baseline - target).square().mean(dim=(1, 2)),
        }

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Baseline, follow-up and forecast, all decoded."""
        baseline, start, target, _, _ = self._start(batch)
        cond_BV = self._conditions(batch).to(start.device)
        velocity, source = gated(model, self._gate(batch)), self._source(batch, baseline)
        drawn = integrate(
            lambda x, t: velocity(x, t, cond_BV, source), start, steps=20, sampler="euler", shift=self.config.shift
        )
        shown = [self.space.decode(z) for z in (baseline, target, drawn)]
        return {"forecast": picture(torch.stack(shown, dim=1))}
