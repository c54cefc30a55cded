"""Step times by share of steps."""

from __future__ import annotations

from g3n.meters import Meter


def test_percentiles_are_by_nearest_rank() -> None:
    meter = Meter(8)
    assert meter.step_seconds_at(0.5) == 0.0
    meter.steps.extend((float(s), 0.0) for s in (5, 1, 4, 2, 3))
    assert [meter.step_seconds_at(share) for share in (0.2, 0.5, 0.95)] == [1.0, 3.0, 5.0]
