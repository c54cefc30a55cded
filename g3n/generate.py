"""Using a trained generator or forecaster: conditions in, volumes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g3n.config import G3nError, build
from g3n.flow import Sampler, elapsed_gate, guided, integrate
from g3n.latent import LatentSpace, freeze, pick_device
from g3n.models.conditioning import VariableSet, drop_variables
from g3n.models.dit import DiT
from g3n.models.pretrained import Run, load_weights, open_run
from g3n.nifti import Grid
from g3n.stream.index import ShardIndex, load_index
from g3n.tasks.base import randn_like_samples
from g3n.tasks.dit import DiTTaskConfig
from g3n.tasks.forecast import ForecastTaskConfig, forecast_net, gated, keep_elapsed, start_from, with_history


@dataclass(frozen=True)
class Generator:
    """A trained flow with everything needed to turn conditions into volumes."""

    model: Callable[..., Tensor]
    space: LatentSpace
    variables: VariableSet
    grid: Grid
    run: Run
    device: torch.device
    start_noise: float = 1.0  # standard deviation of the noise at t = 0
    shift: float = 1.0  # of the times it was trained at, and of the sampler's steps unless told otherwise
    history: int = 1  # scans a forecaster reads, the baseline among them
    gate_years: float | None = None  # of a forecaster whose change is gated by elapsed time


def open_generator(run_path: str | Path, device: str | None = None) -> Generator:
    """A finished ``dit`` run, EMA weights. Raises G3nError for a missing run or a tokenizer other than its own."""
    run = open_run(run_path, "dit")
    config = build(DiTTaskConfig, run.config["model"], "model")
    return _open(run, config, DiT(config.net), 1.0, device)


def open_forecaster(run_path: str | Path, device: str | None = None) -> Generator:
    """A finished ``forecast`` run, EMA weights."""
    run = open_run(run_path, "forecast")
    config = build(ForecastTaskConfig, run.config["model"], "model")
    opened = _open(
        run, config, forecast_net(config.net, config.noise, config.history, config.tau_years), config.noise, device
    )
    return replace(opened, history=config.history, gate_years=config.tau_years)


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
    return Generator(
        freeze(model).to(where), space, VariableSet(config.net.variables), grid, run, where, noise, config.shift
    )


def open_latents(generator: Generator, latents: str) -> ShardIndex:
    """Latent shards that the generator's tokenizer made. Raises G3nError for any others."""
    index = load_index(latents)
    if index.kind != "latent" or index.raw["tokenizer"]["fingerprint"] != generator.space.tokenizer_fingerprint:
        raise G3nError(f"'{latents}' are not latents of the tokenizer of '{generator.run.path}'; encode again")
    return index


def _solve(
    generator: Generator,
    start_BNC: Tensor,
    cond_BV: Tensor,
    steps: int,
    guidance: float,
    sampler: Sampler,
    *source: Tensor,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
) -> Tensor:
    """Integrate from ``start_BNC``; standardized latents float32 [B, N, C]. bf16 arithmetic on a GPU."""
    every_BV = torch.ones_like(cond_BV, dtype=torch.bool)
    null_BV = drop_variables(cond_BV, keep_elapsed(generator.variables, every_BV, generator.gate_years))

    def velocity(cond: Tensor) -> Any:
        def call(x_BNC: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(x_BNC.device.type, torch.bfloat16, enabled=x_BNC.is_cuda):
                return generator.model(x_BNC, t_B, cond, *source)

        return call

    flow = guided(velocity(cond_BV), velocity(null_BV), guidance, interval)
    return integrate(flow, start_BNC, steps, sampler, generator.shift if shift is None else shift)


@torch.no_grad()
def sample_latents(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
) -> Iterator[Tensor]:
    """Standardized latents float32 [b, N, C] of up to ``batch`` conditions at a time, in order, on the generator's device.

    The noise of a volume depends on its seed alone: the same seed under two conditions is a counterfactual pair.
    ``interval``: guidance acts for t in it (t = 0 is noise). ``shift`` of the steps (g3n.flow.shifted): None is that of training.
    Raises G3nError for an unknown variable or a value out of range, before anything is computed.
    """
    for condition in conditions:
        generator.variables.check(condition)
    shape = tuple(generator.space.mean.shape)
    for i in range(0, len(conditions), batch):
        cond_BV = generator.variables.encode(conditions[i : i + batch]).to(generator.device)
        noise = randn_like_samples(torch.tensor(seeds[i : i + batch]), shape).to(generator.device)
        yield _solve(generator, noise, cond_BV, steps, guidance, sampler, interval=interval, shift=shift)


def sample(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
) -> Iterator[np.ndarray]:
    """One z-scored float32 [X, Y, Z] volume a condition, in order: ``sample_latents`` decoded."""
    for latents_BNC in sample_latents(generator, conditions, seeds, steps, guidance, sampler, batch, interval, shift):
        yield from generator.space.decode(latents_BNC).cpu().numpy()


@torch.no_grad()
def encode_scan(space: LatentSpace, volume: np.ndarray) -> Tensor:
    """Standardized latents float32 [1, N, C] of a scan on the model's grid, raw intensities [X, Y, Z], background 0.

    Raises G3nError for an empty or constant scan.
    """
    brain = volume[volume != 0]
    if brain.size == 0 or float(brain.std()) == 0:
        raise G3nError("the scan is empty or constant on the model's grid; check its affine and orientation")
    device = space.mean.device
    x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None].to(device)
    mean, rstd = (torch.tensor([float(s)], device=device) for s in (brain.mean(), 1 / brain.std()))
    return space.encode(x, mean, rstd)


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
    earlier: Sequence[tuple[np.ndarray, float]] = (),
) -> Iterator[np.ndarray]:
    """One z-scored float32 [X, Y, Z] follow-up a target.

    volume: the baseline scan, float32 [X, Y, Z] raw intensities on ``generator.grid``, background 0. ``targets`` say what
    differs from ``baseline`` at the follow-up (age, diagnosis). ``earlier`` are scans before the baseline as ``volume``, the latest
    first, each with the years from it to the baseline; at most ``generator.history`` - 1. Raises G3nError as ``sample`` does.
    """
    conditions = [{**baseline, **t, "elapsed_years": float(e)} for t, e in zip(targets, elapsed_years, strict=True)]
    for condition in conditions:
        generator.variables.check(condition)
    latent_1NC = encode_scan(generator.space, volume)
    read_1NC = latent_1NC
    if generator.history > 1:
        missing = generator.history - 1 - len(earlier)
        latents = [encode_scan(generator.space, scan) for scan, _ in earlier] + [torch.zeros_like(latent_1NC)] * missing
        years = torch.tensor([[float(y) for _, y in earlier] + [math.nan] * missing], device=generator.device)
        read_1NC = with_history(latent_1NC, torch.stack(latents, dim=1), years)
    for i in range(0, len(conditions), batch):
        cond_BV = generator.variables.encode(conditions[i : i + batch]).to(generator.device)
        noise = randn_like_samples(torch.tensor(seeds[i : i + batch]), tuple(latent_1NC.shape[1:])).to(generator.device)
        source = latent_1NC.expand(len(cond_BV), -1, -1)
        gate_B = elapsed_gate(torch.tensor(elapsed_years[i : i + batch], device=source.device), generator.gate_years)
        start = start_from(source, noise, generator.start_noise, gate_B)
        gated_generator = replace(generator, model=gated(generator.model, gate_B))
        read = read_1NC.expand(len(cond_BV), -1, -1)
        latents_BNC = _solve(gated_generator, start, cond_BV, steps, guidance, sampler, read)
        yield from generator.space.decode(latents_BNC).cpu().numpy()
