"""Every backend that runs here is softmax attention; one that cannot run says so; ``auto`` measures once and remembers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import attention as module
from kernels.attention import BACKENDS, attention, cache_path, chosen, obstacles

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G3N_CACHE", str(tmp_path))
    monkeypatch.delenv("G3N_ATTENTION", raising=False)
    module._decided.cache_clear()


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshk->bthk", weights.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_values_and_gradients_are_those_of_softmax_attention(backend: str, dtype: torch.dtype) -> None:
    if backend != "auto" and (why_not := obstacles()[backend]):
        pytest.skip(why_not)
    torch.manual_seed(0)
    for B, T, H, K in [(2, 10, 4, 24), (1, 37, 2, 72)] + ([(2, 1201, 16, 72), (1, 360, 9, 128)] if GPU else []):
        qkv = [torch.randn(B, T, H, K, device=DEVICE).to(dtype).requires_grad_() for _ in range(3)]
        try:
            out = attention(*qkv, backend=backend)
        except RuntimeError as error:
            if GPU and "cannot run" in str(error):
                continue  # fp32 in the flash kernels
            raise
        dout = torch.randn_like(out)
        found = [out, *torch.autograd.grad(out, qkv, dout)]
        doubles = [t.detach().double().requires_grad_() for t in qkv]
        want = exact(*doubles)
        wanted = [want, *torch.autograd.grad(want, doubles, dout.double())]
        tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).norm() < tolerance * b.norm(), (B, T, H, K)


def test_queries_may_be_fewer_than_keys_and_views_of_one_tensor() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 10, 3, 4, 12, device=DEVICE)
    q, k, v = qkv.unbind(2)
    torch.testing.assert_close(attention(q[:, :3], k, v), exact(q[:, :3], k, v), rtol=1e-4, atol=1e-5)


def test_a_backend_that_cannot_run_is_an_error_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 3, 2, 8, device=DEVICE)
    monkeypatch.setenv("G3N_ATTENTION", "flash9")
    with pytest.raises(RuntimeError, match="'flash9' is unknown; G3N_ATTENTION is auto, xformers, sdpa-cudnn"):
        attention(q, q, q)
    for name, why_not in obstacles().items():
        if why_not:
            with pytest.raises(RuntimeError, match=f"attention backend {name} cannot be used: .*(install|CUDA)"):
                attention(q, q, q, backend=name)
    monkeypatch.setattr(module, "obstacles", lambda: dict.fromkeys(BACKENDS, ""))
    if not GPU:  # as if the machine had it: the kernel itself refuses
        with pytest.raises(
            RuntimeError, match=r"sdpa-cudnn cannot run B=1 T=3 H=2 K=8 float32 cpu inference: .*backend"
        ):
            attention(q, q, q, backend="sdpa-cudnn")


def test_auto_says_what_it_took_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kernels.attention")
    q = torch.randn(1, 3, 2, 8, device=DEVICE)
    attention(q, q, q)
    attention(q, q, q)
    backend, reason = chosen(q, q, q)
    assert backend in BACKENDS
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("attention for")]
    assert lines == [f"attention for B=1 T=3 H=2 K=8 float32 {q.device} inference: {backend} ({reason})"]


MEASURED = (4, 1200, 16, 72, 1200, torch.bfloat16, "cuda:0", True)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended GPU on which cuDNN refuses and flash is fastest; the list grows with each measurement."""
    names: list[str] = []
    milliseconds = {"xformers": 0.9, "sdpa-flash": 0.7, "sdpa-efficient": 1.1}

    def time(name: str, inputs: object) -> float:
        names.append(name)
        return milliseconds[name]

    monkeypatch.setattr(module, "obstacles", lambda: dict.fromkeys(BACKENDS, ""))
    monkeypatch.setattr(module, "_refusal", lambda name, *inputs: "head width" if name == "sdpa-cudnn" else "")
    monkeypatch.setattr(module, "_milliseconds", time)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    return names


def test_auto_measures_once_and_keeps_the_choice_on_disk(measured: list[str]) -> None:
    backend, reason = module._decided(None, *MEASURED)
    assert backend == "sdpa-flash"
    assert reason == "measured, sdpa-flash 0.700 ms, xformers 0.900 ms, sdpa-efficient 1.100 ms"
    assert sorted(measured) == ["sdpa-efficient", "sdpa-flash", "xformers"]
    module._decided.cache_clear()  # another process
    assert module._decided(None, *MEASURED)[0] == "sdpa-flash"
    assert len(measured) == 3
    (key,) = json.loads(cache_path().read_text())
    assert key.startswith(f"torch {torch.__version__}, xformers ")
    assert key.endswith("|Pretended GPU|B=4,T=1200,H=16,K=72,bfloat16,cuda,training")
    module._decided(None, *MEASURED[:-1], False)
    assert len(measured) == 6  # inference is another question
    assert len(json.loads(cache_path().read_text())) == 2


@pytest.mark.parametrize("spoiled", ["{", "[1]", '{"a": 1}', '{"x": {"backend": "rm -rf"}}', "\x00" * 9])
def test_a_spoiled_cache_is_measured_again(spoiled: str, measured: list[str]) -> None:
    cache_path().write_text(spoiled)
    assert module._decided(None, *MEASURED)[0] == "sdpa-flash"
    assert len(measured) == 3
    module._decided.cache_clear()
    assert module._decided(None, *MEASURED)[0] == "sdpa-flash"
    assert len(measured) == 3


def test_a_remembered_backend_that_is_gone_is_not_taken(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module._decided(None, *MEASURED)
    module._decided.cache_clear()
    monkeypatch.setattr(module, "obstacles", lambda: {**dict.fromkeys(BACKENDS, ""), "sdpa-flash": "uninstalled"})
    assert module._decided(None, *MEASURED)[0] == "xformers"


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    measured: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("G3N_CACHE", str(tmp_path / "file"))
    assert module._decided(None, *MEASURED)[0] == "sdpa-flash"
    assert "is not written" in caplog.text
    assert measured


def test_the_first_call_may_be_inside_activation_checkpointing() -> None:
    """Trying a backend out must not be counted among the block's saved tensors."""
    q = torch.randn(1, 8, 2, 16, requires_grad=True)
    expected = torch.autograd.grad(module.attention(q, q, q).square().sum(), q)[0]
    module._decided.cache_clear()
    out = torch.utils.checkpoint.checkpoint(module.attention, q, q, q, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.square().sum(), q)[0], expected)
