"""Using a trained generator or forecaster: conditions in, volumes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from g3n.config import G3nError, build
from g3n.flow import Sampler, guided, integrate
from g3n.latent import LatentSpace, freeze, pick_device
from g3n.models.conditioning import VariableSet
from g3n.models.dit import DiT
from g3n.models.pretrained import Run, load_weights, open_run
from g3n.nifti import Grid
from g3n.tasks.base import randn_like_samples
from g3n.tasks.dit import DiTTaskConfig
from g3n.tasks.forecast import ForecastTaskConfig


@dataclass(frozen=True)
class Generator:
    """A trained flow with everything needed to turn conditions into volumes."""

    model: nn.Module
    space: LatentSpace
    variables: VariableSet
    grid: Grid
    run: Run
    device: torch.device
    start_noise: float = 1.0  # standard deviation of the noise at t = 0


def open_generator(run_path: str | Path, device: str | None = None) -> Generator:
    """A finished ``dit`` run, EMA weights. Raises G3nError for a missing run or a tokenizer other than its own."""
    run = open_run(run_path, "dit")
    config = build(DiTTaskConfig, run.config["model"], "model")
    return _open(run, config, DiT(config.net), 1.0, device)


def open_forecaster(run_path: str | Path, device: str | None = None) -> Generator:
    """A finished ``forecast`` run, EMA weights."""
    run = open_run(run_path, "forecast")
    config = build(ForecastTaskConfig, run.config["model"], "model")
    return _open(run, config, DiT(config.net, source_channels=config.net.channels), config.noise, device)


def _open(run: Run, config: DiTTaskConfig, model: DiT, noise: float, device: str | None) -> Generator:
    where = pick_device(device)
    load_weights(model, run.weights, source=str(run.path))
    space = LatentSpace.open(config.tokenizer, {"mean": model.latent_mean, "scale": model.latent_scale}, where)
    if space.tokenizer_fingerprint != run.artifact["tokenizer"]:
        raise G3nError(
            f"'{run.path}' was trained on latents of tokenizer {run.artifact['tokenizer']}, but '{config.tokenizer}' is "
            f"{space.tokenizer_fingerprint}; restore that tokenizer or train again"
        )
    grid = build(Grid, run.artifact["grid"], "grid")
    return Generator(freeze(model).to(where), space, VariableSet(config.net.variables), grid, run, where, noise)


def _solve(
    generator: Generator,
    start_BNC: Tensor,
    cond_BV: Tensor,
    steps: int,
    guidance: float,
    sampler: Sampler,
    *source: Tensor,
) -> Tensor:
    """Integrate from ``start_BNC``; standardized latents float32 [B, N, C]. bf16 arithmetic on a GPU."""
    null_BV = torch.full_like(cond_BV, torch.nan)

    def velocity(cond: Tensor) -> Any:
        def call(x_BNC: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(x_BNC.device.type, torch.bfloat16, enabled=x_BNC.is_cuda):
                return generator.model(x_BNC, t_B, cond, *source)

        return call

    return integrate(guided(velocity(cond_BV), velocity(null_BV), guidance), start_BNC, steps, sampler)


@torch.no_grad()
def sample_latents(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> Iterator[Tensor]:
    """Standardized latents float32 [B, N, C] on the generator's device, ``batch`` conditions at a time, in order.

    The noise of a latent depends on its seed alone: the same seed under two conditions is a counterfactual pair.
    Raises G3nError for an unknown variable or a value out of range, before anything is computed.
    """
    for condition in conditions:
        generator.variables.check(condition)
    shape = tuple(generator.space.mean.shape)
    for i in range(0, len(conditions), batch):
        cond_BV = generator.variables.encode(conditions[i : i + batch]).to(generator.device)
        noise = randn_like_samples(torch.tensor(seeds[i : i + batch]), shape).to(generator.device)
        yield _solve(generator, noise, cond_BV, steps, guidance, sampler)


@torch.no_grad()
def sample(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> Iterator[np.ndarray]:
    """One z-scored float32 [X, Y, Z] volume a condition, in order: ``sample_latents``, decoded."""
    for latents in sample_latents(generator, conditions, seeds, steps, guidance, sampler, batch):
        yield from generator.space.decode(latents).cpu().numpy()


@torch.no_grad()
def forecast(
    generator: Generator,
    volume: np.ndarray,
    baseline: Mapping[str, Any],
    targets: Sequence[Mapping[str, Any]],
    elapsed_years: Sequence[float],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 1.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> Iterator[np.ndarray]:
    """One z-scored float32 [X, Y, Z] follow-up a target.

    volume: the baseline scan, float32 [X, Y, Z] raw intensities on ``generator.grid``, background 0. ``targets`` say what
    differs from ``baseline`` at the follow-up (age, diagnosis). Raises G3nError as ``sample`` does.
    """
    conditions = [{**baseline, **t, "elapsed_years": float(e)} for t, e in zip(targets, elapsed_years, strict=True)]
    for condition in conditions:
        generator.variables.check(condition)
    brain = volume[volume != 0]
    if brain.size == 0 or float(brain.std()) == 0:
        raise G3nError("the baseline scan is empty or constant on the model's grid; check its affine and orientation")
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None].to(generator.device)
    mean, rstd = (torch.tensor([float(s)], device=generator.device) for s in (brain.mean(), 1 / brain.std()))
    latent_1NC = generator.space.encode(x, mean, rstd)
    for i in range(0, len(conditions), batch):
        cond_BV = generator.variables.encode(conditions[i : i + batch]).to(generator.device)
        noise = randn_like_samples(torch.tensor(seeds[i : i + batch]), tuple(latent_1NC.shape[1:])).to(generator.device)
        source = latent_1NC.expand(len(cond_BV), -1, -1)
        start = source + generator.start_noise * noise
        made = _solve(generator, start, cond_BV, steps, guidance, sampler, source)
        yield from generator.space.decode(made).cpu().numpy()
