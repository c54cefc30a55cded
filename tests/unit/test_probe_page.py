"""The page of probes says what g3n probe found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.probe_page import main

CELL = {"value": 0.9, "low": 0.85, "high": 0.94, "n": 50, "subjects": 40, "sd": 0.01}
METRICS = {
    "about": {"folds": 5, "repeats": 5, "seed": 0, "notes": ["a note"]},
    "tasks": {
        "sex all": {
            "n_scans": 50, "n_subjects": 40, "classes": {"F": 21, "M": 19},
            "folds": {"ours mean": {"auroc": CELL, "p": 0.001, "p_holm": 0.009, "q_bh": 0.003}, "majority": {"auroc": {**CELL, "value": 0.5}}},
            "leave-site-out": {"ours mean": {"auroc": {**CELL, "value": 0.8, "low": None, "high": None}}},
        },
        "age all": {
            "n_scans": 50, "n_subjects": 40, "classes": {},
            "folds": {"ours mean": {"mae": {**CELL, "value": 8.1, "low": 7, "high": 9}, "r": CELL, "p": 0.2, "p_holm": 1, "q_bh": 0.4}},
        },
    },
    "did_not_run": {"idh T1c": "no scan has idh"},
}  # fmt: skip


def test_every_figure_stands_in_its_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "comparisons.csv").write_text(
        "task,modality,encoder,kind,other,other_kind,metric,difference,low,high,z,p,p_holm,q_bh\n"
        "sex,all,ours,mean,age,,auroc,0.1,0.05,0.15,3,0.003,0.006,0.006\n"
    )
    page = tmp_path / "page.md"
    assert main([str(tmp_path), "--output", str(page), "--how", "g3n probe"]) == 0
    text = page.read_text()
    assert "| sex | 40 (50); F 21; M 19 | ours mean | 0.9 [0.85, 0.94] |  |  | 0.001 | 0.009 | 0.003 |" in text
    assert "| sex | 40 (50); F 21; M 19 | majority | 0.5 [0.85, 0.94] |  |  |  |  |  |" in text
    assert "| sex, leave-site-out | 40 (50); F 21; M 19 | ours mean | 0.8 |  |  |  |  |  |" in text
    assert "| age | 40 (50) | ours mean |  | 8.1 [7, 9] | 0.9 [0.85, 0.94] | 0.2 | 1 | 0.4 |" in text
    assert "| sex | ours mean | age | auroc | 0.1 [0.05, 0.15] | 0.003 | 0.006 | 0.006 |" in text
    assert "- not run: idh T1c: no scan has idh" in text
    page.write_text(text + "\n## What it means\n\nMuch.\n")
    main([str(tmp_path), "--output", str(page), "--how", "g3n probe"])
    assert page.read_text() == text + "\n## What it means\n\nMuch.\n"
    assert main([str(tmp_path / "none"), "--output", str(page)]) == 2
    assert "has no metrics.json" in capsys.readouterr().err
