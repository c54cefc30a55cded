"""Distances between sets of vectors against closed forms, brute force and sets with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from sklearn.metrics.pairwise import polynomial_kernel

from g3n.evaluate import distributions as d
from g3n.evaluate.metrics import ssim


def exact(n: int, width: int, seed: int) -> np.ndarray:
    """[n, width] whose mean is exactly 0 and whose covariance is exactly the identity."""
    x = np.random.default_rng(seed).normal(size=(n, width))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T


def test_frechet_distance_of_gaussians_with_commuting_covariances() -> None:
    """|m|^2 + sum (s - t)^2 of standard deviations s, t along the same axes (Dowson 1982)."""
    s, t, m = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5]), np.array([0.3, -1.0, 2.0])
    turn = ortho_group.rvs(3, random_state=0)
    x, y = exact(40, 3, 0) * s @ turn, (exact(25, 3, 1) * t + m) @ turn
    assert d.frechet_distance(x, y) == pytest.approx((m**2).sum() + ((s - t) ** 2).sum(), rel=1e-10)
    assert d.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_is_that_of_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + 1
    a, b = np.cov(x.T), np.cov(y.T)
    theirs = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert d.frechet_distance(x, y) == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_of_sets_smaller_than_their_width() -> None:
    """Zeros added and axes turned change no distance, and 6 vectors in 50 dimensions are vectors of 11."""
    x, y = exact(30, 4, 0), 2 * exact(20, 4, 1) + 1
    turn = ortho_group.rvs(50, random_state=0)
    wide = [np.pad(v, ((0, 0), (0, 46))) @ turn for v in (x, y)]
    assert d.frechet_distance(*wide) == pytest.approx(4 * 1 + 4 * (2 - 1) ** 2, rel=1e-9)
    few, other = wide[0][:6], np.random.default_rng(1).normal(size=(5, 50))
    basis = np.linalg.svd(np.concatenate([few, other]), full_matrices=False)[2]
    assert d.frechet_distance(few, other) == pytest.approx(d.frechet_distance(few @ basis.T, other @ basis.T))
    assert d.frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(1, 2, size=(5, 4))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(polynomial_kernel(a[None], b[None], degree=3, gamma=1 / 4, coef0=1)[0, 0])

    within = [np.mean([k(a, b) for a, b in itertools.permutations(v, 2)]) for v in (x, y)]
    between = np.mean([k(a, b) for a, b in itertools.product(x, y)])
    assert d.kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between)


def test_kernel_distance_of_one_distribution_is_zero_on_average_and_frechet_is_not() -> None:
    rng = np.random.default_rng(0)
    sets = [(rng.normal(size=(20, 6)), rng.normal(size=(20, 6))) for _ in range(300)]
    kernel = np.array([d.kernel_distance(x, y) for x, y in sets])
    assert abs(kernel.mean()) < 3 * kernel.std() / np.sqrt(300)
    assert (kernel < 0).mean() > 0.3
    assert np.mean([d.frechet_distance(x, y) for x, y in sets[:50]]) > 0.5
    assert d.kernel_distance(sets[0][0], sets[0][1] + 1) > kernel.max()


def test_precision_and_recall_on_a_line() -> None:
    """Real vectors at 0..9 with k = 3: the reach is 3 at both ends and 2 elsewhere, so 4 balls hold 4 vectors and 6 hold 5."""
    real = np.arange(10.0)[:, None]
    far = np.arange(10.0)[:, None] + 1000
    assert d.manifold_shares(real, real) == {
        "precision": 1,
        "recall": 1,
        "density": pytest.approx((4 * 4 + 6 * 5) / 30),
        "coverage": 1,
    }
    assert set(d.manifold_shares(real, far).values()) == {0.0}
    # Collapsed to four copies of 4: all precise; they reach nowhere, so they recall the one real vector they lie on.
    collapsed = d.manifold_shares(real, np.full((4, 1), 4.0))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] == pytest.approx(0.1)
    assert collapsed["coverage"] == pytest.approx(0.5)  # the balls of 2, 3, 4, 5, 6
    assert collapsed["density"] == pytest.approx(5 / 3)
    # Half of the generated ones outside of what is real, and all of what is real within their reach
    half = d.manifold_shares(real, np.concatenate([real, far]))
    assert (half["precision"], half["recall"], half["coverage"]) == (0.5, 1, 1)


def test_ball_reach_leaves_the_vector_itself_out() -> None:
    """Four corners of a square of side 1 with k = 1: reach 1; a vector 1.01 outside of its corner is in no ball."""
    square = np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]])
    made = np.array([[-0.99, 0], [-1.01, 0], [0.5, 0.5], [9, 9]])
    assert d.manifold_shares(square, made, k=1)["precision"] == 0.5
    with pytest.raises(ValueError, match="no 4 neighbors"):
        d.manifold_shares(square, made, k=4)


def test_halves_share_no_subject() -> None:
    subjects = np.repeat([f"s{i}" for i in range(9)], [1, 2, 3, 4, 5, 1, 2, 3, 4])
    n = d.largest_half(subjects)
    assert n == 10  # (25 - 5) / 2
    drawn = list(d.halves(subjects, n, 200, seed=0))
    for a, b in drawn:
        assert len(set(a.tolist())) == len(set(b.tolist())) == n
        assert not set(subjects[a]) & set(subjects[b])
    assert len({tuple(a.tolist()) for a, _ in drawn}) > 190
    first = next(d.halves(subjects, n, 1, seed=0))
    assert np.array_equal(first[0], drawn[0][0])  # a draw does not depend on how many there are
    with pytest.raises(ValueError, match="halves of 10"):
        next(d.halves(subjects, n + 1, 1, seed=0))


def test_the_floor_is_higher_where_scans_of_one_person_may_not_meet() -> None:
    """30 people with 4 scans each, alike: halves of scans that ignore people look nearer than other people are."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(30), 4)
    real = rng.normal(size=(30, 8))[people] + 0.1 * rng.normal(size=(120, 8))
    apart = d.real_to_real(real, people, 50, d.all_distances)
    mixed = d.real_to_real(real, np.arange(120), 50, d.all_distances)
    assert apart["frechet"].low > mixed["frechet"].value
    assert apart["precision"].value < 0.5 < mixed["precision"].value
    assert (apart["frechet"].n, apart["frechet"].subjects) == (50, 30)


def test_a_perfect_generator_is_at_the_floor_and_a_bad_one_is_not() -> None:
    rng = np.random.default_rng(0)
    real, good, bad = rng.normal(size=(120, 8)), rng.normal(size=(120, 8)), 0.5 * rng.normal(size=(120, 8)) + 0.5
    floor = d.real_to_real(real, range(120), 50, d.all_distances)
    ours = d.made_to_real(real, range(120), good, 50, d.all_distances)
    for name in floor:
        assert ours[name].low < floor[name].value < ours[name].high
    worse = d.made_to_real(real, range(120), bad, 50, d.all_distances)
    for name in ("frechet", "kernel"):
        assert worse[name].low > floor[name].high
    assert worse["recall"].high < floor["recall"].low


def test_generated_vectors_have_the_conditions_of_other_people() -> None:
    """Each real vector again, twice and a bit: exactly the floor, also where people have several scans each."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), [1, 2, 3, 4] * 5)
    real = rng.normal(size=(20, 6))[people] + 0.3 * rng.normal(size=(50, 6))
    floor = d.real_to_real(real, people, 20, d.all_distances)
    assert d.made_to_real(real, people, np.concatenate([real, real, real[:7]]), 20, d.all_distances) == floor
    worse = d.made_to_real(real, people, np.concatenate([real, real + 1, real[:7]]), 20, d.all_distances)
    assert worse["frechet"].value > floor["frechet"].value + 0.5  # all of them are used
    with pytest.raises(ValueError, match="49 generated vectors"):
        d.made_to_real(real, people, real[:49], 20, d.all_distances)


def test_frechet_is_biased_by_size_and_kernel_is_not() -> None:
    """In expectation the Fréchet floor falls like 1 / n; the kernel's is 0 at each n."""
    real = np.random.default_rng(0).normal(size=(400, 8))
    floor = d.size_bias(real, range(400), (25, 50, 100, 200))
    frechet = [floor[n]["frechet"].value for n in (25, 50, 100, 200)]
    assert frechet == sorted(frechet, reverse=True)
    assert frechet[1] / frechet[3] == pytest.approx(4, rel=0.25)
    assert all(f["kernel"].low < 0 < f["kernel"].high for f in floor.values())


def test_pairs_are_of_strangers_of_one_modality() -> None:
    subjects, groups = np.repeat(range(20), 4), ["T1", "T2", "T1", "T2"] * 20
    pairs = d.pairs_of_strangers(subjects.tolist(), groups, 100)
    people = [subjects[i] for pair in pairs for i in pair]
    assert len(people) == len(set(people)) >= 16
    assert all(groups[i] == groups[j] for i, j in pairs)
    assert d.pairs_of_strangers(subjects.tolist(), groups, 3) == pairs[:3]
    assert d.pairs_of_strangers(subjects.tolist(), groups, 100, seed=1) != pairs
    assert d.pairs_of_strangers(["a", "a"], ["T1", "T1"], 5) == []


def test_similarity_of_pairs_is_one_where_a_set_has_collapsed() -> None:
    """At 16^3 there is one scale, so it is SSIM."""
    x, y = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    same, other = d.pair_similarity([(x, x), (x, y)])
    assert same == pytest.approx(1)
    assert other == pytest.approx(max(0.0, float(ssim(x[None], y[None]))), abs=1e-6)
    assert other < 0.3
