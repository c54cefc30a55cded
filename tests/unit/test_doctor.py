"""The doctor names what will be used and why; attention backends agree with each other."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from g3n import ops
from g3n.doctor import facts, report


def test_facts() -> None:
    rows = {(part, found): so for part, found, so in facts()}
    parts = {part for part, _ in rows}
    assert {"python", "memory", "torch", "deepspeed", "kernels", "attention"} <= parts
    assert ("torch", torch.__version__.split("+")[0]) in {(p, f.split("+")[0]) for p, f in rows}
    assert sum(so == "used" for (part, _), so in rows.items() if part == "attention") == 1
    if not torch.cuda.is_available():
        assert next(so for (part, found), so in rows.items() if part == "GPU" and found == "none")


@pytest.mark.parametrize("backend", ["sdpa", "math", "xformers"])
def test_attention_is_softmax_attention(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not := ops.attention_backends()[backend]:
        pytest.skip(why_not)
    monkeypatch.setenv("G3N_ATTENTION", backend)
    q, k, v = torch.randn(3, 2, 10, 4, 12)
    weights = torch.einsum("bthk,bshk->bhts", q.double(), k.double()) / 12**0.5
    expected = torch.einsum("bhts,bshk->bthk", weights.softmax(-1), v.double())
    assert float((ops.attention(q, k, v) - expected).abs().max()) < 1e-5


def test_a_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G3N_ATTENTION", "flash9")
    with pytest.raises(RuntimeError, match="G3N_ATTENTION=flash9 is unknown; give auto, sdpa, math, xformers"):
        ops.attention_backend()
    if why_not := ops.attention_backends()["xformers"]:
        monkeypatch.setenv("G3N_ATTENTION", "xformers")
        with pytest.raises(RuntimeError, match="G3N_ATTENTION=xformers cannot be done"):
            ops.attention_backend()
        assert why_not


def test_the_table_shows_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "attention_backends", lambda: {"sdpa": "", "xformers": "pip install 'g3n[xformers]'"})
    console = Console(record=True, width=200, file=io.StringIO())
    report(console)
    assert "pip install 'g3n[xformers]'" in console.export_text()
