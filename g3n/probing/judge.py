"""A predictor's scores of people it was not fitted on, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from g3n.evaluate import intervals
from g3n.probing import scores, significance
from g3n.probing.align import Encoder
from g3n.probing.fits import OutOfFold, fit_repeat, prepare
from g3n.probing.folds import Folds
from g3n.probing.tasks import Selection

MEAN, MAJORITY = "mean predictor", "majority"


@dataclass(frozen=True)
class Judged:
    """A predictor of one task: its out-of-fold scores in each repeat."""

    name: str
    kind: str
    repeats: tuple[OutOfFold, ...]


def constant(selection: Selection, folds: Folds) -> Judged:
    """The mean, or the class with the most scans, of each training set."""
    repeats = []
    for fold in folds.fold_RN:
        score = np.zeros((len(fold), 1 if selection.classes <= 2 else selection.classes))
        for f in range(folds.count):
            train = selection.y_N[fold != f]
            if selection.classes == 1:
                score[fold == f] = train.mean()
            else:
                most = int(np.bincount(train.astype(np.int64), minlength=selection.classes).argmax())
                score[fold == f] = (2 * most - 1) if selection.classes == 2 else np.eye(selection.classes)[most]
        repeats.append(OutOfFold(score, ()))
    return Judged(MEAN if selection.classes == 1 else MAJORITY, "", tuple(repeats))


def judge(encoder: Encoder, selection: Selection, folds: Folds) -> Judged:
    x, scaled = prepare(encoder.array[selection.rows])
    y, classes = selection.y_N, selection.classes
    repeats = tuple(
        fit_repeat(x, y, classes, fold, judged, scaled)
        for fold, judged in zip(folds.fold_RN, folds.judged_RN, strict=True)
    )
    return Judged(encoder.name, encoder.kind, repeats)


def main_metric(classes: int) -> str:
    """That which tests are of: AUROC, or r against chance and the absolute error between two probes."""
    return "auroc" if classes > 1 else "mae"


def figures(
    judged: Sequence[Judged], pairs: Sequence[tuple[int, int]], selection: Selection, folds: Folds, group_N: np.ndarray
) -> tuple[dict[str, intervals.Interval], dict[str, float]]:
    """Intervals of ``<metric>|<i>`` and ``difference|<i>|<j>`` (above 0 where i is better), the mean over repeats, bootstrapped over
    groups; and the spread over repeats of the former."""
    names, of_row = np.unique(group_N, return_inverse=True)
    y, classes = selection.y_N, selection.classes

    def of_repeat(r: int, counts: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.flatnonzero(folds.judged_RN[r])
        fold, weight = folds.fold_RN[r][rows], counts[:, of_row[rows]]
        out: dict[str, np.ndarray] = {}
        for i, one in enumerate(judged):
            score = one.repeats[r].score[rows]
            if classes > 1:
                found = scores.of_classes(score, y[rows].astype(np.int64), classes, fold, weight)
            else:
                found = scores.of_numbers(score[:, 0], y[rows], fold, _training_mean(y, folds.fold_RN[r])[rows], weight)
            out |= {f"{metric}|{i}": value for metric, value in found.items()}
        return out

    def statistics(counts: np.ndarray) -> dict[str, np.ndarray]:
        repeats = [of_repeat(r, counts) for r in range(folds.repeats)]
        out = {name: np.mean([one[name] for one in repeats], axis=0) for name in repeats[0]}
        main = main_metric(classes)
        sign = 1.0 if classes > 1 else -1.0
        return out | {f"difference|{i}|{j}": sign * (out[f"{main}|{i}"] - out[f"{main}|{j}"]) for i, j in pairs}

    n = int(folds.judged_RN[0].sum())
    found = intervals.resampled(statistics, len(names), n)
    each = [of_repeat(r, np.ones((1, len(names)))) for r in range(folds.repeats)]
    spread = {
        name: float(np.std([one[name][0] for one in each], ddof=1)) if len(each) > 1 else float("nan")
        for name in each[0]
    }
    return found, spread


def _training_mean(y_N: np.ndarray, fold_N: np.ndarray) -> np.ndarray:
    """Mean of y of the training set of each scan's fold [N]."""
    of_fold = [y_N[fold_N != f].mean() for f in range(int(fold_N.max()) + 1)]
    return np.asarray(of_fold)[fold_N]


def better_than_chance(encoder: Encoder, selection: Selection, folds: Folds, group_N: np.ndarray) -> float:
    """p of the features, on the folds of the first repeat with one scan of each family (g3n/probing/significance.py)."""
    rows = np.flatnonzero(folds.judged_RN[0])
    rows = rows[np.sort(np.unique(group_N[rows], return_index=True)[1])]
    features = encoder.array[selection.rows[rows]]
    return significance.chance_p(features, selection.y_N[rows], selection.classes, folds.fold_RN[0][rows])


def paired_z(one: Judged, other: Judged, selection: Selection, folds: Folds, group_N: np.ndarray) -> float:
    """z of the difference of AUROC, or of mean absolute errors, over all repeats; above 0 where ``one`` is better."""
    names, of_row = np.unique(group_N, return_inverse=True)
    differences, influences = [], []
    for r in range(folds.repeats):
        rows = np.flatnonzero(folds.judged_RN[r])
        y, fold = selection.y_N[rows], folds.fold_RN[r][rows]
        a, b = one.repeats[r].score[rows], other.repeats[r].score[rows]
        if selection.classes > 1:
            code = y.astype(np.int64)
            (area, of_one), (other_area, of_other) = (
                significance.auroc_influence(score, code, selection.classes, fold) for score in (a, b)
            )
            difference, influence = area - other_area, of_one - of_other
        else:
            gain = np.abs(b[:, 0] - y) - np.abs(a[:, 0] - y)
            difference, influence = float(gain.mean()), gain - gain.mean()
        differences.append(difference)
        influences.append(np.bincount(of_row[rows], weights=influence, minlength=len(names)) / len(rows))
    return significance.paired_z(differences, influences)
