"""Step times by share of steps, and the rank that holds up the others."""

from __future__ import annotations

import time

from g3n.meters import Meter, OwnTime, slow_rank


def test_percentiles_are_by_nearest_rank() -> None:
    meter = Meter(8)
    assert meter.step_seconds_at(0.5) == 0.0
    meter.steps.extend((float(s), 0.0) for s in (5, 1, 4, 2, 3))
    assert [meter.step_seconds_at(share) for share in (0.2, 0.5, 0.95)] == [1.0, 3.0, 5.0]


def test_own_time_is_data_and_forward_since_the_last_question() -> None:
    own = OwnTime(gpu=False)
    own.waited(2.0)
    with own.forward():
        time.sleep(0.01)
    assert 2.01 <= own.take() < 2.5
    assert own.take() == 0.0


def test_a_slow_rank_is_one_that_takes_half_again_as_long_as_the_others() -> None:
    assert slow_rank([1.0]) is None
    assert slow_rank([1.0, 1.4]) is None
    assert slow_rank([1.0, 1.6]) == 1
    assert slow_rank([1.0, 1.1, 5.0, 0.9]) == 2
