"""The generator: flow matching from noise to latents under the clinical variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from g3n.config import G3nError
from g3n.flow import integrate, path, shifted
from g3n.latent import LatentSpace
from g3n.models.conditioning import VariableSet, drop_variables
from g3n.models.dit import DiT, DiTConfig
from g3n.models.gaussian import GaussianStart
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.remote import read_file
from g3n.stream.samples import Batch, subject_of
from g3n.tasks.base import picture, sample_generator

MAX_STATISTICS_BYTES = 1 << 28
GAUSSIAN_LATENTS = 4096
BASE_NUMBERS = 4096  # of the latent that time_shift "auto" takes for unshifted, as arXiv 2510.11690 does


@dataclass(frozen=True)
class DiTTaskConfig:
    tokenizer: str  # the decoder run whose latents these are
    net: DiTConfig
    drop_each: float = 0.1  # probability to null one variable
    drop_all: float = 0.1  # probability to null all of them (classifier-free guidance)
    time_law: Literal["uniform", "logit_normal"] = "uniform"  # of t in training, see training_times
    time_power: float = 1.0  # t = u^time_power, u uniform; above 1 trains more near the noise, where variables decide
    time_mean: float = 0.0  # of logit(t) under logit_normal; below 0 trains more near the noise
    time_std: float = 1.0
    time_shift: float | Literal["auto"] = 1.0  # above 1: t of training and sampling nearer the noise, see flow.shifted
    channel_weights: Literal["none", "variance"] = "none"  # variance: the loss of raw latents, see velocity_errors

    def __post_init__(self) -> None:
        if not (0 <= self.drop_each < 1 and 0 <= self.drop_all < 1):
            raise ValueError(f"drop_each {self.drop_each} and drop_all {self.drop_all} must lie in [0, 1)")
        if self.time_power <= 0:
            raise ValueError(f"time_power {self.time_power} must be > 0")
        if self.time_law == "logit_normal" and self.time_power != 1:
            raise ValueError(
                f"time_power {self.time_power} belongs to time_law uniform; with logit_normal give time_mean"
            )
        if self.time_std <= 0:
            raise ValueError(f"time_std {self.time_std} must be > 0")
        if self.time_shift != "auto" and self.time_shift <= 0:
            raise ValueError(f"time_shift {self.time_shift} must be > 0, or auto")

    @property
    def shift(self) -> float:
        """``time_shift`` as a number. "auto" is sqrt(N C / 4096) for latents of N tokens of C channels.

        RAE (arXiv 2510.11690, 4.2) counts the channels of a token as well as the tokens, because each of them gets noise of
        its own, and takes the 4096 from Esser 2024 (arXiv 2403.03206): 3.06 for 1200 x 32, 1.08 for 150 x 32. It is a rule
        of thumb from images, not measured on brains.
        """
        if self.time_shift != "auto":
            return self.time_shift
        return math.sqrt(math.prod(self.net.tokens) * self.net.channels / BASE_NUMBERS)


@dataclass(frozen=True)
class Draws:
    """What chance decides for each sample: t [B], dropped variables [B, V], noise [B, N, C]."""

    t: Tensor
    drop: Tensor
    noise: Tensor


def draw(seeds_B: Tensor, n_variables: int, shape: tuple[int, int], each: float, all_: float) -> Draws:
    """Draws on the CPU, row b from ``seeds_B[b]`` alone."""
    t, drop, noise = [], [], []
    for seed in seeds_B:
        generator = sample_generator(int(seed))
        u = torch.rand(2 + n_variables, generator=generator)
        t.append(u[0])
        drop.append((u[2:] < each) | (u[1] < all_))
        noise.append(torch.randn(shape, generator=generator))
    return Draws(torch.stack(t), torch.stack(drop), torch.stack(noise))


def training_times(config: DiTTaskConfig, u_B: Tensor) -> Tensor:
    """Times t in [0, 1] of training samples, float32 [B], from uniform numbers ``u_B``, each from its own sample's seed.

    uniform: u^time_power. logit_normal (Esser 2024, arXiv 2403.03206): logit(t) is normal with ``time_mean`` (Esser's m
    with its sign turned, as t is) and ``time_std``, by the inverse of the normal distribution at u. Both are then shifted.
    """
    if config.time_law == "logit_normal":
        t_B = torch.sigmoid(config.time_mean + config.time_std * torch.special.ndtri(u_B))
    else:
        t_B = u_B**config.time_power
    return t_B if config.shift == 1 else shifted(t_B, config.shift)


def velocity_errors(predicted_BNC: Tensor, velocity_BNC: Tensor, scale_C: Tensor | None = None) -> Tensor:
    """Mean squared error of each sample, float32 [B], over tokens and channels of standardized latents.

    With ``scale_C`` (LatentSpace's) it is that of raw latents but for a constant: standardizing makes all channels count alike,
    and an error e there is scale * e in a raw latent, so the weights are scale^2 / mean(scale^2), whose mean is 1.
    """
    squared_BNC = (predicted_BNC - velocity_BNC).square()
    if scale_C is not None:
        squared_BNC = squared_BNC * (scale_C.square() / scale_C.square().mean())
    return squared_BNC.mean(dim=(1, 2))


def open_space(config: DiTTaskConfig, index: ShardIndex) -> LatentSpace:
    """The latent space whose latents ``index`` holds. Raises G3nError where tokenizer and latents do not belong together."""
    if index.kind != "latent":
        raise G3nError(
            f"shards '{index.url}' hold {index.kind}s, expected latents; run python -m data_prep encode first"
        )
    statistics = mixed_statistics([(_statistics(source.url), source.weight) for source in index.sources])
    space = LatentSpace.open(config.tokenizer, statistics)
    made_by = index.raw["tokenizer"]["fingerprint"]
    if made_by != space.tokenizer_fingerprint:
        raise G3nError(
            f"latents '{index.url}' were encoded by tokenizer {made_by}, but '{config.tokenizer}' is "
            f"{space.tokenizer_fingerprint}; encode again or name the tokenizer that made them"
        )
    if space.mean.shape != (int(np.prod(config.net.tokens)), config.net.channels):
        raise G3nError(
            f"latents are {tuple(space.mean.shape)}, but model.net.tokens {config.net.tokens} and channels "
            f"{config.net.channels} ask for {(int(np.prod(config.net.tokens)), config.net.channels)}"
        )
    return space


def _statistics(url: str) -> dict[str, Tensor]:
    try:
        return load(read_file(f"{url}/statistics.safetensors", MAX_STATISTICS_BYTES))
    except (OSError, SafetensorError) as error:
        raise G3nError(
            f"latents '{url}' have no statistics.safetensors; run python -m data_prep encode again"
        ) from error


def mixed_statistics(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """``mean`` [N, C] and ``scale`` [C] of latents mixed by weight (weights sum to 1), from those of each part."""
    weights_S = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
    mean_SNC = torch.stack([part["mean"].double() for part, _ in parts])
    scale_SC = torch.stack([part["scale"].double() for part, _ in parts])
    mean_NC = torch.einsum("s,snc->nc", weights_S, mean_SNC)
    variance_SC = scale_SC**2 + (mean_SNC - mean_NC).square().mean(dim=1)
    return {"mean": mean_NC.float(), "scale": torch.einsum("s,sc->c", weights_S, variance_SC).sqrt().float()}


def check_levels(variables: VariableSet, index: ShardIndex) -> None:
    """Raise G3nError for a level in the shards that the config's table does not know."""
    for name, levels in variables.levels.items():
        unknown = set(index.variables.get(name, ())) - set(levels)
        if unknown:
            raise G3nError(
                f"shards '{index.url}' have {name} '{min(unknown)}', which model.net.variables.{name}.levels lacks "
                f"({', '.join(levels)}); add it to the config"
            )


class DiTTask:
    """Velocity matching from standard normal noise."""

    Config = DiTTaskConfig
    name = "dit"
    unit = "latents"
    kind: Literal["latent"] = "latent"
    history = 1

    def __init__(self, config: DiTTaskConfig, index: ShardIndex) -> None:
        self.config, self.index = config, index
        self.space = open_space(config, index)
        self.variables = VariableSet(config.net.variables)
        check_levels(self.variables, index)

    def build(self) -> nn.Module:
        net = DiT(self.config.net)
        net.latent_mean.copy_(self.space.mean)
        net.latent_scale.copy_(self.space.scale)
        if net.start is not None:
            self._fit(net.start)
        return net

    def _fit(self, start: GaussianStart) -> None:
        """On up to ``GAUSSIAN_LATENTS`` latents of the train split."""
        latents: list[Tensor] = []
        conditions: list[Tensor] = []
        subjects: list[str] = []
        for batch in eval_batches(self.index, None, "latent", "train", micro_batch=8, rank=0, world=1, seed=0):
            used_B = batch.weights > 0
            latents.append(self.space.standardize(batch.tensors["latent"].to(self.space.mean.device))[used_B].cpu())
            conditions.append(self.variables.encode(batch.variables)[used_B])
            subjects += [subject_of(key) for key, used in zip(batch.keys, used_B, strict=True) if used]
            if len(subjects) >= GAUSSIAN_LATENTS:
                break
        start.fit(torch.cat(latents), torch.cat(conditions), subjects)

    def frozen(self) -> Mapping[str, nn.Module]:
        return {"space": self.space}

    def artifact(self) -> Mapping[str, Any]:
        return {
            "latents": self.index.fingerprint,
            "tokenizer": self.space.tokenizer_fingerprint,
            "shards": self.space.volumes_fingerprint,
            "grid": self.index.raw["grid"],
        }

    def _errors(self, model: nn.Module, batch: Batch, training: bool) -> Tensor:
        """Squared velocity error of each sample, float32 [B].

        In evaluation t is uniform and channels count alike, whatever training does, so that runs can be compared.
        """
        x1_BNC = self.space.standardize(batch.tensors["latent"])
        config = self.config
        shape = (x1_BNC.shape[1], x1_BNC.shape[2])
        draws = draw(batch.seeds, len(self.variables.names), shape, config.drop_each, config.drop_all)
        cond_BV = self.variables.encode(batch.variables)
        cond_BV = drop_variables(cond_BV, draws.drop) if training else cond_BV
        device = x1_BNC.device
        t_B = draws.t.to(device)
        t_B = training_times(config, t_B) if training else t_B
        xt_BNC, velocity_BNC = path(draws.noise.to(device), x1_BNC, t_B)
        scale_C = self.space.scale if training and config.channel_weights == "variance" else None
        return velocity_errors(model(xt_BNC, t_B, cond_BV.to(device)), velocity_BNC, scale_C)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        errors = self._errors(model, batch, training=True)
        return errors.mean(), {"velocity": errors.detach()}

    def eval_step(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"velocity": self._errors(model, batch, training=False)}

    def panels(self, model: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Real volumes (decoded) beside samples drawn under the same variables."""
        x1_BNC = self.space.standardize(batch.tensors["latent"])
        device = x1_BNC.device
        cond_BV = self.variables.encode(batch.variables).to(device)
        noise = draw(batch.seeds, 0, (x1_BNC.shape[1], x1_BNC.shape[2]), 0, 0).noise.to(device)
        drawn = integrate(lambda x, t: model(x, t, cond_BV), noise, steps=20, sampler="euler", shift=self.config.shift)
        return {"samples": picture(torch.stack([self.space.decode(x1_BNC), self.space.decode(drawn)], dim=1))}
