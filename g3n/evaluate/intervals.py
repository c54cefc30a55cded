"""Figures with the uncertainty of who happened to be scanned: bootstrap over subjects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Statistic = Callable[..., float]  # (column, ...) -> a number; each column [n]
DRAWS = 1000
LEVEL = 0.95
_AT_ONCE = 1 << 21  # counts of a block of draws


@dataclass(frozen=True)
class Interval:
    """A figure, its percentile interval, and what it rests on. Ends are NaN where fewer than two subjects are there."""

    value: float
    low: float
    high: float
    n: int  # rows
    subjects: int

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def bootstrap(
    statistic: Statistic,
    *columns: Sequence[float] | np.ndarray,
    subjects: Sequence[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """``statistic(*columns)`` and its percentile interval under resampling of subjects (Efron 1979), ``LEVEL`` wide.

    columns: each [n]. ``subjects`` names the subject of each row; rows of one subject come and go together, because several
    scans of one person are not several people (default: each row is a subject). A draw whose statistic is NaN, such as a
    correlation of one subject drawn n times, is left out. Raises ValueError for columns of different lengths or no rows.
    """
    arrays = [np.asarray(column) for column in columns]
    n = len(arrays[0])
    names = np.arange(n) if subjects is None else np.asarray([str(s) for s in subjects])
    if n == 0 or any(len(a) != n for a in [*arrays, names]):
        raise ValueError(
            f"columns have {[len(a) for a in arrays]} rows and {len(names)} subjects; expected as many, at least 1"
        )
    value = float(statistic(*arrays))
    _, of_row = np.unique(names, return_inverse=True)
    rows = [np.flatnonzero(of_row == s) for s in range(of_row.max() + 1)]
    if len(rows) < 2:
        return Interval(value, float("nan"), float("nan"), n, len(rows))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        chosen = np.concatenate([rows[s] for s in rng.integers(len(rows), size=len(rows))])
        drawn.append(float(statistic(*(a[chosen] for a in arrays))))
    found = np.asarray(drawn)[np.isfinite(drawn)]
    if not len(found):
        return Interval(value, float("nan"), float("nan"), n, len(rows))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n, len(rows))


def resampled(
    statistics: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    subjects: int,
    n: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """``bootstrap`` of many figures at once, from how often each subject is drawn: same draws, same intervals.

    ``statistics`` takes counts float64 [B, subjects], of which all 1 are the people as they are, and returns figures [B] by name;
    ``n`` is how many rows the intervals are to name. Raises ValueError for no subjects.
    """
    if subjects < 1:
        raise ValueError("no subjects to draw from")
    whole = {name: float(value[0]) for name, value in statistics(np.ones((1, subjects))).items()}
    if subjects < 2:
        return {name: Interval(value, float("nan"), float("nan"), n, subjects) for name, value in whole.items()}
    rng = np.random.default_rng(seed)
    block = max(1, _AT_ONCE // subjects)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in whole}
    for begin in range(0, draws, block):
        picks = (rng.integers(subjects, size=subjects) for _ in range(min(block, draws - begin)))
        counts = np.stack([np.bincount(p, minlength=subjects) for p in picks]).astype(np.float64)
        for name, value in statistics(counts).items():
            drawn[name].append(value)
    found = {}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        ends = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(values) else (float("nan"),) * 2
        found[name] = Interval(whole[name], float(ends[0]), float(ends[1]), n, subjects)
    return found


def mean(values: Sequence[float] | np.ndarray, subjects: Sequence[Any] | None = None, seed: int = 0) -> Interval:
    """Mean over rows with its interval."""
    return bootstrap(np.mean, values, subjects=subjects, seed=seed)
