"""Bootstrap intervals against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from g3n.evaluate.intervals import bootstrap, mean


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = mean(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert (found.n, found.subjects) == (400, 400)
    assert mean(values) == found  # the same seed


def test_scans_of_one_subject_do_not_count_as_people() -> None:
    """Each subject repeated 10 times: the interval is that of the subjects, not narrower by sqrt(10)."""
    people = np.random.default_rng(2).normal(0, 1, 60)
    once = mean(people)
    repeated = mean(np.repeat(people, 10), subjects=np.repeat(np.arange(60), 10))
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.1)
    assert (repeated.n, repeated.subjects) == (600, 60)
    naive = mean(np.repeat(people, 10))
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_it_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    found = [bootstrap(np.mean, rng.normal(0, 1, 50), draws=200, seed=i) for i in range(200)]
    assert 0.88 < np.mean([f.low <= 0 <= f.high for f in found]) <= 0.99


def test_statistics_of_several_columns_and_too_little_data() -> None:
    x = np.arange(20.0)
    r = bootstrap(lambda a, b: float(np.corrcoef(a, b)[0, 1]), x, 2 * x + 1)
    assert (r.value, r.low, r.high) == pytest.approx((1, 1, 1))
    alone = mean([5.0, 6.0], subjects=["a", "a"])
    assert alone.value == 5.5
    assert math.isnan(alone.low)
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        bootstrap(lambda a, b: 0.0, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="at least 1"):
        mean([])
