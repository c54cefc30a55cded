"""Which losses are called spikes."""

from __future__ import annotations

import math
import random

from g3n.engine.spikes import Spikes


def found(losses: list[float], threshold: float = 10) -> list[int]:
    spikes = Spikes(threshold)
    return [i for i, loss in enumerate(losses) if spikes.judge(loss) is not None]


def curve(steps: int) -> list[float]:
    """A loss that falls as one does, with noise of 3 %."""
    chance = random.Random(0)
    return [(0.3 + math.exp(-i / 50)) * (1 + 0.03 * chance.gauss(0, 1)) for i in range(steps)]


def test_a_falling_noisy_loss_has_no_spike_and_a_doubled_one_is_found_at_its_step() -> None:
    losses = curve(2000)
    assert found(losses) == []
    for step in (200, 1500):
        losses[step] *= 2
    assert found(losses) == [200, 1500]
    assert found(losses, threshold=0) == []


def test_a_low_loss_and_the_first_steps_are_never_spikes() -> None:
    losses = curve(300)
    losses[5] *= 100
    losses[250] *= 0.01
    assert found(losses) == []


def test_a_constant_loss_needs_a_rise_of_a_tenth() -> None:
    assert found([1.0] * 50 + [1.09] + [1.0] * 5 + [1.2]) == [56]


def test_a_level_that_stays_is_taken_for_usual_after_a_while() -> None:
    spikes = found([1.0] * 50 + [5.0] * 200)
    assert spikes == list(range(50, 50 + 64))
    one = Spikes(10)
    for loss in [1.0] * 50 + [5.0] * 3:
        one.judge(loss)
    assert one.in_a_row == 3
