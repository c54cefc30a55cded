"""The clinical variables: a table of names, their encoding as numbers with a null state, and their embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from g3n.config import G3nError, did_you_mean


@dataclass(frozen=True)
class Variable:
    """A class variable (``levels``) or a number (``low`` to ``high``, the allowed range)."""

    levels: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if bool(self.levels) == (self.low is not None or self.high is not None):
            raise ValueError("give either levels (a class) or low and high (a number)")
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels {self.levels} repeat a name")
        if not self.levels and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError(f"low {self.low} must be below high {self.high}")

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of a number."""
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high


@dataclass(frozen=True)
class VariableSet:
    """An ordered table of variables; any may be missing (null)."""

    table: dict[str, Variable]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.table)

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """The levels of each class variable."""
        return {name: v.levels for name, v in self.table.items() if v.levels}

    def check(self, conditions: Mapping[str, Any]) -> None:
        """Raise G3nError for an unknown variable, an unknown level or a number out of range; None means null."""
        for name, value in conditions.items():
            if name not in self.table:
                raise G3nError(f"unknown variable '{name}'{did_you_mean(name, self.names)}")
            self._number(name, value)

    def encode(self, conditions: Sequence[Mapping[str, Any]]) -> Tensor:
        """float32 [B, V]: a level's number or a number's value, NaN for null. Names outside the table are ignored.

        Raises G3nError as ``check`` does.
        """
        rows = [[self._number(name, c.get(name)) for name in self.table] for c in conditions]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self.table))

    def _number(self, name: str, value: Any) -> float:
        variable = self.table[name]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return math.nan
        if variable.levels:
            if str(value) not in variable.levels:
                raise G3nError(f"{name} is '{value}'{did_you_mean(str(value), variable.levels)}")
            return float(variable.levels.index(str(value)))
        low, high = variable.bounds
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise G3nError(f"{name} is '{value}'; expected a number from {low:g} to {high:g}") from None
        if not low <= number <= high:
            raise G3nError(f"{name} is {number:g}; allowed range is {low:g} to {high:g}")
        return number


def drop_variables(cond_BV: Tensor, drop_BV: Tensor) -> Tensor:
    """Null the variables where ``drop_BV`` is True."""
    return cond_BV.masked_fill(drop_BV, math.nan)


def fourier(t_B: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding float32 [B, width] of t in [0, 1] (times 1000), as in DiT."""
    half = width // 2
    omega = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angle = 1000.0 * t_B.float()[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class NumberEmbedding(nn.Module):
    """A number in its range as slow Fourier features, projected and layer-normed; a learned vector for null.

    Only slow waves: with fast ones the network could tell two ages apart without ordering them, and did (docs/log.md).
    """

    def __init__(self, variable: Variable, width: int) -> None:
        super().__init__()
        self.low, self.high = variable.bounds
        self.project = nn.Sequential(nn.Linear(7, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, value_B: Tensor) -> Tensor:
        u_B1 = ((value_B.nan_to_num(self.low) - self.low) / (self.high - self.low))[:, None]
        angle_B3 = math.pi * u_B1 * torch.tensor([0.5, 1.0, 2.0], device=u_B1.device)
        features_B7 = torch.cat([2 * u_B1 - 1, angle_B3.sin(), angle_B3.cos()], dim=1)
        embedded_BD = self.norm(self.project(features_B7.to(self.null.dtype)))
        return torch.where(value_B.isnan()[:, None], self.null, embedded_BD)


class ClassEmbedding(nn.Module):
    """One learned vector a level and one for null."""

    def __init__(self, variable: Variable, width: int) -> None:
        super().__init__()
        self.null = len(variable.levels)
        self.table = nn.Embedding(self.null + 1, width)
        nn.init.normal_(self.table.weight, std=0.5)

    def forward(self, value_B: Tensor) -> Tensor:
        return self.table(torch.where(value_B.isnan(), float(self.null), value_B).long())


class Conditioning(nn.Module):
    """Time and variables -> one conditioning vector [B, D].

    Time and numbers are layer-normed so that the class embeddings do not swamp them.
    """

    def __init__(self, variables: VariableSet, width: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.variables = nn.ModuleDict(
            {n: (ClassEmbedding if v.levels else NumberEmbedding)(v, width) for n, v in variables.table.items()}
        )

    def forward(self, t_B: Tensor, cond_BV: Tensor) -> Tensor:
        dtype = next(self.time.parameters()).dtype
        c_BD = self.time(fourier(t_B, 256).to(dtype))
        for i, embed in enumerate(self.variables.values()):
            c_BD = c_BD + embed(cond_BV[:, i])
        return F.silu(c_BD)
