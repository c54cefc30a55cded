"""How far a set of generated samples is from real ones, by feature vectors, and how diverse a set of volumes is.

Every distance depends on how many samples it is taken from, and two sets of real scans are not at distance 0. So a distance is
given beside its floor: real to real, disjoint people, the same number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from torch import Tensor

from g3n.evaluate.intervals import LEVEL, Interval
from g3n.evaluate.metrics import ms_ssim

NEIGHBORS = 3  # of Kynkäänniemi 2019
DRAWS = 50
Distances = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def frechet_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two sets (Dowson 1982; Heusel 2017, arXiv 1706.08500), squared as usual.

    |mean difference|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), float64. The last trace is the sum of the singular values of the
    product of the centered sets, so no square root of a matrix is taken and sets smaller than D are no special case. The
    estimate is biased upward, the more the smaller the sets are (Chong 2020, arXiv 1911.07023). Raises ValueError for sets
    of fewer than two vectors or of different widths.
    """
    x, y = _pair(x_ND, y_MD)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x_R, y_R = (_factor((v - m) / np.sqrt(len(v) - 1)) for v, m in ((x, x_mean), (y, y_mean)))
    root = np.linalg.svd(x_R @ y_R.T, compute_uv=False).sum()
    return float(((x_mean - y_mean) ** 2).sum() + (x_R**2).sum() + (y_R**2).sum() - 2 * root)


def _factor(x_ND: np.ndarray) -> np.ndarray:
    """R [min(N, D), D] with R' R = x' x."""
    return np.asarray(np.linalg.qr(x_ND, mode="r"))


def kernel_distance(x_ND: np.ndarray, y_MD: np.ndarray) -> float:
    """Squared maximum mean discrepancy under the kernel (a b / D + 1)^3, unbiased: KID (Bińkowski 2018, arXiv 1801.01401).

    0 on average for two samples of one distribution whatever their size, so single values may be negative. Raises
    ValueError as ``frechet_distance``.
    """
    x, y = _pair(x_ND, y_MD)
    width = x.shape[1]
    xx, yy, xy = ((a @ b.T / width + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def manifold_shares(real_ND: np.ndarray, made_MD: np.ndarray, k: int = NEIGHBORS) -> dict[str, float]:
    """``precision`` and ``recall`` (Kynkäänniemi 2019, arXiv 1904.06991), ``density`` and ``coverage`` (Naeem 2020, arXiv
    2002.09797).

    A set's manifold is the union of balls around its vectors, each reaching to the k-th nearest other vector of the set.
    Precision: share of ``made`` in the manifold of ``real``; recall: the other way round. Density: mean number of real balls
    around a made vector over k; coverage: share of real balls that hold a made vector. Raises ValueError for sets of k or
    fewer vectors.
    """
    real, made = _pair(real_ND, made_MD)
    if min(len(real), len(made)) <= k:
        raise ValueError(f"sets of {len(real)} and {len(made)} vectors have no {k} neighbors each")
    between_NM = cdist(real, made)
    real_reach_N, made_reach_M = (np.partition(cdist(v, v), k, axis=1)[:, k] for v in (real, made))
    in_real_NM = between_NM <= real_reach_N[:, None]
    in_made_NM = between_NM <= made_reach_M[None]
    return {
        "precision": float(in_real_NM.any(0).mean()),
        "recall": float(in_made_NM.any(1).mean()),
        "density": float(in_real_NM.sum(0).mean() / k),
        "coverage": float(in_real_NM.any(1).mean()),
    }


def _pair(x_ND: np.ndarray, y_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x_ND, np.float64), np.asarray(y_MD, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"sets are {x.shape} and {y.shape}; expected [N, D] and [M, D] with N and M at least 2")
    return x, y


def smooth_distances(real_ND: np.ndarray, made_MD: np.ndarray) -> dict[str, float]:
    """``frechet`` and ``kernel``."""
    return {"frechet": frechet_distance(real_ND, made_MD), "kernel": kernel_distance(real_ND, made_MD)}


def all_distances(real_ND: np.ndarray, made_MD: np.ndarray) -> dict[str, float]:
    """``frechet``, ``kernel``, ``precision``, ``recall``, ``density`` and ``coverage``."""
    return {**smooth_distances(real_ND, made_MD), **manifold_shares(real_ND, made_MD)}


def largest_half(subjects: Sequence[Any]) -> int:
    """The n up to which ``halves`` has two sets of n rows, whatever it draws: (rows - the most of one subject) / 2, rounded up."""
    _, counts = np.unique([str(s) for s in subjects], return_counts=True)
    return int(counts.sum() - counts.max() + 1) // 2


def halves(subjects: Sequence[Any], n: int, draws: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two sets of n row numbers, no subject in both, ``draws`` times, each from its own seed.

    Subjects in random order go to the half that has fewer rows so far; n of each half's rows are drawn. Raises ValueError
    for n above ``largest_half``.
    """
    if n > largest_half(subjects):
        raise ValueError(f"{len(subjects)} rows have halves of {largest_half(subjects)} apart by subject, not {n}")
    names, of_row = np.unique([str(s) for s in subjects], return_inverse=True)
    rows = [np.flatnonzero(of_row == s) for s in range(len(names))]
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw])
        parts: tuple[list[int], list[int]] = [], []
        for s in rng.permutation(len(rows)):
            min(parts, key=len).extend(rows[s])
        yield rng.permutation(parts[0])[:n], rng.permutation(parts[1])[:n]


def real_to_real(
    real_ND: np.ndarray, subjects: Sequence[Any], n: int, distances: Distances, draws: int = DRAWS, seed: int = 0
) -> dict[str, Interval]:
    """The floor: ``distances`` of n real vectors to n of other people, mean and middle 95 % over ``draws`` of ``halves``.

    The spread over halves is about that of the figure of all vectors (the jackknife that deletes half; Shao and Wu 1989).
    """
    found = [distances(real_ND[a], real_ND[b]) for a, b in halves(subjects, n, draws, seed)]
    return _over_draws(found, n, subjects)


def made_to_real(
    real_ND: np.ndarray,
    subjects: Sequence[Any],
    made_MD: np.ndarray,
    n: int,
    distances: Distances,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Interval]:
    """What ``real_to_real`` gives, with generated vectors in place of the second half.

    Vector i of ``made`` is generated under the conditions of real vector i mod N, for M >= N. So each draw compares the same n real
    vectors with n generated ones under the conditions of the same other people, and a perfect generator is at the floor.
    Of several vectors of one condition a draw takes one at random. Raises ValueError for fewer generated than real vectors.
    """
    N, M = len(real_ND), len(made_MD)
    if M < N:
        raise ValueError(f"{M} generated vectors have not each of the conditions of {N} real ones")
    found = []
    for draw, (a, b) in enumerate(halves(subjects, n, draws, seed)):
        of_condition = (M - 1 - b) // N + 1
        turn = np.random.default_rng([seed, draw, 1]).integers(of_condition)
        found.append(distances(real_ND[a], made_MD[b + N * turn]))
    return _over_draws(found, n, subjects)


def size_bias(
    real_ND: np.ndarray, subjects: Sequence[Any], sizes: Sequence[int], draws: int = DRAWS, seed: int = 0
) -> dict[int, dict[str, Interval]]:
    """Fréchet and kernel distance of real to real at several n: how much of a distance is the size of the sets."""
    return {n: real_to_real(real_ND, subjects, n, smooth_distances, draws, seed) for n in sizes}


def _over_draws(found: Sequence[dict[str, float]], n: int, subjects: Sequence[Any]) -> dict[str, Interval]:
    people = len({str(s) for s in subjects})
    columns = {name: np.asarray([f[name] for f in found]) for name in found[0]}
    ends = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    figures = {}
    for name, values in columns.items():
        low, high = np.quantile(values, ends)
        figures[name] = Interval(float(values.mean()), float(low), float(high), n, people)
    return figures


def pairs_of_strangers(
    subjects: Sequence[Any], groups: Sequence[Any], count: int, seed: int = 0
) -> list[tuple[int, int]]:
    """Up to ``count`` seeded random pairs of row numbers of one group (a modality), each subject in at most one pair."""
    pairs: list[tuple[int, int]] = []
    used: set[Any] = set()
    waiting: dict[Any, int] = {}
    for i in np.random.default_rng(seed).permutation(len(subjects)).tolist():
        if subjects[i] in used:
            continue
        j = waiting.get(groups[i])
        if j is None or subjects[j] in used:
            waiting[groups[i]] = i
        elif subjects[j] != subjects[i]:
            pairs.append((j, i))
            used |= {subjects[j], subjects[i]}
            del waiting[groups[i]]
    return pairs[:count]


def pair_similarity(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """MS-SSIM of each pair of z-scored volumes [X, Y, Z]: its mean is high where a set lacks diversity (Odena 2017, arXiv
    1610.09585)."""
    return [float(ms_ssim(x[None], y[None])) for x, y in pairs]
