"""Figures of out-of-fold scores, under many weightings of the scans at once: what a bootstrap over people asks for.

Every function takes ``weight_BN`` float64 [B, N], how often each scan counts in each draw, and returns float64 [B].
"""

from __future__ import annotations

import numpy as np

CLASS_METRICS = ("auroc", "balanced_accuracy", "auprc")
NUMBER_METRICS = ("mae", "r", "r2")


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)


def _running(values_BN: np.ndarray) -> np.ndarray:
    """[B, N + 1]: sums before each position."""
    out = np.zeros((len(values_BN), values_BN.shape[1] + 1))
    np.cumsum(values_BN, axis=1, out=out[:, 1:])
    return out


def auroc(score_N: np.ndarray, positive_N: np.ndarray, fold_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Share of pairs of a positive and a negative scan in order, ties half; pairs within a fold alone, whose scores one probe gave."""
    order = np.lexsort((score_N, fold_N))
    score, fold, positive = score_N[order], fold_N[order], positive_N[order]
    weight = weight_BN[:, order]
    below = _running(weight * ~positive)
    new = np.ones(len(score), bool)
    new[1:] = (score[1:] != score[:-1]) | (fold[1:] != fold[:-1])
    start = np.flatnonzero(new)
    tie = np.cumsum(new) - 1
    low, high = start[tie], np.append(start[1:], len(score))[tie]
    edges = np.searchsorted(fold, np.arange(fold[-1] + 2))
    won = np.zeros(len(weight))
    pairs = np.zeros(len(weight))
    for f in range(len(edges) - 1):
        rows = np.arange(edges[f], edges[f + 1])[positive[edges[f] : edges[f + 1]]]
        first = below[:, edges[f], None]
        under = (below[:, low[rows]] + below[:, high[rows]]) / 2 - first
        won += np.einsum("bn,bn->b", weight[:, rows], under)
        pairs += weight[:, rows].sum(axis=1) * (below[:, edges[f + 1]] - below[:, edges[f]])
    return _ratio(won, pairs)


def auprc(score_N: np.ndarray, positive_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Average precision over all folds: the sum of precision times the recall gained, from the highest score down."""
    order = np.argsort(-score_N, kind="stable")
    score, weight = score_N[order], weight_BN[:, order]
    ends = np.append(np.flatnonzero(score[1:] != score[:-1]) + 1, len(score))
    found = _running(weight * positive_N[order])[:, ends]
    seen = _running(weight)[:, ends]
    gained = np.diff(found, axis=1, prepend=0)
    precision = np.divide(found, seen, out=np.zeros_like(found), where=seen > 0)
    return _ratio((gained * precision).sum(axis=1), found[:, -1])


def of_classes(
    score_NC: np.ndarray, code_N: np.ndarray, classes: int, fold_N: np.ndarray, weight_BN: np.ndarray
) -> dict[str, np.ndarray]:
    """AUROC and AUPRC (of the second class of two, else the mean over classes of one against the rest), balanced accuracy."""
    if classes == 2:
        of_class = {1: score_NC[:, 0]}
        guess = (score_NC[:, 0] > 0).astype(np.int64)
    else:
        of_class = {c: score_NC[:, c] for c in range(classes)}
        guess = score_NC.argmax(axis=1)
    known = np.eye(classes)[code_N]
    recall = _ratio(weight_BN @ (known * (guess == code_N)[:, None]), weight_BN @ known)
    return {
        "auroc": np.mean([auroc(s, code_N == c, fold_N, weight_BN) for c, s in of_class.items()], axis=0),
        "balanced_accuracy": recall.mean(axis=1),
        "auprc": np.mean([auprc(s, code_N == c, weight_BN) for c, s in of_class.items()], axis=0),
    }


def of_numbers(
    found_N: np.ndarray, y_N: np.ndarray, fold_N: np.ndarray, mean_N: np.ndarray, weight_BN: np.ndarray
) -> dict[str, np.ndarray]:
    """Mean absolute error, r about the means of each fold, and R^2 against ``mean_N``, the mean of y of each scan's training set.

    r about one mean would be -1 for a probe that always predicts its training set's mean.
    """
    error = found_N - y_N
    total = weight_BN.sum(axis=1)
    a, b = found_N - found_N.mean(), y_N - y_N.mean()
    folds = np.eye(int(fold_N.max()) + 1)[fold_N]
    w, wa, wb = (weight_BN @ (folds * v[:, None]) for v in (np.ones_like(a), a, b))

    def covariance(u: np.ndarray, v: np.ndarray, wu: np.ndarray, wv: np.ndarray) -> np.ndarray:
        within = weight_BN @ (folds * (u * v)[:, None]) - np.divide(wu * wv, w, out=np.zeros_like(w), where=w > 0)
        return np.asarray(within.sum(axis=1))

    aa, bb, ab = covariance(a, a, wa, wa), covariance(b, b, wb, wb), covariance(a, b, wa, wb)
    floor = 1e-9 * max(float((a**2).sum()), 1e-300)
    r = np.where(aa > floor, _ratio(ab, np.sqrt(np.maximum(aa * bb, 0))), np.nan)
    return {
        "mae": _ratio(weight_BN @ np.abs(error), total),
        "r": r,
        "r2": 1 - _ratio(weight_BN @ error**2, weight_BN @ (y_N - mean_N) ** 2),
    }
