"""Figures against closed forms and scikit-learn-like oracles; pictures the right way up."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, PSNRMetric

from g3n.evaluate import metrics
from g3n.evaluate.intervals import mean
from g3n.evaluate.montage import planes, to_gray, write_montage
from g3n.evaluate.report import intervals_by, means_by, print_intervals, write_json


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


def test_ms_ssim_of_one_scale_is_ssim(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert metrics.ms_ssim_scales(pair[0].shape[1:]) == 1
    assert torch.allclose(metrics.ms_ssim(*pair), metrics.ssim(*pair), atol=1e-6)


def test_ms_ssim_has_as_many_scales_as_fit() -> None:
    shapes = [(160, 192, 160), (40, 48, 40), (22, 22, 22), (21, 30, 30), (176, 176, 176)]
    assert [metrics.ms_ssim_scales(shape) for shape in shapes] == [4, 2, 2, 1, 5]


def test_ms_ssim_of_two_scales_by_hand() -> None:
    """Contrast of the fine scale to the power w0 times SSIM of the halved volume to the power w1 (Wang 2003)."""
    from monai.metrics.regression import compute_ssim_and_cs

    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, 24, 24, 24, generator=generator)
    made = target + 0.5 * torch.randn(target.shape, generator=generator)
    w0, w1 = 0.0448 / (0.0448 + 0.2856), 0.2856 / (0.0448 + 0.2856)
    span = float(target.max() - target.min())

    def parts(shrink: int) -> tuple[float, float]:
        x, y = (torch.nn.functional.avg_pool3d(v[None], shrink) for v in (made, target))
        ssim, contrast = compute_ssim_and_cs(x, y, 3, (11,) * 3, (1.5,) * 3, data_range=span)
        return float(ssim.mean()), float(contrast.mean())

    expected = parts(1)[1] ** w0 * parts(2)[0] ** w1
    assert metrics.ms_ssim(made, target).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.ms_ssim(target, target).item() == pytest.approx(1)


def waves(*amplitudes: float) -> torch.Tensor:
    """[1, 16, 16, 16]: plane waves of 0.25, 0.75 of Nyquist along one axis and 0.4 along all three (0.69 in all)."""
    x = torch.arange(16.0)
    along = x[:, None, None].expand(16, 16, 16)
    across = x[:, None, None] + x[:, None] + x
    turns = (2 / 16 * along, 6 / 16 * along, 3 / 16 * across)
    return sum(a * torch.cos(2 * math.pi * t) for a, t in zip(amplitudes, turns, strict=True))[None] + 5  # type: ignore


def test_high_frequency_error_sees_the_waves_above_its_limit_only() -> None:
    target = waves(3.0, 1.0, 2.0)  # above half of Nyquist: energy 1 + 4
    of = metrics.high_frequency_error
    assert of(waves(0.0, 1.0, 2.0), target).item() == pytest.approx(0, abs=1e-9)  # only what is coarse is wrong
    assert of(target + 3, target).item() == pytest.approx(0, abs=1e-9)
    assert of(waves(3.0, 0.0, 0.0), target).item() == pytest.approx(1, rel=1e-5)  # all detail is gone
    assert of(waves(3.0, 0.5, 2.0), target).item() == pytest.approx(0.25 / 5, rel=1e-5)
    assert of(waves(3.0, 1.0, 1.0), target).item() == pytest.approx(1 / 5, rel=1e-5)  # radial: each axis is below
    assert of(waves(3.0, 1.0, 1.0), target, above=0.7).item() == pytest.approx(0, abs=1e-9)


def test_high_frequency_error_is_of_the_brain() -> None:
    target = torch.zeros(2, 20, 20, 20)
    target[0, 2:18, 2:18, 2:18] = waves(3.0, 1.0, 2.0)[0]
    made = torch.full_like(target, 7.0)
    made[0, 2:18, 2:18, 2:18] = waves(3.0, 0.0, 0.0)[0]
    found = metrics.high_frequency_error(made, target).tolist()
    assert found[0] == pytest.approx(1, rel=1e-5)
    assert math.isnan(found[1])  # an empty target
    hollow = target[:1].clone()
    hollow[:, 5:9, 5:9, 5:9] = 0
    filled = torch.where(hollow == 0, 7.0, hollow)
    assert metrics.high_frequency_error(filled, hollow).item() == 0


def test_dice_is_monais() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = ((torch.rand(3, 9, 9, 9, generator=generator) > s) * -1.5 for s in (0.4, 0.7))
    x[2] = y[2]
    theirs = DiceMetric(reduction="none")((x != 0)[:, None].float(), (y != 0)[:, None].float())
    assert torch.allclose(metrics.brain_dice(x, y), theirs.flatten(), atol=1e-6)
    assert metrics.brain_dice(x, y)[2] == 1
    left, right = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    left[:, :2], right[:, 1:3] = 1, -1
    assert metrics.brain_dice(left, right).item() == 0.5


def test_intervals_are_over_subjects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"key": f"sub-{s}_ses-0{v}_T1", "m": "T1", "x": float(s)} for s in range(9) for v in (1, 2)]
    found = intervals_by(rows, "m", ("x",))["T1"]["x"]
    assert (found.value, found.n, found.subjects) == (4.0, 18, 9)
    assert found == mean([float(s) for s in range(9) for _ in (1, 2)], [s for s in range(9) for _ in (1, 2)])
    write_json(tmp_path / "a.json", {"x": found})
    assert json.loads((tmp_path / "a.json").read_text())["x"] == {
        "value": 4.0, "low": round(found.low, 6), "high": round(found.high, 6), "n": 18, "subjects": 9,
    }  # fmt: skip
    print_intervals("figures", {"T1": {"x": found}})
    shown = capsys.readouterr().out
    assert "18 (9)" in shown
    assert f"[{found.low:.3g}, {found.high:.3g}]" in shown


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
