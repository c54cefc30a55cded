"""The Triton kernels against the reference in float64, on whatever runs them: a GPU, or Triton's interpreter.

``test_interpreter.py`` runs this file under TRITON_INTERPRET=1, which has to be set before Triton is imported. The interpreter needs 2.5 ms a
program, so its shapes are small and odd; a GPU gets the same ones and real sizes besides.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import dispatch, reference

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not (GPU or INTERPRETED), reason="needs a GPU; test_interpreter.py runs these tests in Triton's interpreter"
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# a share of the largest value: ulps of float32 sums, one rounding of 16 bits (where the interpreter truncates bf16)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2 if INTERPRETED else 8e-3}
SHAPES = [(2, 37, 24), (1, 16, 64), (3, 5, 33), (2, 3, 1152), (1, 1, 7), (2, 3, 1)]
REAL = [(4, 1200, 1152), (16, 360, 768), (2, 1200, 1536), (2, 1201, 1000)] if GPU else []


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def outputs_and_gradients(function: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    """What the function gives and its gradients with respect to ``inputs``, under fixed random weights of the outputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs, *rest)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, inputs, weights))


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest error, as a share of the largest value of its tensor."""
    assert all(torch.isfinite(f).all() for f in found)
    return max(
        float((f.double() - w).abs().max() / w.abs().max().clamp(min=1e-30))
        for f, w in zip(found, wanted, strict=True)
    )  # fmt: skip


def compare(name: str, inputs: list[Tensor]) -> float:
    ours, exact = getattr(kernels, name), getattr(reference, name)
    assert dispatch.choose(inputs[0]) == "triton"
    return worst(
        outputs_and_gradients(ours, inputs), outputs_and_gradients(exact, [t.detach().double() for t in inputs])
    )


def rows(B: int, T: int, D: int, per_token: bool) -> tuple[int, ...]:
    return (B, T, D) if per_token else (B, D)


OPS = {"adaln_modulate": (1, 2), "gate_residual": (2, 1), "gate_residual_adaln": (2, 3)}  # tensors like x, modulations


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
@pytest.mark.parametrize("name", OPS)
def test_values_and_gradients_are_the_references(name: str, per_token: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide, narrow = OPS[name]
    for B, T, D in SHAPES + REAL:
        if D == 1 and name != "gate_residual":
            continue  # the norm of a single number is 0, and so is all that is compared with
        inputs = [draw(B, T, D, dtype=dtype) for _ in range(wide)]
        inputs += [draw(*rows(B, T, D, per_token), dtype=dtype) for _ in range(narrow)]
        assert compare(name, inputs) < TOLERANCE[dtype], (B, T, D)


@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else FLOATS[1:], ids=str)
def test_the_error_is_never_above_that_of_plain_torch(dtype: torch.dtype) -> None:
    """Plain torch in 16 bits, as DiT writes it, rounds after every step."""
    torch.manual_seed(0)
    B, T, D = (8, 1200, 1152) if GPU else (2, 21, 192)
    inputs = [draw(B, T, D, dtype=dtype) for _ in range(2)] + [draw(B, D, dtype=dtype) for _ in range(3)]

    def plain(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x1 = x + gate[:, None] * h
        return x1, F.layer_norm(x1, (D,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    exact = outputs_and_gradients(reference.gate_residual_adaln, [t.detach().double() for t in inputs])
    ours = outputs_and_gradients(kernels.gate_residual_adaln, inputs)
    torchs = outputs_and_gradients(plain, inputs)
    for a, b, e in zip(ours, torchs, exact, strict=True):
        assert (a.double() - e).norm() <= 1.02 * (b.double() - e).norm()


def test_the_norm_is_of_x1_as_it_is_stored() -> None:
    """The backward has the stored x1 alone; statistics of a finer one would not be its own."""
    torch.manual_seed(0)
    x, h, gate, shift, scale = (
        draw(*s, dtype=torch.float16) for s in ((2, 9, 96), (2, 9, 96), (2, 96), (2, 96), (2, 96))
    )
    x1, y = kernels.gate_residual_adaln(x, h, gate, shift, scale)
    assert (y != reference.adaln_modulate(x1, shift, scale)).float().mean() < 0.02


def test_large_means_do_not_cost_digits() -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 5, 96, device=DEVICE) + 1000).requires_grad_()
    assert compare("adaln_modulate", [x, draw(1, 96), draw(1, 96)]) < 2e-4  # x itself is only good to 6e-5


def test_modulations_may_be_views_of_one_tensor_and_of_mixed_kind_and_dtype() -> None:
    torch.manual_seed(0)
    x, h, six = draw(2, 5, 24), draw(2, 5, 24), draw(2, 6 * 24)

    def call(module: Any, x: Tensor, h: Tensor, six: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = six.chunk(6, dim=-1)[1:4]
        return module.gate_residual_adaln(x, h, gate, shift[:, None].expand(2, 5, 24), scale)

    wanted = outputs_and_gradients(lambda *t: call(reference, *t), [t.detach().double() for t in (x, h, six)])
    assert worst(outputs_and_gradients(lambda *t: call(kernels, *t), [x, h, six]), wanted) < 1e-6
    low = [x.half(), h, six[:, :24].half(), six[:, 24:48], six[:, 48:72].half()]
    found = outputs_and_gradients(kernels.gate_residual_adaln, low)
    exact = outputs_and_gradients(reference.gate_residual_adaln, [t.detach().double() for t in low])
    assert [t.dtype for t in found] == [torch.float16] * 3 + [t.dtype for t in low[1:]]
    assert worst(found, exact) < 2e-3


def test_rows_need_not_be_contiguous() -> None:
    torch.manual_seed(0)
    x, h = draw(5, 2, 48), draw(2, 5, 48)

    def call(module: Any, x: Tensor, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return module.gate_residual_adaln(x.transpose(0, 1)[..., ::2], h[..., 24:], m, m.flip(1), m)

    inputs = [x, h, draw(2, 24)]
    wanted = outputs_and_gradients(lambda *t: call(reference, *t), [t.detach().double() for t in inputs])
    assert worst(outputs_and_gradients(lambda *t: call(kernels, *t), inputs), wanted) < 1e-6


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_the_fused_op_may_go_unused(used: int) -> None:
    torch.manual_seed(0)
    inputs = [draw(1, 5, 24), draw(1, 5, 24), *(draw(1, 24) for _ in range(3))]
    found, wanted = [], []
    for module, tensors, out in ((kernels, inputs, found), (reference, [t.detach().double() for t in inputs], wanted)):
        tensors = [t.detach().requires_grad_() for t in tensors]
        module.gate_residual_adaln(*tensors)[used].square().sum().backward()  # type: ignore[attr-defined]
        out += [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors]
    assert worst(found, wanted) < 1e-6


def test_a_hundred_repeats_give_the_same_bits_and_a_sample_does_not_feel_its_batch() -> None:
    torch.manual_seed(0)
    B, T, D = (16, 1200, 1152) if GPU else (2, 21, 24)
    inputs = [draw(B, T, D), draw(B, T, D), *(draw(B, D) for _ in range(3))]
    first = outputs_and_gradients(kernels.gate_residual_adaln, inputs)
    for _ in range(100 if GPU else 3):
        again = outputs_and_gradients(kernels.gate_residual_adaln, inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    dout = [torch.randn(B, T, D, device=DEVICE) for _ in range(2)]

    def gradients(rows: slice) -> tuple[Tensor, ...]:
        tensors = [t[rows].detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(kernels.gate_residual_adaln(*tensors), tensors, [d[rows] for d in dout])

    alone, together = gradients(slice(1, 2)), gradients(slice(0, B))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, together, strict=True))


def test_empty_batches_pass() -> None:
    inputs = [draw(0, 5, 24), draw(0, 5, 24), *(draw(0, 24) for _ in range(3))]
    assert [t.shape[0] for t in outputs_and_gradients(kernels.gate_residual_adaln, inputs)] == [0] * 7
    assert outputs_and_gradients(kernels.gate_residual, inputs[:3])[0].shape == (0, 5, 24)
    assert kernels.patchify3d(torch.zeros(0, 4, 4, 4, device=DEVICE), 4).shape == (0, 1, 64)


# patches


def volumes(patch: int, tokens: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    v = (torch.randn(2, *(patch * t for t in tokens), device=DEVICE) * 50).round()
    v = v.abs() if dtype == torch.uint8 else v
    v[:, : patch // 2 + 1] = 0
    return v.to(dtype)


GRIDS = [(4, (2, 3, 2)), (8, (2, 1, 3)), (16, (1, 2, 1)), (3, (2, 2, 2)), (1, (2, 2, 3))]
if GPU:
    GRIDS += [(16, (10, 12, 10)), (8, (20, 24, 20))]


def chosen(tokens: tuple[int, int, int], repeated: bool = False) -> Tensor:
    n = tokens[0] * tokens[1] * tokens[2]
    k = n // 2 + 1
    return torch.stack([torch.randint(0, n, (k,)) if repeated else torch.randperm(n)[:k] for _ in range(2)]).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, *FLOATS], ids=str)
def test_patches_are_an_exact_permutation_and_come_back(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for patch, tokens in GRIDS:
        v = volumes(patch, tokens, dtype)
        if v.is_floating_point():
            v.view(-1)[3], v.view(-1)[4] = torch.nan, -0.0
        bits = torch.uint8 if dtype == torch.uint8 else torch.int32 if dtype == torch.float32 else torch.int16
        patches = kernels.patchify3d(v, patch, out_dtype=dtype)
        assert torch.equal(patches.view(bits), reference.patchify3d(v.view(bits), patch, out_dtype=bits))
        assert torch.equal(kernels.unpatchify3d(patches, patch, tokens).view(bits), v.view(bits))
        index = chosen(tokens, repeated=True)
        some = kernels.patchify3d(v, patch, index, out_dtype=dtype)
        assert torch.equal(some.view(bits), reference.patchify3d(v.view(bits), patch, index, out_dtype=bits))


@pytest.mark.parametrize("masked", [False, True], ids=["zeros", "mask"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, *FLOATS], ids=str)
def test_patches_are_normalized_on_the_way(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    for patch, tokens in GRIDS:
        v, index = volumes(patch, tokens, dtype), chosen(tokens)
        mean, rstd = torch.rand(2, device=DEVICE) * 9, torch.rand(2, device=DEVICE)
        mask = (torch.rand(v.shape, device=DEVICE) > 0.3) if masked else None
        exact = reference.patchify3d(v.double(), patch, index, mean.double(), rstd.double(), mask, torch.float64)
        for out in (torch.float32, torch.float16):
            found = kernels.patchify3d(v, patch, index, mean, rstd, mask, out)
            assert found.dtype == out
            assert worst([found], [exact]) < (1e-6 if out == torch.float32 else 6e-4)
            assert torch.equal(found == 0, (exact == 0) | (found == 0))
        cut = kernels.patchify3d(v, patch, None, None, None, mask, dtype)
        assert torch.equal(cut, reference.patchify3d(v, patch, None, None, None, mask, dtype))


@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("how", ["plain", "normalized", "masked"])
def test_gradients_of_patches_reach_the_volume(how: str, repeated: bool) -> None:
    torch.manual_seed(0)
    for patch, tokens in GRIDS:
        v = volumes(patch, tokens, torch.float32)
        index = chosen(tokens, repeated)
        stats = None if how == "plain" else (torch.rand(2, device=DEVICE) * 9, torch.rand(2, device=DEVICE))
        mask = torch.rand(v.shape, device=DEVICE) > 0.3 if how == "masked" else None
        for where in (index, None):
            for_double = [None, None] if stats is None else [s.double() for s in stats]
            found = outputs_and_gradients(kernels.patchify3d, [v], patch, where, *(stats or for_double), mask)
            rest = (patch, where, *for_double, mask, torch.float64)
            wanted = outputs_and_gradients(reference.patchify3d, [v.double()], *rest)
            assert worst(found, wanted) < 1e-6
        patches = kernels.patchify3d(v, patch)
        found = outputs_and_gradients(kernels.unpatchify3d, [patches], patch, tokens)
        wanted = outputs_and_gradients(reference.unpatchify3d, [patches.double()], patch, tokens)
        assert worst(found, wanted) == 0


# the masked loss


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "standardized"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_masked_loss_and_its_gradient(dtype: torch.dtype, norm: bool, kind: str) -> None:
    torch.manual_seed(0)

    def call(module: Any, p: Tensor, *target: Any) -> Tensor:
        return 3 * module.masked_patch_loss(p, *target, norm, kind)

    for patch, tokens in [g for g in GRIDS if g[0] > 1]:
        for stored in (torch.int16, torch.float32):
            v, index = volumes(patch, tokens, stored), chosen(tokens)
            mean, rstd = torch.rand(2, device=DEVICE) * 9, torch.rand(2, device=DEVICE) / 20
            pred = draw(*index.shape, patch**3, dtype=dtype)
            target = (v, index, patch, mean, rstd)
            found = outputs_and_gradients(functools.partial(call, kernels), [pred], *target)
            target = (v.double(), index, patch, mean.double(), rstd.double())
            wanted = outputs_and_gradients(functools.partial(call, reference), [pred.double()], *target)
            assert abs(float(found[0]) / float(wanted[0]) - 1) < 2e-6
            assert found[1].dtype == dtype
            if kind == "l1":  # a sign: equal except where the error is a rounding away from 0
                assert (found[1].sign() != wanted[1].sign()).double().mean() < 1e-3
                assert abs(float(found[1].double().abs().sum() / wanted[1].abs().sum()) - 1) < 2 * TOLERANCE[dtype]
            else:
                assert worst(found[1:], wanted[1:]) < 2 * TOLERANCE[dtype]
            with torch.no_grad():
                assert torch.equal(call(kernels, pred, v, index, patch, mean, rstd), found[0])


def test_masked_loss_can_be_run_back_twice_and_repeats_its_bits() -> None:
    torch.manual_seed(0)
    v, index = volumes(8, (2, 1, 3), torch.int16), chosen((2, 1, 3))
    mean, rstd = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE) / 9
    pred = draw(*index.shape, 512)
    loss = kernels.masked_patch_loss(pred, v, index, 8, mean, rstd, True, "l2")
    (once,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, pred)
    assert torch.equal(2 * once, twice)
    again = kernels.masked_patch_loss(pred, v, index, 8, mean, rstd, True, "l2")
    assert torch.equal(again, loss)
    pred.data[0, 0, 0] = torch.nan
    loss = kernels.masked_patch_loss(pred, v, index, 8, mean, rstd, False, "l1")
    assert torch.isnan(loss)
    assert torch.isnan(torch.autograd.grad(loss, pred)[0][0, 0, 0])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="counts the memory of a GPU")
def test_the_masked_loss_writes_no_targets() -> None:
    v, index = volumes(16, (10, 12, 10), torch.int16), chosen((10, 12, 10))
    mean, rstd = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE) / 9
    pred = draw(*index.shape, 4096, dtype=torch.bfloat16)
    size = pred.numel() * pred.element_size()
    for wanted, limit in ((False, 0.01), (True, 1.01)):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(wanted):
            loss = kernels.masked_patch_loss(pred, v, index, 16, mean, rstd, True, "l1")
        assert torch.cuda.max_memory_allocated() - before <= limit * size
        del loss


# what torch asks of a custom operator


def test_opcheck() -> None:
    from kernels.adaln import _adaln, _adaln_backward, _gated, _gated_backward
    from kernels.gate import _gate, _gate_backward
    from kernels.masked_loss import _loss_backward, _loss_op
    from kernels.patchify import _patchify_backward_op, patchify3d, unpatchify3d

    torch.manual_seed(0)
    x, h = draw(2, 5, 24), draw(2, 5, 24)
    stats = [torch.rand(2, 5, device=DEVICE) for _ in range(2)]
    for shape in ((2, 24), (2, 5, 24)):
        gate, shift, scale = (draw(*shape) for _ in range(3))
        torch.library.opcheck(_adaln, (x, shift, scale, 1e-6))
        torch.library.opcheck(_adaln_backward, (x.detach(), h.detach(), scale.detach(), *stats))
        torch.library.opcheck(_gated, (x, h, gate, shift, scale, 1e-6))
        dense = [t.detach() for t in (x, h, x, h, gate, scale)]
        torch.library.opcheck(_gated_backward, (*dense, *stats))
        torch.library.opcheck(_gate, (x, h, gate))
        torch.library.opcheck(_gate_backward, tuple(t.detach() for t in (x, h, gate)))
    volume, index = draw(2, 4, 4, 8), torch.tensor([[1, 0], [1, 1]], device=DEVICE)
    mean, rstd, mask = torch.ones(2, device=DEVICE), torch.ones(2, device=DEVICE), torch.ones(2, 4, 4, 8, device=DEVICE)
    for extra in ((None,) * 4, (index, mean, rstd, mask)):
        torch.library.opcheck(patchify3d, (volume, 4, *extra, torch.float32))
        torch.library.opcheck(
            _patchify_backward_op, (draw(2, 2, 64).detach(), volume.detach(), 4, extra[0], extra[2], extra[3])
        )
    torch.library.opcheck(unpatchify3d, (draw(2, 2, 64), 4, 1, 1, 2))
    for gradient in (False, True):
        pred = draw(2, 2, 64) if gradient else draw(2, 2, 64).detach()
        arguments = (pred, volume.detach().short(), index, 4, mean, rstd, True, True, gradient)
        torch.library.opcheck(_loss_op, arguments)
    torch.library.opcheck(_loss_backward, (draw(2, 2, 64).detach(), torch.ones((), device=DEVICE)))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs 20 GB on a GPU: offsets beyond 2^31")
def test_more_than_two_billion_elements() -> None:
    T, D = 1200, 1152
    B = 2**31 // (T * D) + 2
    x = torch.randn(B, T, D, device=DEVICE, dtype=torch.bfloat16)
    shift, scale = (torch.randn(B, D, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found = kernels.adaln_modulate(x, shift, scale)
    assert torch.equal(found[-1:], kernels.adaln_modulate(x[-1:], shift[-1:], scale[-1:]))
