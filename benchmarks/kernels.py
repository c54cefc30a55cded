"""Kernels against eager torch, torch.compile and fused layer norms of others: ``python -m benchmarks.kernels``.

Cases run by importance, the published shape first, until --minutes are used up. Bandwidth is the bytes an op cannot
do without (``OPS``: each input read once, each output written once) over its time; share_of_copy is that over the
speed of a large copy in the same run. error is ||out - exact|| / ||exact|| against the reference in float64, of the
output or gradient where it is largest. Without a GPU, g3n is its plain-torch reference and rows prove the path alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F

import kernels
from benchmarks.measure import (
    Deadline,
    copy_bandwidth,
    device,
    graph_seconds,
    host_seconds,
    in_words,
    peak_bytes,
    quick_seconds,
    relative_error,
    write_rows,
)
from kernels import reference

try:
    import einops
except ImportError:
    einops = None

BATCHES = (16, 4, 64, 8, 32, 2, 1)
TOKENS = (1200, 360)
WIDTHS = (1152, 768, 1536, 384)
VOLUME, PATCH = (160, 192, 160), 16
SMALL_BYTES = 4 * 2**20  # below, a call costs the host more than the device
EPS = 1e-6
NAMES = ("g3n", "eager", "compile", "compile-static", "liger", "apex")


@dataclass(frozen=True)
class Case:
    """One op on one shape: x is [B, T, D]; of patches T are chosen, D are their voxels; ``shape`` is a volume's."""

    op: str
    B: int
    T: int
    D: int
    dtype: torch.dtype
    modulation: str = ""  # sample: [B, D], token: [B, T, D]
    shape: tuple[int, ...] = ()
    option: str = ""  # standardized: norm_target of the loss

    @property
    def published(self) -> bool:
        return (self.B, self.T, self.D, self.dtype, self.modulation) == (16, 1200, 1152, torch.bfloat16, "sample")

    @property
    def patch(self) -> int:
        return round(self.D ** (1 / 3))

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(side // self.patch for side in self.shape)

    @property
    def x_bytes(self) -> int:
        return self.B * self.T * self.D * self.dtype.itemsize

    def __str__(self) -> str:
        words = [
            self.op,
            f"{self.B}x{self.T}x{self.D}",
            str(self.dtype).removeprefix("torch."),
            self.modulation,
            "x".join(map(str, self.shape)),
            self.option,
        ]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Op:
    """What is measured of an op; its functions take the tensors of ``draw`` and the constants as keywords."""

    draw: Callable[[Case], list[Tensor]]  # batch first in each
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    exact: Callable[..., Any]
    count: Callable[[Case, str], int]  # minimal bytes of a case and a pass
    passes: tuple[str, ...]
    learn: int = 0  # how many of the first tensors get gradients
    constants: Callable[[Case], dict[str, Any]] = lambda case: {}
    norm: bool = False  # holds a layer norm that liger and apex can take over


# --- eager torch as an author of a DiT writes it, in the dtype at hand


def _a_token(m: Tensor) -> Tensor:
    return m[:, None] if m.ndim == 2 else m


def eager_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=EPS) * (1 + _a_token(scale)) + _a_token(shift)


def eager_gate(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return x + _a_token(gate) * h


def eager_gated_adaln(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = x + _a_token(gate) * h
    return x, F.layer_norm(x, (x.shape[-1],), eps=EPS) * (1 + _a_token(scale)) + _a_token(shift)


def _patches(volume: Tensor, patch: int) -> Tensor:
    if einops is not None:
        pattern = "b (x p) (y q) (z r) -> b (x y z) (p q r)"
        return einops.rearrange(volume, pattern, p=patch, q=patch, r=patch)
    B, X, Y, Z = volume.shape
    volume = volume.reshape(B, X // patch, patch, Y // patch, patch, Z // patch, patch)
    return volume.permute(0, 1, 3, 5, 2, 4, 6).reshape(B, -1, patch**3)


def _normalized(v: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return torch.where(v != 0, (v.float() - mean[:, None, None]) * rstd[:, None, None], 0.0)


def eager_gather(
    volume: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, patch: int, out_dtype: torch.dtype
) -> Tensor:
    v = _patches(volume, patch)[torch.arange(len(volume), device=volume.device)[:, None], index]
    return _normalized(v, mean, rstd).to(out_dtype)


def eager_patchify(volume: Tensor, mean: Tensor, rstd: Tensor, patch: int, out_dtype: torch.dtype) -> Tensor:
    return _normalized(_patches(volume, patch), mean, rstd).to(out_dtype)


def eager_unpatchify(patches: Tensor, patch: int, grid_tokens: tuple[int, int, int]) -> Tensor:
    x, y, z = grid_tokens
    if einops is not None:
        pattern = "b (x y z) (p q r) -> b (x p) (y q) (z r)"
        return einops.rearrange(patches, pattern, x=x, y=y, z=z, p=patch, q=patch, r=patch)
    v = patches.reshape(len(patches), x, y, z, patch, patch, patch).permute(0, 1, 4, 2, 5, 3, 6)
    return v.reshape(len(patches), x * patch, y * patch, z * patch)


def eager_loss(
    pred: Tensor, volume: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, patch: int, norm_target: bool
) -> Tensor:
    target = eager_gather(volume, index, mean, rstd, patch, torch.float32)
    if norm_target:
        var, center = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - center) / (var + 1e-6).sqrt()
    return (pred - target).abs().mean()


def liger_norm(D: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    weight, bias = (torch.full((D,), fill, dtype=like.dtype, device=like.device) for fill in (1.0, 0.0))
    return lambda x: function.apply(x, weight, bias, EPS)


def apex_norm(D: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    norm = importlib.import_module("apex.normalization").FusedLayerNorm(D, eps=EPS, elementwise_affine=False)
    return norm.to(like.device)


def around(norm: Callable[[Tensor], Tensor], gated: bool) -> Callable[..., Any]:
    """The eager op with another layer norm in it."""

    def adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x) * (1 + _a_token(scale)) + _a_token(shift)

    def gated_adaln(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x + _a_token(gate) * h
        return x, adaln(x, shift, scale)

    return gated_adaln if gated else adaln


# --- inputs and bytes


def draw_rows(rows: int, modulations: int) -> Callable[[Case], list[Tensor]]:
    def draw(case: Case) -> list[Tensor]:
        B, T, D = case.B, case.T, case.D
        shapes = [(B, T, D)] * rows + [(B, D) if case.modulation == "sample" else (B, T, D)] * modulations
        return [torch.randn(shape, dtype=case.dtype, device=device()) for shape in shapes]

    return draw


def _volume(case: Case) -> list[Tensor]:
    """int16 volume with a background slab, mean and rstd."""
    volume = torch.randint(1, 3000, (case.B, *case.shape), dtype=torch.int16, device=device())
    volume[:, : case.shape[0] // 5] = 0
    return [volume, torch.full((case.B,), 1500.0, device=device()), torch.full((case.B,), 1e-3, device=device())]


def _index(case: Case) -> Tensor:
    x, y, z = case.grid
    return torch.stack([torch.randperm(x * y * z, device=device())[: case.T] for _ in range(case.B)])


def draw_gather(case: Case) -> list[Tensor]:
    volume, mean, rstd = _volume(case)
    return [volume, _index(case), mean, rstd]


def draw_patches(case: Case) -> list[Tensor]:
    return [torch.randn(case.B, case.T, case.D, dtype=case.dtype, device=device())]


def draw_loss(case: Case) -> list[Tensor]:
    return [*draw_patches(case), *(draw_gather(case))]


def _modulation_bytes(case: Case) -> int:
    return case.B * (case.T if case.modulation == "token" else 1) * case.D * case.dtype.itemsize


def adaln_bytes(case: Case, pass_: str) -> int:
    """x, y, shift, scale. Backward: dy, x, dx, scale, d scale, and d shift where it is not dy itself."""
    x, m = case.x_bytes, _modulation_bytes(case)
    forward, backward = 2 * x + 2 * m, 3 * x + (2 if case.modulation == "token" else 3) * m
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[pass_]


def gate_bytes(case: Case, pass_: str) -> int:
    """x, h, x1, gate. Backward: d, h, dh, gate, d gate; dx is d itself."""
    x, m = case.x_bytes, _modulation_bytes(case)
    forward, backward = 3 * x + m, 3 * x + 2 * m
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[pass_]


def gated_adaln_bytes(case: Case, pass_: str) -> int:
    """x, h, x1, y, three modulations. Backward: dx1, dy, x1, h, dx, dh; gate, scale and the gradients of all three."""
    x, m = case.x_bytes, _modulation_bytes(case)
    forward, backward = 4 * x + 3 * m, 6 * x + (4 if case.modulation == "token" else 5) * m
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[pass_]


def gather_bytes(case: Case, pass_: str) -> int:
    """The chosen int16 voxels, their patches; index, mean and rstd."""
    return case.B * case.T * case.D * 2 + case.x_bytes + case.B * (8 * case.T + 8)


def patchify_bytes(case: Case, pass_: str) -> int:
    """The int16 volume, its patches; mean and rstd."""
    return case.B * case.T * case.D * 2 + case.x_bytes + case.B * 8


def unpatchify_bytes(case: Case, pass_: str) -> int:
    return 2 * case.x_bytes


def loss_bytes(case: Case, pass_: str) -> int:
    """The prediction and the chosen int16 voxels are read; with gradients, one of the prediction's size is written."""
    read = case.x_bytes + case.B * case.T * case.D * 2 + case.B * (8 * case.T + 8)
    return read + (0 if pass_ == "no_grad" else case.x_bytes)


def _loss_of(module: Any) -> Callable[..., Tensor]:
    def loss(
        pred: Tensor, volume: Tensor, index: Tensor, mean: Tensor, rstd: Tensor, patch: int, norm_target: bool
    ) -> Tensor:
        found: Tensor = module.masked_patch_loss(pred, volume, index, patch, mean, rstd, norm_target, "l1")
        return found

    return loss


def _gather_of(module: Any, exact: bool = False) -> Callable[..., Tensor]:
    def gather(
        volume: Tensor, index: Tensor | None, mean: Tensor, rstd: Tensor, patch: int, out_dtype: torch.dtype
    ) -> Tensor:
        found: Tensor = module.patchify3d(volume, patch, index, mean, rstd, None, torch.float64 if exact else out_dtype)
        return found

    return gather


def _whole_of(module: Any, exact: bool = False) -> Callable[..., Tensor]:
    gather = _gather_of(module, exact)
    return lambda volume, mean, rstd, **constants: gather(volume, None, mean, rstd, **constants)


def _patchify_constants(case: Case) -> dict[str, Any]:
    return {"patch": case.patch, "out_dtype": case.dtype}


BOTH = ("forward", "backward")
OPS = {
    "adaln_modulate": Op(
        draw_rows(1, 2), kernels.adaln_modulate, eager_adaln, reference.adaln_modulate, adaln_bytes, BOTH, 3, norm=True
    ),
    "gate_residual": Op(
        draw_rows(2, 1), kernels.gate_residual, eager_gate, reference.gate_residual, gate_bytes, BOTH, 3
    ),
    "gate_residual_adaln": Op(
        draw_rows(2, 3),
        kernels.gate_residual_adaln,
        eager_gated_adaln,
        reference.gate_residual_adaln,
        gated_adaln_bytes,
        BOTH,
        5,
        norm=True,
    ),
    "patchify3d 30 %": Op(
        draw_gather,
        _gather_of(kernels),
        eager_gather,
        _gather_of(reference, True),
        gather_bytes,
        ("forward",),
        constants=_patchify_constants,
    ),
    "patchify3d": Op(
        _volume,
        _whole_of(kernels),
        eager_patchify,
        _whole_of(reference, True),
        patchify_bytes,
        ("forward",),
        constants=_patchify_constants,
    ),
    "unpatchify3d": Op(
        draw_patches,
        kernels.unpatchify3d,
        eager_unpatchify,
        reference.unpatchify3d,
        unpatchify_bytes,
        ("forward",),
        constants=lambda case: {"patch": case.patch, "grid_tokens": case.grid},
    ),
    "masked_patch_loss": Op(
        draw_loss,
        _loss_of(kernels),
        eager_loss,
        _loss_of(reference),
        loss_bytes,
        ("forward", "forward+backward", "no_grad"),
        1,
        lambda case: {"patch": case.patch, "norm_target": case.option == "standardized"},
    ),
}
ROW_OPS = ("adaln_modulate", "gate_residual_adaln", "gate_residual")


# --- which cases


def row_cases(
    batches: Sequence[int], tokens: Sequence[int], widths: Sequence[int], dtype: torch.dtype, modulation: str = "sample"
) -> list[Case]:
    return [Case(op, B, T, D, dtype, modulation) for T in tokens for D in widths for B in batches for op in ROW_OPS]


def patch_cases(B: int, shape: tuple[int, int, int], patch: int, dtype: torch.dtype) -> list[Case]:
    n, d = shape[0] * shape[1] * shape[2] // patch**3, patch**3
    masked = n - int(0.3 * n)
    return [
        Case("patchify3d 30 %", B, int(0.3 * n), d, dtype, shape=shape),
        Case("masked_patch_loss", B, masked, d, dtype, shape=shape),
        Case("masked_patch_loss", B, masked, d, dtype, shape=shape, option="standardized"),
        Case("patchify3d", B, n, d, dtype, shape=shape),
        Case("unpatchify3d", B, n, d, dtype, shape=shape),
    ]


def cases(small: bool) -> list[Case]:
    """The most important ones first."""
    bf16, fp32 = torch.bfloat16, torch.float32
    if small or device() == "cpu":
        return [
            *row_cases((4,), (150,), (192,), fp32),
            *row_cases((1,), (150,), (192,), fp32, "token"),
            *patch_cases(2, (40, 48, 40), 8, fp32),
        ]
    several = BATCHES[:-1]  # one compilation serves all of them
    order = [
        *row_cases((16,), (1200,), (1152,), bf16),
        *patch_cases(16, VOLUME, PATCH, bf16),
        *row_cases(several, (1200,), (1152,), bf16),
        *patch_cases(4, VOLUME, PATCH, bf16),
        *row_cases((16, 4), (360,), (1152,), bf16),
        *row_cases((16, 4), (1200,), WIDTHS, bf16),
        *row_cases((4,), (1200,), (1152,), bf16, "token"),
        *row_cases((4,), (1200,), (1152,), fp32),
        *row_cases((1,), (1200, 360), (1152,), bf16),
        *row_cases(several, TOKENS, WIDTHS, bf16),
        *patch_cases(1, VOLUME, PATCH, bf16),
        *row_cases((1,), TOKENS, WIDTHS, bf16),
        *row_cases((16,), (1200,), (768,), bf16, "token"),
        *row_cases((16,), (360,), (768,), fp32),
    ]
    return list(dict.fromkeys(order))


# --- implementations


@functools.cache
def compiled(function: Callable[..., Any], key: Case, dynamic: bool | None) -> Callable[..., Any]:
    """torch.compile of a copy with its own code object a ``key``: guards of other shapes would cost host time."""
    own = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    done: Callable[..., Any] = torch.compile(own, dynamic=dynamic)
    return done


def implementation(name: str, case: Case, like: Tensor) -> Callable[..., Any] | None:
    """None where it has nothing to say about this case or is not installed."""
    op = OPS[case.op]
    any_batch = Case(case.op, 0, case.T, case.D, case.dtype, case.modulation, case.shape, case.option)
    if name == "g3n":
        return op.ours
    if name == "eager":
        return op.eager
    if name == "compile":
        return compiled(op.eager, any_batch, None)
    if name == "compile-static":
        return compiled(op.eager, case, False) if case.published else None
    package = {"liger": "liger_kernel", "apex": "apex"}[name]
    if not op.norm or device() == "cpu" or importlib.util.find_spec(package) is None:
        return None
    norm = (liger_norm if name == "liger" else apex_norm)(case.D, like)
    return around(norm, gated=case.op == "gate_residual_adaln")


# --- measuring


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def call_of(
    case: Case, function: Callable[..., Any], tensors: Sequence[Tensor], pass_: str, any_batch: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    """What is timed: outputs for ``forward`` and ``no_grad``, else gradients, with the forward before it or not.

    A forward builds no graph, except for a loss, which is rarely wanted without. With ``any_batch`` the batch axis is
    marked as dynamic for torch.compile, which makes a batch of 1 a compilation of its own all the same.
    """
    learn, constants = OPS[case.op].learn, OPS[case.op].constants(case)
    leaves = [t.detach().requires_grad_(i < learn) for i, t in enumerate(tensors)]
    for leaf in leaves if any_batch and len(leaves[0]) > 1 else []:
        torch._dynamo.mark_dynamic(leaf, 0)

    def forward() -> tuple[Tensor, ...]:
        return _tuple(function(*leaves, **constants))

    def plain() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return forward()

    if pass_ == "no_grad" or learn == 0:
        return plain
    if pass_ == "forward":
        return forward if learn == 1 else plain
    outputs = forward()
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    drawn = (
        torch.randn(o.shape, device=o.device, generator=generator) if o.ndim else torch.ones_like(o) for o in outputs
    )
    down = [
        d.to(case.dtype).to(o.dtype) for d, o in zip(drawn, outputs, strict=True)
    ]  # the same for every implementation
    if pass_ == "forward+backward":
        del outputs
        return lambda: torch.autograd.grad(forward(), leaves[:learn], down)
    return lambda: torch.autograd.grad(outputs, leaves[:learn], down, retain_graph=True)


def first(tensors: Sequence[Tensor], count: int, exact: bool = False) -> list[Tensor]:
    """The first samples; in float64, where an index stays what it is."""
    some = [t[:count].clone() for t in tensors]
    return [t.double() if exact and t.dtype != torch.int64 else t for t in some]


class Exact:
    """Outputs and gradients of the reference in float64 on the first samples, made once a case."""

    def __init__(self, case: Case, tensors: Sequence[Tensor]) -> None:
        self._case, self._tensors = case, tensors
        self._made: dict[tuple[str, int], list[Tensor]] = {}

    def error(self, name: str, function: Callable[..., Any], pass_: str) -> float:
        """compile-static knows its whole batch only."""
        case = self._case
        count = case.B if name == "compile-static" else min(case.B, 2)
        if (pass_, count) not in self._made:
            call = call_of(case, OPS[case.op].exact, first(self._tensors, count, exact=True), pass_)
            self._made[pass_, count] = [t.detach() for t in call()]
        found = call_of(case, function, first(self._tensors, count), pass_, name == "compile")
        return relative_error([t.detach() for t in found()], self._made[pass_, count])


def measure(
    case: Case, pass_: str, name: str, function: Callable[..., Any], tensors: list[Tensor], exact: Exact
) -> Any:
    """Rows of one implementation of one pass."""
    op = OPS[case.op]
    call = call_of(case, function, tensors, pass_, name == "compile")
    call()
    error = exact.error(name, function, pass_)
    peak = peak_bytes(call)
    extra: dict[str, Any] = {"peak_mib": "" if peak is None else round(peak / 2**20, 2)}
    if case.op == "masked_patch_loss" and peak is not None:
        given = sum(t.numel() * t.itemsize for t in tensors)
        extra["memory_ratio"] = round((given + peak) / sum(t.numel() * t.itemsize for t in tensors[:2]), 4)
    if case.x_bytes <= SMALL_BYTES:
        extra |= _host_and_graph(case, pass_, name, call)
    rows = []
    for flush in (True, False) if device() == "cuda" else ("",):
        median, low, high = quick_seconds(call, bool(flush))
        moved = op.count(case, pass_)
        share = moved / median / copy_bandwidth()
        rows.append(
            {
                "op": case.op,
                "pass": pass_,
                "impl": name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "B": case.B,
                "T": case.T,
                "D": case.D,
                "shape": "x".join(map(str, case.shape)),
                "modulation": case.modulation,
                "option": case.option,
                "flush": flush,
                "ms": f"{1e3 * median:.5f}",
                "ms_20": f"{1e3 * low:.5f}",
                "ms_80": f"{1e3 * high:.5f}",
                "bytes": moved,
                "gb_per_s": f"{moved / median / 1e9:.1f}",
                "copy_gb_per_s": f"{copy_bandwidth() / 1e9:.1f}",
                "share_of_copy": f"{share:.4f}",
                "error": f"{error:.3e}",
                "mix_order": os.environ.get("TORCHINDUCTOR_MIX_ORDER_REDUCTION", ""),
                **extra,
            }
        )
        state = {True: "flushed", False: "warm", "": ""}[flush]
        print(
            f"{case!s:64s} {pass_:16s} {name:14s} {state:7s} {1e3 * median:9.4f} ms  {share:6.1%} of copy", flush=True
        )
    return rows


def _host_and_graph(case: Case, pass_: str, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Microseconds; a backward alone cannot be captured, because its forward ran on another stream."""
    found: dict[str, Any] = {"host_us": f"{1e6 * host_seconds(call, 200 if device() == 'cuda' else 20):.2f}"}
    if pass_ == "backward":
        return found
    try:
        # a capture that fails leaves its stream as the current one
        with torch.cuda.stream(torch.cuda.current_stream()) if device() == "cuda" else contextlib.nullcontext():
            graph = graph_seconds(call)
        return found if graph is None else {**found, "graph_us": f"{1e6 * graph:.2f}"}
    except Exception as error:
        print(f"{case} {pass_} {name}: no CUDA graph, {in_words(error)}", flush=True)
        return found


def measure_case(case: Case, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All rows of a case; what fails is a printed line."""
    torch.manual_seed(0)
    op = OPS[case.op]
    tensors = op.draw(case)
    exact = Exact(case, tensors)
    small = ("forward+backward",) if op.passes == BOTH and case.x_bytes <= SMALL_BYTES else ()
    for name in names:
        for pass_ in (*op.passes, *small):
            try:
                function = implementation(name, case, tensors[0])
                if function is None:
                    break
                yield from measure(case, pass_, name, function, tensors, exact)
            except Exception as error:
                print(f"{case} {pass_} {name}: failed, {in_words(error)}", flush=True)
                if device() == "cuda":
                    torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6, help="no new case is started after these; default 6")
    parser.add_argument("--small", action="store_true", help="sizes for a laptop; always so without a GPU")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="implementations; default all there are"
    )
    parser.add_argument("--output", type=Path, help="folder of kernels.csv; default benchmarks/results/<device>")
    args = parser.parse_args(arguments)
    # a backward that is repeated must not use its inputs as scratch memory
    functorch_config.donated_buffer = False
    choice, reason = kernels.explain()
    print(f"g3n is {choice} here ({reason}); a copy moves {copy_bandwidth() / 1e9:.0f} GB/s", flush=True)
    deadline = Deadline(args.minutes)
    todo = cases(args.small)
    while todo and not deadline.passed():
        if rows := list(measure_case(todo.pop(0), args.only)):
            path = write_rows("kernels", rows, args.output)
            print(path, flush=True)
    print(f"{len(todo)} cases left unmeasured after {args.minutes:g} minutes" if todo else "all cases measured")


if __name__ == "__main__":
    main()
