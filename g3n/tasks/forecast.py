"""The forecaster: a flow that starts at the baseline scan's latent and ends at the follow-up's.

A stochastic interpolant with data-dependent coupling (Albergo 2024, arXiv 2310.03725).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from g3n.flow import integrate, path
from g3n.models.conditioning import VariableSet, drop_variables
from g3n.models.dit import DiT
from g3n.stream.index import ShardIndex
from g3n.stream.samples import Batch
from g3n.tasks.base import picture
from g3n.tasks.dit import DiTTask, DiTTaskConfig, check_levels, draw, open_space, training_times, velocity_errors


@dataclass(frozen=True)
class ForecastTaskConfig(DiTTaskConfig):
    noise: float = 0.1  # standard deviation added to the standardized baseline at t = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise < 0:
            raise ValueError(f"noise {self.noise} must be >= 0")
        if self.time_shift == "auto":
            raise ValueError("time_shift auto is for paths that start at noise, not at a baseline; give a number")
        if "elapsed_years" not in self.net.variables:
            raise ValueError("net.variables needs elapsed_years (low, high): the time between the two scans")


def with_elapsed(variables: list[dict[str, Any]], elapsed_years_B: Tensor) -> list[dict[str, Any]]:
    """The target's variables and the years since the baseline."""
    return [{**v, "elapsed_years": float(e)} for v, e in zip(variables, elapsed_years_B, strict=True)]


class ForecastTask:
    """Velocity matching from a baseline latent to a follow-up latent of the same subject and modality."""

    Config = ForecastTaskConfig
    name = "forecast"
    unit = "pairs"
    kind: Literal["pair"] = "pair"

    def __init__(self, config: ForecastTaskConfig, index: ShardIndex) -> None:
        self.config, self.index = config, index
        self.space = open_space(config, index)
        self.variables = VariableSet(config.net.variables)
        check_levels(self.variables, index)

    def build(self) -> nn.Module:
        net = DiT(self.config.net, source_channels=self.config.net.channels)
        net.latent_mean.copy_(self.space.mean)
        net.latent_scale.copy_(self.space.scale)
        return net

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
        start = baseline + config.noise * draws.noise.to(device)
        return baseline, start, target, draws.t.to(device), draws.drop

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
        return velocity_errors(model(xt_BNC, t_B, cond_BV.to(xt_BNC.device), baseline), velocity_BNC, scale_C)

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
        drawn = integrate(
            lambda x, t: model(x, t, cond_BV, baseline), start, steps=20, sampler="euler", shift=self.config.shift
        )
        shown = [self.space.decode(z) for z in (baseline, target, drawn)]
        return {"forecast": picture(torch.stack(shown, dim=1))}
