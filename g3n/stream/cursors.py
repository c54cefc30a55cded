"""Where a run stands in its data: a cursor for each lane and the number of samples taken. Plain integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from g3n.config import G3nError

State = dict[str, Any]  # {"cursors": [V ints], "samples": int}


def start(lanes: int) -> State:
    """The state before the first sample."""
    return {"cursors": [0] * lanes, "samples": 0}


def locate(state: Mapping[str, Any], k: int) -> tuple[int, int]:
    """(lane, position) of the run's sample ``k``, at or after ``state["samples"]``: sample k is lane k mod V's next."""
    cursors, samples = state["cursors"], int(state["samples"])
    lane = k % len(cursors)
    first = samples + (lane - samples) % len(cursors)
    return lane, cursors[lane] + (k - first) // len(cursors)


def merge(state: Mapping[str, Any], lanes_B: Tensor, positions_B: Tensor, n_global: int) -> State:
    """The state after an optimizer step: each lane's highest position, ``n_global`` samples more over all ranks.

    Each rank merges its own micro-batches; the run's state is the element-wise maximum of ``cursors`` over the ranks.
    """
    cursors = list(state["cursors"])
    for lane, position in zip(lanes_B.tolist(), positions_B.tolist(), strict=True):
        cursors[lane] = max(cursors[lane], position)
    return {"cursors": cursors, "samples": int(state["samples"]) + n_global}


def check(state: Mapping[str, Any], lanes: int) -> State:
    """A state read from a checkpoint. Raises G3nError where it is of another number of lanes or not integers."""
    cursors, samples = state.get("cursors"), state.get("samples")
    numbers = [*cursors, samples] if isinstance(cursors, list) else [None]
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise G3nError("cursors.json must hold cursors (a list of whole numbers) and samples; resume from another step")
    if len(numbers) - 1 != lanes:
        raise G3nError(f"the checkpoint has {len(numbers) - 1} lanes, data.lanes is {lanes}; set data.lanes back")
    return {"cursors": list(state["cursors"]), "samples": samples}
