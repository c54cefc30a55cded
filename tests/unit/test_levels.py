"""Means by level of the clinical variables, over batches and ranks."""

from __future__ import annotations

import pytest
import torch

from g3n.levels import LevelSums, levels, means


def test_levels_are_classes_and_decades_and_what_is_missing_is_left_out() -> None:
    sample = {"modality": "T1", "age_years": 69.9, "sex": None, "field_strength_t": 3.0, "cohort": "a=b:c(1)"}
    assert levels(sample) == ["modality/T1", "age_years/60-69", "cohort/a_b_c_1_"]
    assert levels(sample, only=["modality"]) == ["modality/T1"]
    assert levels({"age_years": float("nan")}) == levels({"age_years": None}) == []
    assert levels({"age_years": 7.5}) == ["age_years/0-9"]


def test_means_over_batches_and_ranks_that_met_different_levels_leave_padding_out() -> None:
    one, other = LevelSums(), LevelSums(only=["modality"])
    t1, t2 = {"modality": "T1", "sex": "F"}, {"modality": "T2"}
    one.add({"loss": torch.tensor([1.0, 3.0]), "error": torch.tensor([10.0, 30.0])}, [t1, t1], torch.tensor([1.0, 1.0]))
    one.add({"loss": torch.tensor([8.0, 99.0]), "error": torch.tensor([80.0, 99.0])}, [t1, t2], torch.tensor([1.0, 0]))
    other.add({"loss": torch.tensor([5.0]), "error": torch.tensor([0.5])}, [t2], torch.ones(1))
    found = means([one.take(), other.take(), LevelSums().take()])
    assert found == {
        "error_by_modality/T1": 40.0,
        "error_by_modality/T2": 0.5,
        "error_by_sex/F": 40.0,
        "loss_by_modality/T1": 4.0,
        "loss_by_modality/T2": 5.0,
        "loss_by_sex/F": 4.0,
    }
    assert one.take() == {}


@pytest.mark.parametrize("level", ["Pediatric-Mixed", "GE 3.0", "Ä/µ"])
def test_mlflow_takes_the_names(level: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(f"val/masked_by_{levels({'cohort': level})[0]}")
