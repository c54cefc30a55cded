"""Learning rate by step."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, min_ratio: float) -> float:
    """The rate of optimizer step ``step`` (from 0): linear warm-up to ``peak``, then a cosine to ``peak * min_ratio``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - 1 - warmup_steps)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)
