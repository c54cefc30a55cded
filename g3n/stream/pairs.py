"""Which visits of a subject one sample uses: picked by the sample's seed in training, fixed in evaluation."""

from __future__ import annotations

import math
from typing import Literal

from g3n.stream.decode import Visit
from g3n.stream.index import Sample
from g3n.stream.order import keyed_hash

Kind = Literal["volume", "latent", "pair"]
DAYS_A_YEAR = 365.25


def usable(sample: Sample, kind: Kind) -> bool:
    """Whether a sample serves this kind: a pair needs two visits."""
    return kind != "pair" or sample.visits >= 2


def draw_visits(kind: Kind, visits: int, seed: int, history: int = 1) -> tuple[int, ...]:
    """One visit, or two in time order, uniform by ``seed`` over all visits or all pairs; () for volumes.

    Pairs with a ``history`` above 1 have the visits just before the baseline in front of it, ``history`` + 1 numbers in all, -1
    for a visit there is not.
    """
    if kind == "volume":
        return ()
    if kind == "latent":
        return (keyed_hash("visit", seed) % visits,)
    number = keyed_hash("pair", seed) % math.comb(visits, 2)
    pairs = [(i, j) for i in range(visits) for j in range(i + 1, visits)]
    return _with_history(*pairs[number], history)


def _with_history(baseline: int, target: int, history: int) -> tuple[int, ...]:
    return (*(max(baseline - k, -1) for k in range(history - 1, 0, -1)), baseline, target)


def fixed_visits(kind: Kind, visits: int, history: int = 1) -> list[tuple[int, ...]]:
    """What evaluation takes of a sample: the volume, every visit, or the pair of its first and last visit.

    With a ``history`` above 1 the baseline of a pair is as late as it must be to have its history, the last but one at most.
    """
    if kind == "volume":
        return [()]
    if kind == "latent":
        return [(i,) for i in range(visits)]
    return [_with_history(min(history - 1, visits - 2), visits - 1, history)]


def elapsed_years(baseline: Visit, target: Visit) -> float:
    """Years between two visits; NaN where a date is missing."""
    if baseline.days_from_baseline is None or target.days_from_baseline is None:
        return math.nan
    return (target.days_from_baseline - baseline.days_from_baseline) / DAYS_A_YEAR
