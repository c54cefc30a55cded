"""The learning rate by step, against its closed form."""

from __future__ import annotations

import math

import pytest

from g3n.engine.schedule import learning_rate


def test_warmup_rises_linearly_to_the_peak_and_the_cosine_ends_at_the_floor() -> None:
    rates = [learning_rate(step, steps=110, peak=2.0, warmup_steps=10, min_ratio=0.1) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_halfway_through_the_cosine_the_rate_is_the_mean_of_peak_and_floor() -> None:
    assert learning_rate(50, steps=101, peak=1.0, warmup_steps=0, min_ratio=0.2) == pytest.approx(0.6)


def test_a_run_of_warmup_only_stays_finite() -> None:
    assert math.isfinite(learning_rate(4, steps=5, peak=1.0, warmup_steps=5, min_ratio=0.0))
