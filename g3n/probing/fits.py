"""Linear probes of many training sets at once: standardize + ridge, standardize + logistic regression with balanced classes.

A probe is fitted on the union of some folds. Every fit needs the second moments of its rows alone (ridge) or as a preconditioner
(logistic), and those are sums over folds, so each fold's are computed once a repeat. Penalties are alpha times the number of
training scans: scikit-learn's ``Ridge(alpha * n)`` and ``LogisticRegression(C=1 / (alpha * n), class_weight="balanced")`` after
``StandardScaler``, whose predictions these are but for columns that are as good as constant in a training set, which are left out there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

PENALTIES = (
    1e-2,
    1e-1,
    1.0,
    10.0,
    100.0,
    1000.0,
)  # a training scan; features are standardized, so these serve any encoder
MAX_WIDTH = 2048  # wider features are first rotated to their principal axes
MAX_STEPS = 300
TOLERANCE = 1e-4  # of the largest coefficient of a model
CONSTANT = (
    1e-2  # of the variance over all scans: a column below this in a training set has nothing but outliers elsewhere
)
Subset = tuple[int, ...]  # folds of a training set, in order


@dataclass(frozen=True)
class OutOfFold:
    """Scores of the scans of one repeat, each by the probe of all other folds: float64 [N, C], C = 1 for a number and for two
    classes (log odds of the second)."""

    score: np.ndarray
    penalties: tuple[float, ...]  # chosen for each fold


def prepare(features_ND: np.ndarray) -> tuple[np.ndarray, bool]:
    """float32 [N, D'] of the same distances, and whether columns are to be scaled to unit variance in each training set.

    Labels are not looked at. Up to ``MAX_WIDTH`` columns are standardized over all rows, which changes no probe and keeps float32
    exact enough; more are then rotated to at most as many principal axes, whose scale is left as it is.
    """
    x = np.asarray(features_ND, np.float32)
    x = x - x.mean(axis=0)
    spread = x.std(axis=0)
    x /= np.where(spread > 1e-6 * max(float(spread.max(initial=0)), 1e-30), spread, np.inf)
    n, width = x.shape
    if width <= MAX_WIDTH:
        return x, True
    if n <= MAX_WIDTH:  # all axes there are
        values, vectors = np.linalg.eigh(x @ x.T)
        return np.ascontiguousarray(vectors[:, ::-1] * np.sqrt(np.maximum(values[::-1], 0))), False
    from sklearn.utils.extmath import randomized_svd

    left, singular, _ = randomized_svd(x, MAX_WIDTH, random_state=0)
    return np.ascontiguousarray(left * singular, np.float32), False


@dataclass(frozen=True)
class Moments:
    """Of a training set: ``mean`` and ``scale`` [D] of its columns, ``gram`` [D + 1, D + 1] of its standardized columns and a
    constant one, weighted by ``weight`` of each class (all 1 for a number)."""

    count: int
    mean: np.ndarray
    scale: np.ndarray
    gram: np.ndarray
    weight: np.ndarray


class Folds:
    """Second moments of each fold and class of one repeat."""

    def __init__(self, x_ND: np.ndarray, fold_N: np.ndarray, code_N: np.ndarray, classes: int, scaled: bool) -> None:
        self._augmented = np.concatenate([x_ND, np.ones((len(x_ND), 1), np.float32)], axis=1)
        self._fold = fold_N
        self._scaled = scaled
        self._classes = classes
        self._sums: dict[tuple[int, int], np.ndarray] = {}
        for f, c in itertools.product(range(fold_N.max() + 1), range(classes)):
            rows = self._augmented[(fold_N == f) & (code_N == c)]
            self._sums[f, c] = (rows.T @ rows).astype(np.float64)

    def products(self, y_N: np.ndarray) -> np.ndarray:
        """float64 [folds, D + 1]: sums of y times each column and times one."""
        parts = [np.where(self._fold == f, y_N, 0).astype(np.float32) for f in range(self._fold.max() + 1)]
        return (np.stack(parts) @ self._augmented).astype(np.float64)

    def moments(self, subset: Subset) -> Moments:
        """Of the union of folds."""
        by_class = [np.asarray(sum(self._sums[f, c] for f in subset)) for c in range(self._classes)]
        counts = np.array([s[-1, -1] for s in by_class])
        n = counts.sum()
        mean = np.sum([s[:-1, -1] for s in by_class], axis=0) / n
        variance = np.sum([np.diag(s)[:-1] for s in by_class], axis=0) / n - mean**2
        scale = np.sqrt(np.where(variance > CONSTANT, variance, np.inf)) if self._scaled else np.ones_like(mean)
        weight = (
            np.ones(1) if self._classes == 1 else np.where(counts > 0, n / (len(counts) * np.maximum(counts, 1)), 0)
        )
        gram = by_class[0] * weight[0]
        for c in range(1, self._classes):
            gram += weight[c] * by_class[c]
        edge, total = gram[:-1, -1].copy(), gram[-1, -1]
        gram[:-1, -1] = gram[-1, :-1] = (edge - total * mean) / scale
        middle = gram[:-1, :-1]
        middle -= np.outer(mean, edge - total * mean)
        middle -= np.outer(edge, mean)
        middle /= scale[:, None]
        middle /= scale
        return Moments(int(n), mean, scale, gram, weight)


def _factor(gram: np.ndarray, penalty: float, dtype: type) -> tuple[np.ndarray, bool]:
    """Cholesky factor of gram + penalty on all but the constant column."""
    a: np.ndarray = gram.astype(dtype)
    step = np.arange(len(a) - 1)
    a[step, step] += dtype(penalty)
    return cho_factor(a, lower=True, overwrite_a=True, check_finite=False)


def ridge(x_ND: np.ndarray, y_N: np.ndarray, models: Sequence[tuple[Subset, float]], folds: Folds) -> np.ndarray:
    """Predictions float64 [N, models, 1] of ridge regressions (training folds, alpha), exact up to rounding."""
    products = folds.products(y_N)
    slope = np.empty((x_ND.shape[1], len(models)))
    offset = np.empty(len(models))
    known: dict[Subset, Moments] = {}
    for m, (subset, alpha) in enumerate(models):
        if subset not in known:
            known = {subset: folds.moments(subset)}  # models of a subset follow each other
        of = known[subset]
        total = products[list(subset)].sum(axis=0)
        right = (total[:-1] - of.mean * total[-1]) / of.scale
        coefficients = cho_solve(
            _factor(of.gram, alpha * of.count, np.float64), np.append(right, total[-1]), check_finite=False
        )
        slope[:, m] = coefficients[:-1] / of.scale
        offset[m] = coefficients[-1] - of.mean @ slope[:, m]
    return (x_ND @ slope.astype(np.float32) + offset)[..., None].astype(np.float64)


def logistic(
    x_ND: np.ndarray,
    code_N: np.ndarray,
    classes: int,
    fold_N: np.ndarray,
    models: Sequence[tuple[Subset, float]],
    folds: Folds,
) -> np.ndarray:
    """Log odds float64 [N, models, C]: C = 1 for two classes, else one of each class (softmax).

    All models step together, so that each pass over the features serves all of them. A step is a Newton step with the bound of the
    Hessian that holds at any coefficients (Boehning and Lindsay 1988, https://doi.org/10.1007/BF00049423; Boehning 1992 for
    softmax), accelerated with restarts (O'Donoghue and Candes 2015, arXiv 1204.3982): no line search and no step that diverges.
    """
    n, width = x_ND.shape
    outputs = 1 if classes == 2 else classes
    truth = (code_N[:, None] == (np.arange(classes) if outputs > 1 else 1)).astype(np.float32)
    subsets = list(dict.fromkeys(subset for subset, _ in models))
    moments = {subset: folds.moments(subset) for subset in subsets}
    of_model = np.array([subsets.index(subset) for subset, _ in models])
    weight = np.stack([np.isin(fold_N, s) * moments[s].weight[code_N] for s in subsets], axis=1).astype(np.float32)
    mean = np.stack([moments[s].mean for s in subsets], axis=1).astype(np.float32)
    scale = np.stack([moments[s].scale for s in subsets], axis=1).astype(np.float32)
    penalty = np.array([alpha * moments[s].count for s, alpha in models], np.float32)
    bound = np.float32(0.25 if outputs == 1 else 0.5)
    factors = [
        _factor(bound * moments[s].gram, float(p), np.float32) for (s, _), p in zip(models, penalty, strict=True)
    ]

    now = np.zeros((len(models), width + 1, outputs), np.float32)
    ahead, age = now.copy(), np.zeros(len(models), np.float32)
    active = np.arange(len(models))

    def logits(coefficients: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        slope = coefficients[:, :-1] / scale[:, of_model[chosen]].T[..., None]
        offset = coefficients[:, -1] - np.einsum("dm,mdc->mc", mean[:, of_model[chosen]], slope)
        flat = slope.transpose(1, 0, 2).reshape(width, -1)
        return (x_ND @ flat).reshape(n, len(chosen), outputs) + offset

    for _ in range(MAX_STEPS):
        z = logits(ahead[active], active)
        if outputs == 1:
            residual = 1 / (1 + np.exp(-np.clip(z, -80, 80)))
        else:
            residual = np.exp(z - z.max(axis=2, keepdims=True))
            residual /= residual.sum(axis=2, keepdims=True)
        residual = (residual - truth[:, None]) * weight[:, of_model[active], None]
        down = (x_ND.T @ residual.reshape(n, -1)).reshape(width, len(active), outputs).transpose(1, 0, 2)
        total = residual.sum(axis=0)
        slope = (down - mean[:, of_model[active]].T[..., None] * total[:, None]) / scale[:, of_model[active]].T[
            ..., None
        ]
        slope += penalty[active, None, None] * ahead[active, :-1]
        gradient = np.concatenate([slope, total[:, None]], axis=1)
        step = np.stack([cho_solve(factors[m], g, check_finite=False) for m, g in zip(active, gradient, strict=True)])
        new = ahead[active] - step
        moved = new - now[active]
        restart = np.einsum("mdc,mdc->m", gradient, moved) > 0
        age[active] = np.where(restart, 0, age[active] + 1)
        push = np.where(restart, 0, age[active] / (age[active] + 3))[:, None, None].astype(np.float32)
        ahead[active] = new + push * moved
        now[active] = new
        largest = np.abs(new).max(axis=(1, 2))
        done = np.maximum(np.abs(step).max(axis=(1, 2)), np.abs(moved).max(axis=(1, 2))) <= TOLERANCE * largest + 1e-7
        active = active[~done]
        if not len(active):
            break
    everyone = np.arange(len(models))
    return logits(now, everyone).astype(np.float64)


def loss(score_MC: np.ndarray, y_N: np.ndarray, code_N: np.ndarray, classes: int) -> np.ndarray:
    """Mean over scans [models] of the squared error, or the log loss with classes counted alike; score [N, models, C]."""
    if classes == 1:
        return np.asarray(((score_MC[..., 0] - y_N[:, None]) ** 2).mean(axis=0))
    score = np.concatenate([np.zeros_like(score_MC), score_MC], axis=2) if score_MC.shape[2] == 1 else score_MC
    top = score.max(axis=2)
    each = top + np.log(np.exp(score - top[..., None]).sum(axis=2)) - score[np.arange(len(score)), :, code_N]
    counts = np.bincount(code_N, minlength=classes)
    return np.asarray((each / counts[code_N][:, None]).sum(axis=0) / (counts > 0).sum())


def fit_repeat(
    x_ND: np.ndarray, y_N: np.ndarray, classes: int, fold_N: np.ndarray, judged_N: np.ndarray, scaled: bool = True
) -> OutOfFold:
    """Out-of-fold scores of one repeat, penalties chosen inside the training folds.

    x_ND as of ``prepare``; y_N: a number each (``classes`` 1) or a class's number; fold_N: int [N], groups whole within folds;
    judged_N: bool [N], one scan of each person. For fold a the penalty is the best on each other fold b of the probe trained on
    all but a and b; that probe also serves fold b's choice. Raises ValueError for fewer than three folds.
    """
    k = int(fold_N.max()) + 1
    if k < 3:
        raise ValueError(f"{k} folds; choosing a penalty inside the training folds takes three")
    code_N = y_N.astype(np.int64) if classes > 1 else np.zeros(len(y_N), np.int64)
    folds = Folds(x_ND, fold_N, code_N, classes, scaled)
    center, spread = (float(y_N.mean()), float(y_N.std()) or 1.0) if classes == 1 else (0.0, 1.0)
    target = (y_N - center) / spread if classes == 1 else y_N

    def scores(models: Sequence[tuple[Subset, float]]) -> np.ndarray:
        if classes == 1:
            return ridge(x_ND, target, models, folds)
        return logistic(x_ND, code_N, classes, fold_N, models, folds)

    every = range(k)
    pairs = {(a, b): tuple(f for f in every if f not in (a, b)) for a, b in itertools.combinations(every, 2)}
    tried = list(pairs.values())
    found = scores([(subset, alpha) for subset in tried for alpha in PENALTIES])
    found = found.reshape(len(x_ND), len(tried), len(PENALTIES), -1)

    def loss_on(f: int, subset: Subset) -> np.ndarray:
        rows = judged_N & (fold_N == f)
        return loss(found[rows, tried.index(subset)], target[rows], code_N[rows], classes)

    inner = np.zeros((k, len(PENALTIES)))
    for (a, b), subset in pairs.items():
        inner[a] += loss_on(b, subset)
        inner[b] += loss_on(a, subset)
    best = [int(row.argmin()) for row in inner]
    final = scores([(tuple(f for f in every if f != a), PENALTIES[best[a]]) for a in every])
    score = final[np.arange(len(x_ND)), fold_N]
    return OutOfFold(score * spread + center, tuple(PENALTIES[i] for i in best))
