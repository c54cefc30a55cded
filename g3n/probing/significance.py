"""Is a probe better than chance, and is one better than another?

Out-of-fold scores of k-fold cross-validation are not independent: scan i trains the probe that scores scan m, and m the one that
scores i. Under the null, each such pair then counts twice, and tests that take the folds (or the scans) for independent reject
a true null two to three times as often as they say; the corrected resampled t-test (Nadeau and Bengio 2003,
https://doi.org/10.1023/A:1024068626366) assumes a smaller correlation than this.

So tests use forward scores: fold a is scored by the probe of folds 0 .. a-1 (prequential, Dawid 1984,
https://doi.org/10.2307/2981683). Given the earlier folds, that probe is fixed and the scans of fold a are new people, so

- chance: if features say nothing of the target, labels of fold a are exchangeable. The covariance of scores (or their ranks) and
  labels over all permutations has mean and variance in closed form (Hoeffding 1951, https://doi.org/10.1214/aoms/1177729545), and
- two probes: the difference of AUROC has the variance of its influence on people (DeLong 1988, https://doi.org/10.2307/2531595),
  that of absolute errors the variance over people.

Each gives a z with mean 0 and variance 1 given the past, whatever the probe and its penalty: a martingale, whose weighted sum over
folds has mean 0 and variance 1. The mean of z over repeats is at most as wide, so p holds its level, a little below.
Weights grow with the root of how many people trained and are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata
from scipy.stats import t as student


def chance_z(score_NC: np.ndarray, y_N: np.ndarray, classes: int) -> float:
    """z of AUROC (of the second class of two, else the mean of one against the rest) or of r over permutations of y [N]."""
    n = len(y_N)
    if n < 2:
        return 0.0
    if classes == 1:
        score, y = score_NC[:, 0] - score_NC[:, 0].mean(), y_N - y_N.mean()
        spread = (score**2).sum() * (y**2).sum() / (n - 1)
        return float((score @ y) / np.sqrt(spread)) if spread > 0 else 0.0
    code = y_N.astype(np.int64)
    counts = np.bincount(code, minlength=classes)
    gain = np.zeros((n, classes))  # what a scan adds to the statistic when it bears a label
    for c in [1] if classes == 2 else range(classes):
        if 0 < counts[c] < n:
            gain[:, c] = rankdata(score_NC[:, 0 if classes == 2 else c]) / (counts[c] * (n - counts[c]))
    share = counts / n
    off = gain - (gain @ share)[:, None] - gain.mean(axis=0) + gain.mean(axis=0) @ share
    variance = float((off**2 @ counts).sum() / (n - 1))
    found = gain[np.arange(n), code].sum() - n * float(gain.mean(axis=0) @ share)
    return float(found / np.sqrt(variance)) if variance > 1e-24 else 0.0


def auroc_influence(score_NC: np.ndarray, code_N: np.ndarray, classes: int) -> tuple[float, np.ndarray]:
    """AUROC as in ``chance_z`` and each scan's influence on it [N], which sum to 0 and whose squares sum to n^2 variances."""
    n = len(code_N)
    value, influence, used = 0.0, np.zeros(n), 0
    for c in [1] if classes == 2 else range(classes):
        s, positive = score_NC[:, 0 if classes == 2 else c], code_N == c
        p, q = int(positive.sum()), int((~positive).sum())
        if p and q:
            ranks = rankdata(s)
            above = np.where(positive, (ranks - _ranks(s, positive)) / q, 1 - (ranks - _ranks(s, ~positive)) / p)
            area = float(above[positive].mean())
            influence += np.where(positive, (above - area) * n / p, (above - area) * n / q)
            value += area
            used += 1
    return (value / used, influence / used) if used else (0.5, influence)


def _ranks(score_N: np.ndarray, own_N: np.ndarray) -> np.ndarray:
    """Rank of each scan among those of ``own_N`` (0 for others)."""
    out = np.zeros(len(score_N))
    out[own_N] = rankdata(score_N[own_N])
    return out


def paired_z(a_NC: np.ndarray, b_NC: np.ndarray, y_N: np.ndarray, classes: int, group_N: np.ndarray) -> float:
    """z of AUROC(a) - AUROC(b), or of the mean absolute error of b less that of a: above 0 where a is better. Scans of one
    group (a family) count as one observation."""
    if classes == 1:
        gain = np.abs(b_NC[:, 0] - y_N) - np.abs(a_NC[:, 0] - y_N)
        difference, influence = float(gain.mean()), gain - gain.mean()
    else:
        code = y_N.astype(np.int64)
        (area_a, of_a), (area_b, of_b) = (auroc_influence(s, code, classes) for s in (a_NC, b_NC))
        difference, influence = area_a - area_b, of_a - of_b
    sums = np.bincount(np.unique(group_N, return_inverse=True)[1], weights=influence)
    m = len(sums)
    if m < 3:
        return 0.0
    error = np.sqrt((sums**2).sum() * m / (m - 1)) / len(y_N)
    if not error > 1e-9 * abs(difference):  # as of a perfect probe and one that is constant: no variance is left to see
        error = 1 / np.sqrt(3 * len(y_N))  # AUROC of chance with as many of each class
    ratio = difference / error
    tail = student.logsf(abs(ratio), m - 1)
    return float(np.sign(ratio) * norm.isf(np.exp(tail)) if tail > -700 else np.sign(ratio) * 37.0)


def combined_z(z_F: Sequence[float], trained_F: Sequence[int], tested_F: Sequence[int]) -> float:
    """One z of the folds of a repeat."""
    weight = np.sqrt(np.asarray(trained_F, np.float64) * np.asarray(tested_F))
    return float(weight @ np.asarray(z_F) / np.sqrt((weight**2).sum()))


def p_better(z: float) -> float:
    """One-sided."""
    return float(norm.sf(z))


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
