"""Figures against closed forms and scikit-learn-like oracles; pictures the right way up."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import PSNRMetric

from g3n.evaluate import metrics
from g3n.evaluate.montage import planes, to_gray, write_montage
from g3n.evaluate.report import means_by, write_json


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 16, 16, 16, generator=generator)
    target[:, :4] = 0
    return target + 0.1 * torch.randn(target.shape, generator=generator), target


def test_only_brain_voxels_count(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    made, target = pair
    worse = made.clone()
    worse[:, :4] = 100.0
    for figure in (metrics.brain_mse, metrics.brain_mae, metrics.psnr_db):
        assert torch.equal(figure(made, target), figure(worse, target))


def test_psnr_is_monais_on_the_brain(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    made, target = pair[0][:, 4:], pair[1][:, 4:]
    for b in range(2):
        span = float(target[b].max() - target[b].min())
        theirs = PSNRMetric(max_val=span)(made[b, None, None], target[b, None, None])
        assert float(metrics.psnr_db(made, target)[b]) == pytest.approx(float(theirs), abs=1e-4)


def test_ten_times_the_error_is_twenty_db() -> None:
    target = torch.linspace(1, 2, 4096).view(1, 16, 16, 16)
    small, large = (metrics.psnr_db(target + e, target).item() for e in (0.01, 0.1))
    assert small == pytest.approx(-20 * math.log10(0.01), abs=1e-3)
    assert small - large == pytest.approx(20, abs=1e-3)


def test_ssim_of_itself_and_of_noise(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    made, target = pair
    assert metrics.ssim(target, target).tolist() == pytest.approx([1.0, 1.0])
    close, far = metrics.ssim(made, target), metrics.ssim(torch.randn_like(target), target)
    assert bool((close > 0.9).all())
    assert bool((far < 0.3).all())


def test_means_by_group() -> None:
    rows = [{"m": "T1", "x": 1.0}, {"m": "T2", "x": 5.0}, {"m": "T1", "x": 3.0}]
    assert means_by(rows, "m", ("x",)) == {"T1": {"n": 2, "x": 2.0}, "T2": {"n": 1, "x": 5.0}}


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [np.float32(0.5), np.int64(3)]})
    assert (tmp_path / "a.json").read_text().split() == ["{", '"x":', "null,", '"y":', "[", "0.5,", "3", "]", "}"]


def test_anterior_and_superior_are_at_the_top() -> None:
    """LPS: the index grows to left, posterior, superior."""
    volume = np.full((6, 8, 4), 0.1)
    volume[:, 0, :] = 2.0  # anterior
    volume[:, :, 3] = 3.0  # superior
    axial, coronal, sagittal = planes(volume, (3, 4, 1))
    assert axial.shape == (8, 6)
    assert (axial[0] == 2.0).all()
    assert (coronal[0] == 3.0).all()
    assert (sagittal[0] == 3.0).all()
    assert (sagittal[1:, 0] == 2.0).all()


def test_background_is_black_and_the_window_clips() -> None:
    assert to_gray(np.array([0.0, -9.0, -2.5, 2.5, 9.0])).tolist() == [0, 0, 0, 1, 1]


def test_montage_is_written_whole(tmp_path: Path) -> None:
    write_montage(tmp_path / "m.png", [("a", np.random.default_rng(0).normal(size=(8, 10, 6)))] * 3)
    assert (tmp_path / "m.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [f.name for f in tmp_path.iterdir()] == ["m.png"]
