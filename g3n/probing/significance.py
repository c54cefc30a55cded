"""Is a probe better than chance, and is one better than another?

Out-of-fold scores are not independent: scan i trains the probe that scores scan m, and m the one that scores i. Where features say
nothing, each such pair counts twice, and the variance of a figure is twice that of as many independent scans. Tests that take folds
or scans for independent then call 10 to 15 % of nulls significant at 5 %, the corrected resampled t-test (Nadeau and Bengio 2003,
https://doi.org/10.1023/A:1024068626366) up to 9 % (tests/unit/test_probing_fits.py, docs/log.md). So

- chance: labels are permuted, and probes fitted again to every permutation. Labels stay within their fold, which makes the training
  sets' features, and so the inverses, the same for all of them. One scan of each family takes part: those are exchangeable. Such a
  test is exact whatever the probe (Ojala and Garriga 2010, https://www.jmlr.org/papers/v11/ojala10a.html); the probe here is
  least squares with a ridge for classes too, because a thousand logistic fits cost hours.
- two probes: the difference of AUROC has the variance of its influence on people (DeLong 1988, https://doi.org/10.2307/2531595),
  that of absolute errors the variance over people, both for people who did not train the probe. Where probes have something to
  learn and many to learn from that is the variance (Bayle 2020, arXiv 2007.12671); where they have not, twice. 2.5 times is taken,
  which holds the level for 60 people too: p is conservative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import norm, rankdata

from g3n.probing.fits import PENALTIES, prepare

PERMUTATIONS = 999
_AT_ONCE = 250
_DEPENDENCE = 2.5  # of the variance of out-of-fold figures to that of independent scans; 2 where there are many people


def chance_p(
    features_ND: np.ndarray,
    y_N: np.ndarray,
    classes: int,
    fold_N: np.ndarray,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float:
    """p of "features say nothing of y", one row a person (or family): numbers, or codes of ``classes``; at least 1 / (permutations + 1).

    The statistic is the correlation of out-of-fold ridge predictions with y within folds (of each class's indicator, the mean over
    classes), the best over penalties, for the labels as they are and permuted alike.
    """
    x, _ = prepare(features_ND)
    if len(x) < x.shape[1]:  # the axes that these people span, which keeps all distances
        values, vectors = np.linalg.eigh(x @ x.T)
        x = np.ascontiguousarray(vectors * np.sqrt(np.maximum(values, 0)), np.float32)
    codes = np.arange(classes) if classes > 2 else np.array([1])
    y_NC = (y_N[:, None] == codes) if classes > 1 else y_N[:, None]
    y_NC = ((y_NC - y_NC.mean(axis=0)) / np.maximum(y_NC.std(axis=0), 1e-12)).astype(np.float32)
    rows = [np.flatnonzero(fold_N == f) for f in range(int(fold_N.max()) + 1)]
    probes = [_Probe(x, [other for other in rows if other is not own], own) for own in rows]
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for begin in range(0, permutations + 1, _AT_ONCE):
        count = min(_AT_ONCE, permutations + 1 - begin)
        order = np.empty((count, len(x)), np.int64)
        for own in rows:
            order[:, own] = rng.permuted(np.tile(own, (count, 1)), axis=1)
        if begin == 0:
            order[0] = np.arange(len(x))
        found.append(_statistic(x, y_NC[order].transpose(1, 0, 2), rows, probes))
    value = np.concatenate(found)
    return float((value >= value[0] - 1e-6 * abs(value[0])).mean())


class _Probe:
    """The inverses of one training set, for every penalty."""

    def __init__(self, x_ND: np.ndarray, training: Sequence[np.ndarray], own: np.ndarray) -> None:
        train = x_ND[np.concatenate(training)]
        self.training_mean = train.mean(axis=0)
        self.tested = x_ND[own] - self.training_mean
        centered = train - self.training_mean
        gram = centered.T @ centered
        step = np.arange(len(gram))
        self.factors = []
        for alpha in PENALTIES:
            a = gram.copy()
            a[step, step] += np.float32(alpha * len(train))
            self.factors.append(cho_factor(a, lower=True, overwrite_a=True, check_finite=False))


def _statistic(x_ND: np.ndarray, y_NPC: np.ndarray, rows: Sequence[np.ndarray], probes: Sequence[_Probe]) -> np.ndarray:
    """[P], for labels of each of P permutations."""
    n, p, c = y_NPC.shape
    flat = np.ascontiguousarray(y_NPC.reshape(n, p * c))
    products = [x_ND[own].T @ flat[own] for own in rows]
    sums = [flat[own].sum(axis=0) for own in rows]
    total = np.zeros((len(PENALTIES), p * c))
    for f, (own, probe) in enumerate(zip(rows, probes, strict=True)):
        right = sum(q for g, q in enumerate(products) if g != f)
        right = right - probe.training_mean[:, None] * sum(s for g, s in enumerate(sums) if g != f)
        y = flat[own] - flat[own].mean(axis=0)
        spread = np.sqrt((y**2).sum(axis=0))
        for i, factor in enumerate(probe.factors):
            score = probe.tested @ cho_solve(factor, right, check_finite=False)
            score -= score.mean(axis=0)
            scale = spread * np.sqrt((score**2).sum(axis=0))
            total[i] += len(own) * np.divide((score * y).sum(axis=0), scale, out=np.zeros_like(scale), where=scale > 0)
    return np.asarray(total.reshape(len(PENALTIES), p, c).mean(axis=2).max(axis=0) / n)


def auroc_influence(
    score_NC: np.ndarray, code_N: np.ndarray, classes: int, fold_N: np.ndarray
) -> tuple[float, np.ndarray]:
    """AUROC (of the second class of two, else the mean of one against the rest) of pairs within folds, and each scan's influence on
    it [N]: these sum to 0 within folds, and their squares to n^2 times the variance (DeLong's, over n - 1 of each class and fold)."""
    n = len(code_N)
    value, influence = 0.0, np.zeros(n)
    ones = [1] if classes == 2 else list(range(classes))
    for c in ones:
        s, positive = score_NC[:, 0 if classes == 2 else c], code_N == c
        parts = []
        for f in np.unique(fold_N):
            rows = np.flatnonzero(fold_N == f)
            p, q = int(positive[rows].sum()), int((~positive[rows]).sum())
            if p and q:
                parts.append((rows, p, q, *_placements(s[rows], positive[rows])))
        pairs = sum(p * q for _, p, q, _, _ in parts)
        for rows, p, q, area, above in parts:
            share = p * q / pairs / len(ones)
            value += share * area
            size = np.where(positive[rows], p, q)
            influence[rows] += share * n * (above - area) / np.sqrt(size * np.maximum(size - 1, 0.5))
    return value, influence


def _placements(score_N: np.ndarray, positive_N: np.ndarray) -> tuple[float, np.ndarray]:
    """Area, and for each scan the share of the other class that it is on the right side of."""
    p, q = positive_N.sum(), (~positive_N).sum()
    own = np.zeros(len(score_N))
    for members in (positive_N, ~positive_N):
        own[members] = rankdata(score_N[members])
    beaten = rankdata(score_N) - own
    above = np.where(positive_N, beaten / q, 1 - beaten / p)
    return float(above[positive_N].mean()), above


def paired_z(differences_R: Sequence[float], influence_RG: Sequence[np.ndarray]) -> float:
    """z of the mean over repeats of a difference; ``influence_RG``: of each person (or family) on it, as a sum over their scans
    divided by the number of scans [G]."""
    difference = float(np.mean(differences_R))
    influence = np.mean(influence_RG, axis=0)
    m = len(influence)
    error = float(np.sqrt(_DEPENDENCE * (influence**2).sum() * m / max(m - 1, 1)))
    if error > 1e-9 * abs(difference):
        return difference / error
    return difference * np.sqrt(
        1.5 * m
    )  # no variance is left to see, as of a perfect probe and a constant one: that of chance


def p_different(z: float) -> float:
    """Two-sided."""
    return float(min(1.0, 2 * norm.sf(abs(z))))


def corrected(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` (Holm 1979) and ``q_bh`` (Benjamini and Hochberg 1995) to rows of one family of tests; p None stays out."""
    from statsmodels.stats.multitest import multipletests

    tested = [row for row in rows if row["p"] is not None]
    for row in rows:
        row |= {"p_holm": None, "q_bh": None}
    for name, method in (("p_holm", "holm"), ("q_bh", "fdr_bh")):
        if tested:
            found = multipletests([row["p"] for row in tested], method=method)[1]
            for row, value in zip(tested, found, strict=True):
                row[name] = float(value)
