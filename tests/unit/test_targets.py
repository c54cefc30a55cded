"""The page of targets says what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.targets import FIGURES, main


def figure(value: float, subjects: int = 8) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 16, "subjects": subjects}


REPORT = {
    "about": {"command": "g3n report --run r", "seed": 3, "count": 64, "step": 900, "git": "abc"},
    "reconstruction": {"intervals": {"all": {"psnr_gain_db": figure(8.4, 59), "ssim": figure(0.86, 59)}}},
    "generation": {"effects": {"age": {"r": figure(0.93)}}},
    "forecasting": {
        "methods": {"ours": {"ventricle_error_ml": figure(0.9)}, "no_change": {"ventricle_error_ml": figure(1.2)}}
    },
    "audit": {
        "nearest": {"latent": {"share": 0.05, "share_low": 0.01, "share_high": 0.1, "of": 64}},
        "membership": {"auc_by_distance": figure(0.57)},
        "verdict": "Of 64 volumes",
    },
}


def test_what_holds_and_what_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    assert main([str(tmp_path), "--output", str(tmp_path / "page.md"), "--how", "make demo"]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "| reconstruction: PSNR over the mean volume, dB | >= 7 | 8.4 [8.3, 8.5] | 59 | yes |" in text
    assert "| reconstruction: SSIM | >= 0.87 | 0.86 [0.76, 0.96] | 59 | **no** |" in text
    assert "| ventricles against requested age: r | >= 0.9 | 0.93 [0.83, 1.03] | 8 | yes |" in text
    assert "share less than no change | >= 0.2 | 0.25 | 8 | yes |" in text
    assert "under the 5th percentile of real to real | 0 | 0.05 [0.01, 0.1] | 64 | **no** |" in text
    assert "| audit: AUC of membership by distance |  | 0.57 [0.47, 0.67] | 8 |  |" in text
    assert "make demo\ng3n report --run r\n" in text
    assert "seed 3" in text
    assert "frechet" not in text  # what the report lacks is not there
    (tmp_path / "page.md").write_text(text.replace("8.4 [", "9.9 [") + "\n## What does not please\n\nSSIM.\n")
    main([str(tmp_path), "--output", str(tmp_path / "page.md"), "--how", "make demo"])
    assert (tmp_path / "page.md").read_text() == text + "\n## What does not please\n\nSSIM.\n"


def test_the_other_setting_has_its_own_targets(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    main([str(tmp_path), "--output", str(tmp_path / "page.md"), "--setting", "gpu"])
    text = (tmp_path / "page.md").read_text()
    assert "| ventricles against requested age: r | >= 0.95 | 0.93 [0.83, 1.03] | 8 | **no** |" in text
    assert "PSNR over the mean volume, dB |  |" in text


def test_a_folder_without_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "page.md")]) == 2
    assert "run g3n report first" in capsys.readouterr().err


def test_no_figure_twice() -> None:
    paths = [path for _, path, _ in FIGURES]
    assert len(set(paths)) == len(paths)
