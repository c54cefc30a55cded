"""What a sweep may set: a distribution for each config key."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

MOST_CORNERS = 2048  # checked; of more, so many drawn ones
_FEW = 16  # values of a whole number that are all checked
_MOST_POINTS = 100_000  # of a grid


@dataclass(frozen=True)
class Dimension:
    """The values of one key: a range of floats or whole numbers with both ends, or a list."""

    type: Literal["float", "int", "categorical"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    step: float | None = None
    values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        ends = (self.low, self.high, self.step)
        if self.type == "categorical":
            if not self.values or self.log or any(end is not None for end in ends):
                raise ValueError("a categorical dimension has values and nothing else")
            if len({*map(label, self.values)}) < len(self.values):
                raise ValueError(f"values {list(self.values)} has one twice")
            return
        if self.values or self.low is None or self.high is None:
            raise ValueError(f"a dimension of type {self.type} has low and high, and no values")
        numbers = [end for end in ends if end is not None]
        if not all(map(math.isfinite, numbers)) or self.low >= self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}, both finite")
        if self.type == "int" and any(end != int(end) for end in numbers):
            raise ValueError(f"low {self.low:g}, high {self.high:g} and step of whole numbers must be whole")
        if self.step is not None and (self.step <= 0 or self.log):
            raise ValueError(f"step {self.step:g} must be above 0, and does not go with log")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 where log is true")

    def distribution(self) -> BaseDistribution:
        if self.type == "categorical":
            return CategoricalDistribution([label(value) for value in self.values])
        assert self.low is not None
        assert self.high is not None
        if self.type == "int":
            return IntDistribution(int(self.low), int(self.high), self.log, int(self.step or 1))
        return FloatDistribution(self.low, self.high, self.log, self.step)

    def value(self, chosen: Any) -> Any:
        """The config's value of what Optuna chose."""
        if self.type != "categorical":
            return chosen
        return next(value for value in self.values if label(value) == chosen)

    def points(self) -> list[Any] | None:
        """All values, as Optuna names them; None where there is a continuum."""
        if self.type == "categorical":
            return [label(value) for value in self.values]
        assert self.low is not None
        assert self.high is not None
        step = self.step if self.step is not None else 1.0
        if self.type == "float" and self.step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > _MOST_POINTS:
            return None
        found = [self.low + i * step for i in range(count)]
        return [int(x) for x in found] if self.type == "int" else found

    def corners(self) -> list[Any]:
        """Its ends, or every value where these are few."""
        points = self.points()
        if self.type == "categorical" or (self.type == "int" and points is not None and len(points) <= _FEW):
            return points or []
        ends = [self.low, self.high]
        return [int(end) for end in ends if end is not None] if self.type == "int" else ends

    def __str__(self) -> str:
        if self.type == "categorical":
            return " | ".join(map(str, map(label, self.values)))
        more = " log" if self.log else f" step {self.step:g}" if self.step is not None else ""
        return f"{self.type} {self.low:g} .. {self.high:g}{more}"


def label(value: Any) -> Any:
    """What stands for a value in Optuna, which knows scalars alone."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def corners(space: Mapping[str, Dimension], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Every combination of the dimensions' corners, or ``MOST_CORNERS`` drawn ones where there are more."""
    each = [dimension.corners() for dimension in space.values()]
    if math.prod(map(len, each)) <= MOST_CORNERS:
        found: Iterator[tuple[Any, ...]] = itertools.product(*each)
    else:
        rng = np.random.default_rng(seed)
        found = (tuple(values[rng.integers(len(values))] for values in each) for _ in range(MOST_CORNERS))
    return (dict(zip(space, combination, strict=True)) for combination in found)
