"""Loss spikes: steps whose loss stands far above those before."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 64  # losses that say what is usual
_FEWEST = 20  # before that nothing is judged
_GIVE_UP = 64  # spikes in a row are not spikes but the new level


class Spikes:
    """Robust z-scores of losses: distance from the median of the last ``WINDOW`` usual ones in units of their spread.

    The spread is 1.4826 x the median absolute deviation (Iglewicz & Hoaglin 1993), but at least 1 % of the median: losses that
    hardly vary would make a spike of anything. A loss that is a spike does not join the window.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self.in_a_row = 0

    def judge(self, loss: float) -> float | None:
        """The z-score of ``loss`` where it is a spike, else None. A threshold of 0 never finds one."""
        if self._threshold > 0 and len(self._usual) >= _FEWEST:
            middle = statistics.median(self._usual)
            spread = 1.4826 * statistics.median(abs(x - middle) for x in self._usual)
            z = (loss - middle) / max(spread, 0.01 * abs(middle), 1e-12)
            if z > self._threshold and self.in_a_row < _GIVE_UP:
                self.in_a_row += 1
                return z
            if self.in_a_row >= _GIVE_UP:
                self._usual.clear()
        self.in_a_row = 0
        self._usual.append(loss)
        return None

    def forget(self) -> None:
        """Begin again, after the weights were set back."""
        self._usual.clear()
        self.in_a_row = 0
