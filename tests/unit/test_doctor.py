"""The doctor names what will be used and why."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from g3n import ops
from g3n.doctor import facts, report
from g3n.train import main
from tests.launch import ROOT


def test_facts() -> None:
    rows = {(part, found): so for part, found, so in facts()}
    parts = {part for part, _ in rows}
    assert {"python", "memory", "torch", "deepspeed", "kernels", "attention"} <= parts
    assert ("torch", torch.__version__.split("+")[0]) in {(p, f.split("+")[0]) for p, f in rows}
    assert any(
        found == "auto" and "measures once a shape" in so for (part, found), so in rows.items() if part == "attention"
    )
    if not torch.cuda.is_available():
        assert next(so for (part, found), so in rows.items() if part == "GPU" and found == "none")


def test_the_table_shows_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "attention_obstacles", lambda: {"sdpa": "", "xformers": "pip install 'g3n[xformers]'"})
    console = Console(record=True, width=200, file=io.StringIO())
    report(console)
    assert "pip install 'g3n[xformers]'" in console.export_text()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("G3N_ATTENTION", "flash9", "attention backend 'flash9' is unknown"), ("G3N_KERNELS", "cuda", "is unknown")],
)
def test_training_refuses_a_kernel_or_backend_that_is_not_there_in_one_line(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["--config", str(ROOT / "configs/tiny/mae.yaml"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
