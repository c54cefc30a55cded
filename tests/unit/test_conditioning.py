"""Clinical variables: refusals with the allowed range, null states, and that each of them acts."""

from __future__ import annotations

import math

import pytest
import torch

from g3n.config import G3nError
from g3n.models.conditioning import Conditioning, Variable, VariableSet, drop_variables

SET = VariableSet(
    {
        "modality": Variable(levels=("T1", "T2")),
        "age_years": Variable(low=0, high=110),
        "sex": Variable(levels=("F", "M")),
    }
)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"agee": 3}, r"unknown variable 'agee'; did you mean 'age_years'\?"),
        ({"modality": "T3"}, r"modality is 'T3'; known: T1, T2"),
        ({"age_years": 130}, "age_years is 130; allowed range is 0 to 110"),
        ({"age_years": "old"}, "age_years is 'old'; expected a number from 0 to 110"),
        ({"age_years": math.inf}, "allowed range"),
    ],
)
def test_impossible_values_are_refused(conditions: dict[str, object], message: str) -> None:
    with pytest.raises(G3nError, match=message):
        SET.check(conditions)


def test_encoding() -> None:
    rows = SET.encode(
        [{"modality": "T2", "age_years": "70", "sex": "F", "extra": 1}, {"sex": None, "age_years": math.nan}]
    )
    assert rows[0].tolist() == [1.0, 70.0, 0.0]
    assert rows[1].isnan().all()


def test_dropped_is_the_same_as_missing() -> None:
    torch.manual_seed(0)
    net = Conditioning(SET, 24)
    full = SET.encode([{"modality": "T1", "age_years": 30, "sex": "M"}])
    dropped = drop_variables(full, torch.tensor([[False, True, False]]))
    missing = SET.encode([{"modality": "T1", "sex": "M"}])
    t = torch.tensor([0.3])
    assert torch.equal(net(t, dropped), net(t, missing))


@pytest.mark.parametrize(
    ("one", "other"),
    [({"modality": "T1"}, {"modality": "T2"}), ({"age_years": 30}, {"age_years": 31}), ({"sex": "F"}, {}),
     ({"age_years": 0}, {})],
)  # fmt: skip
def test_each_variable_acts(one: dict[str, object], other: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = Conditioning(SET, 24)
    t = torch.tensor([0.3])
    assert not torch.allclose(net(t, SET.encode([one])), net(t, SET.encode([other])), atol=1e-4)
