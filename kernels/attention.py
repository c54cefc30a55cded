"""Softmax attention by whichever library does it best here: one function over xformers, torch's fused kernels and plain math.

``auto`` measures the backends once a (shape, dtype, device) and keeps the choice on disk, because the choice decides the last digits of a
run. On a CPU it measures nothing: torch has one fused kernel there, and a result must not depend on how busy the machine was.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)

BACKENDS = ("xformers", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "math")
_TORCH = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
MAX_CACHE_BYTES = 2**22


def attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, backend: str | None = None) -> Tensor:
    """Softmax attention without mask or dropout, all tensors [B, T, H, K], scaled by K^-1/2.

    ``backend``: one of ``BACKENDS`` or ``auto``; None takes G3N_ATTENTION, or ``auto`` where that is unset. Raises RuntimeError
    for an unknown backend, and for a named one that cannot run these inputs here.
    Meta tensors stand for a GPU's: whatever the backend, shapes and what is kept for the backward are those of a fused kernel.
    """
    if q_BTHK.is_meta:
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        fused: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0].transpose(1, 2)
        return fused
    return _run(chosen(q_BTHK, k_BTHK, v_BTHK, backend)[0], q_BTHK, k_BTHK, v_BTHK)


def chosen(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, backend: str | None = None) -> tuple[str, str]:
    """(backend, reason) that ``attention`` takes for these inputs; errors as there."""
    training = torch.is_grad_enabled() and (q_BTHK.requires_grad or k_BTHK.requires_grad or v_BTHK.requires_grad)
    return _decide(backend, *q_BTHK.shape, k_BTHK.shape[1], q_BTHK.dtype, str(q_BTHK.device), training)


def obstacles() -> dict[str, str]:
    """Each backend and "" where this machine may have it (some shapes may still be refused), else the reason why not."""
    missing = ""
    try:
        logging.getLogger("xformers").setLevel(logging.ERROR)  # it warns of each part that was built for a GPU
        import xformers.ops  # noqa: F401
    except ImportError:
        missing = "not installed (pip install 'g3n[xformers]')"
    except Exception as error:  # built for another torch: it raises whatever its C++ part does
        missing = f"cannot be loaded ({' '.join(str(error).split())[:120]})"
    gpu = torch.cuda.is_available()
    if not missing and not gpu:
        missing = "installed, but needs a CUDA device"
    needs = "" if gpu else "needs a CUDA device"
    return {"xformers": missing, "sdpa-cudnn": needs, "sdpa-flash": "", "sdpa-efficient": needs, "math": ""}


def requested(backend: str | None = None) -> str:
    """The backend asked for: the argument, G3N_ATTENTION, or ``auto``. Raises RuntimeError for one that cannot be."""
    name = backend or os.environ.get("G3N_ATTENTION") or "auto"
    if name != "auto" and name not in BACKENDS:
        raise RuntimeError(f"attention backend '{name}' is unknown; G3N_ATTENTION is auto, {', '.join(BACKENDS)}")
    if name != "auto" and (why_not := obstacles()[name]):
        raise RuntimeError(f"attention backend {name} cannot be used: {why_not}; use G3N_ATTENTION=auto")
    return name


def _run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == "xformers":
        from xformers.ops import memory_efficient_attention

        out: Tensor = memory_efficient_attention(q, k, v)
        return out
    with sdpa_kernel(_TORCH[name]):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@torch.compiler.assume_constant_result  # a compiled model asks once, while it is traced
def _decide(
    backend: str | None, B: int, T: int, H: int, K: int, S: int, dtype: torch.dtype, device: str, training: bool
) -> tuple[str, str]:
    environment = os.environ.get("G3N_ATTENTION") if backend is None else None
    return _decided(backend or environment, B, T, H, K, S, dtype, device, training)


@functools.cache
def _decided(
    backend: str | None, B: int, T: int, H: int, K: int, S: int, dtype: torch.dtype, device: str, training: bool
) -> tuple[str, str]:
    name = requested(backend)
    inputs = (B, T, H, K, S, dtype, device, training)
    if name != "auto":
        if why_not := _refusal(name, 1, *inputs[1:]):
            raise RuntimeError(
                f"attention backend {name} cannot run {_words(inputs)}: {why_not}; use G3N_ATTENTION=auto"
            )
        return name, "asked for"
    if not device.startswith("cuda"):
        refused = _refusal("sdpa-flash", 1, *inputs[1:])
        name, reason = (
            ("math", refused) if refused else ("sdpa-flash", "the fused kernel for this device; not measured")
        )
    else:
        name, reason = _measured(*inputs)
    log.info("attention for %s: %s (%s)", _words(inputs), name, reason)
    return name, reason


def _words(inputs: tuple[Any, ...], sep: str = " ") -> str:
    B, T, H, K, S, dtype, device, training = inputs
    tokens = f"T={T}" if S == T else f"T={T}{sep}S={S}"
    kind = str(dtype).removeprefix("torch.")
    return sep.join([f"B={B}", tokens, f"H={H}", f"K={K}", kind, device, "training" if training else "inference"])


def _draw(
    B: int, T: int, H: int, K: int, S: int, dtype: torch.dtype, device: str, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    q, k, v = (
        torch.randn(B, n, H, K, dtype=torch.float32, device=device, generator=generator).to(dtype) for n in (T, S, S)
    )
    return q.requires_grad_(training), k.requires_grad_(training), v.requires_grad_(training)


def _once(name: str, qkv: tuple[Tensor, Tensor, Tensor], training: bool) -> None:
    def as_it_is(tensor: Tensor) -> Tensor:
        return tensor

    # Hooks of its own: activation checkpointing around the caller must not count what is tried out here.
    with torch.set_grad_enabled(training), torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is):
        out = _run(name, *qkv)
        if training:
            torch.autograd.grad(out, qkv, torch.ones_like(out))


def _refusal(name: str, *inputs: Any) -> str:
    """Why a backend cannot run such inputs; empty where it just has."""
    with warnings.catch_warnings(record=True) as said:  # torch says by warnings why it refuses
        warnings.simplefilter("always")
        try:
            _once(name, _draw(*inputs), inputs[-1])
        except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            reasons = [str(w.message) for w in said if "torch.compile" not in str(w.message)] or [str(error)]
            return " ".join(" ".join(r.split()) for r in reasons)[:300]
    return ""


def _measured(*inputs: Any) -> tuple[str, str]:
    """The fastest backend on this device, from disk where it was measured before."""
    key = f"{_versions()}|{torch.cuda.get_device_name(inputs[6])}|{_words(inputs, ',').replace(inputs[6], 'cuda')}"
    known = _read().get(key, {})
    if known.get("backend") in BACKENDS and not obstacles()[known["backend"]]:
        return known["backend"], f"measured before, see {cache_path()}"
    milliseconds, refused = {}, {}
    for name, why_not in obstacles().items():
        if name != "math":
            refused[name] = why_not or _refusal(name, *inputs)
            if not refused[name]:
                milliseconds[name] = _milliseconds(name, inputs)
    if not milliseconds:
        return "math", "; ".join(f"{name}: {why}" for name, why in refused.items())
    best = min(milliseconds, key=milliseconds.__getitem__)
    _remember(key, {"backend": best, "ms": milliseconds})
    return best, f"measured, {_times(milliseconds)}"


def _times(milliseconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.3f} ms" for name, ms in sorted(milliseconds.items(), key=lambda item: item[1]))


def _milliseconds(name: str, inputs: tuple[Any, ...], repeats: int = 15) -> float:
    """Median time of a call, with its gradients where they will be needed."""
    qkv, device = _draw(*inputs), inputs[6]
    gpu = device.startswith("cuda")
    times = []
    for i in range(3 + repeats):
        if gpu:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        _once(name, qkv, inputs[-1])
        if gpu:
            torch.cuda.synchronize(device)
        if i >= 3:
            times.append(1e3 * (time.perf_counter() - begin))
    return round(statistics.median(times), 4)


def _versions() -> str:
    try:
        xformers = importlib.metadata.version("xformers")
    except importlib.metadata.PackageNotFoundError:
        xformers = "none"
    return f"torch {torch.__version__}, xformers {xformers}"


def cache_path() -> Path:
    """attention.json in G3N_CACHE, or g3n/ in the user's cache folder."""
    if folder := os.environ.get("G3N_CACHE"):
        return Path(folder) / "attention.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g3n" / "attention.json"


def _read() -> dict[str, Any]:
    """What was measured before; a file that is missing or spoiled is as good as none."""
    path = cache_path()
    try:
        if path.stat().st_size > MAX_CACHE_BYTES:
            raise ValueError(f"more than {MAX_CACHE_BYTES} bytes")
        known = json.loads(path.read_text(encoding="utf-8"))
        return {key: entry for key, entry in known.items() if isinstance(entry, dict)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("the attention cache '%s' is not read (%s): backends are measured again", path, error)
        return {}


def _remember(key: str, entry: dict[str, Any]) -> None:
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_text(json.dumps({**_read(), key: entry}, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        log.warning("the attention cache '%s' is not written (%s): each process measures for itself", path, error)
