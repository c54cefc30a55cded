"""Means of per-sample figures by level of the clinical variables: which modality, cohort or decade of life is learned badly."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Sums = dict[str, tuple[float, float]]  # by name of a metric: (weighted sum, sum of weights)


class LevelSums:
    """Figures of samples as they come; they stay on their device until ``take``."""

    def __init__(self, only: Sequence[str] | None = None) -> None:
        """``only``: names of variables; all where None."""
        self._only = only
        self._figures: list[Tensor] = []  # [figures, B] of each batch
        self._names: list[str] = []
        self._samples: list[tuple[list[str], float]] = []  # levels and weight

    def add(self, figures: Mapping[str, Tensor], variables: Sequence[Mapping[str, Any]], weights: Tensor) -> None:
        """``figures`` by name, each [B], the same names in each call; ``weights`` [B] on the CPU, 0 for padding."""
        if not figures:
            return
        self._names = list(figures)
        self._figures.append(torch.stack([values.detach().float() for values in figures.values()]))
        self._samples += [(levels(v, self._only), w) for v, w in zip(variables, weights.tolist(), strict=True)]

    def take(self) -> Sums:
        """The sums since the last call, by ``<figure>_by_<variable>/<level>``; one copy to the host."""
        rows = torch.cat(self._figures, dim=1).tolist() if self._figures else []
        sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, row in zip(self._names, rows, strict=True):
            for value, (labels, weight) in zip(row, self._samples, strict=True):
                for label in labels if weight else ():
                    entry = sums[f"{name}_by_{label}"]
                    entry[0] += weight * value
                    entry[1] += weight
        self._figures, self._names, self._samples = [], [], []
        return {name: (total, weight) for name, (total, weight) in sums.items()}


def levels(variables: Mapping[str, Any], only: Sequence[str] | None = None) -> list[str]:
    """``variable/level`` of each class a sample is in, and its decade of life; what is missing is left out.

    MLflow takes letters, digits, and ``_-. /`` in a name: anything else becomes an underscore.
    """
    found = []
    for name, value in variables.items():
        if only is not None and name not in only:
            continue
        if isinstance(value, str):
            level = re.sub(r"[^A-Za-z0-9_. -]", "_", value)
        elif name == "age_years" and value is not None and math.isfinite(value):
            decade = int(value // 10) * 10
            level = f"{decade}-{decade + 9}"
        else:
            continue
        found.append(f"{name}/{level}")
    return found


def means(of_ranks: Sequence[Sums]) -> dict[str, float]:
    """The means over all ranks, by name in alphabetical order. Ranks may have met different levels."""
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for sums in of_ranks:
        for name, (total, weight) in sums.items():
            totals[name][0] += total
            totals[name][1] += weight
    return {name: totals[name][0] / totals[name][1] for name in sorted(totals)}
