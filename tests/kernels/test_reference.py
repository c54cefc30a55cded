"""The specification itself: against einops, NumPy and torch's own layer norm, in float64, with gradients by finite differences."""

from __future__ import annotations

import einops
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

import kernels
from kernels import dispatch, reference


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rows", [(2, 8), (2, 3, 8)])
def test_adaln_is_layer_norm_scaled_and_shifted(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, h, gate, shift, scale = draw(2, 3, 8), draw(2, 3, 8), draw(*rows), draw(*rows), draw(*rows)
    g, b, s = (m if m.ndim == 3 else m[:, None] for m in (gate, shift, scale))
    x1, y = reference.gate_residual_adaln(x, h, gate, shift, scale)
    torch.testing.assert_close(x1, x + g * h)
    torch.testing.assert_close(y, F.layer_norm(x1, (8,), weight=None, eps=1e-6) * (1 + s) + b)
    torch.testing.assert_close(reference.adaln_modulate(x1, shift, scale), y)
    torch.testing.assert_close(reference.gate_residual(x, h, gate), x1)
    assert gradcheck(reference.gate_residual_adaln, (x, h, gate, shift, scale))
    assert gradcheck(reference.adaln_modulate, (x, shift, scale))
    assert gradcheck(reference.gate_residual, (x, h, gate))


def test_bf16_rows_are_rounded_once() -> None:
    torch.manual_seed(0)
    x, h, gate = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((2, 5, 64), (2, 5, 64), (2, 64)))
    exact = reference.gate_residual(x.double(), h.double(), gate.double())
    assert torch.equal(reference.gate_residual(x, h, gate), exact.bfloat16())


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_patches_are_einops_and_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    volume = (torch.randn(2, 8, 4, 12) * 100).to(dtype)
    patches = reference.patchify3d(volume, 4, out_dtype=dtype)
    pattern = "b (x p1) (y p2) (z p3) -> b (x y z) (p1 p2 p3)"
    assert torch.equal(patches, einops.rearrange(volume, pattern, p1=4, p2=4, p3=4))
    assert torch.equal(reference.unpatchify3d(patches, 4, (2, 1, 3)), volume)
    index = torch.tensor([[5, 0, 5], [3, 2, 1]])
    assert torch.equal(reference.patchify3d(volume, 4, index, out_dtype=dtype)[0], patches[0][index[0]])


def test_normalizing_keeps_background_at_zero() -> None:
    volume = torch.tensor([0, 3, 7, -2], dtype=torch.int16).reshape(1, 1, 1, 4).expand(1, 4, 4, 4).contiguous()
    mean, rstd = torch.tensor([2.0]), torch.tensor([0.5])
    found = reference.patchify3d(volume, 4, None, mean, rstd).reshape(4, 4, 4)[0, 0]
    assert found.tolist() == [0, 0.5, 2.5, -2]
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.uint8).expand_as(volume)
    found = reference.patchify3d(volume, 4, None, mean, rstd, mask).reshape(4, 4, 4)[0, 0]
    assert found.tolist() == [-1, 0.5, 0, -2]  # a zero inside the mask is a voxel like any other
    assert reference.patchify3d(volume, 4, None, None, None, mask).reshape(4, 4, 4)[0, 0].tolist() == [0, 3, 0, -2]


def test_patchify_has_the_gradient_of_what_it_does() -> None:
    torch.manual_seed(0)
    volume, mean, rstd = draw(2, 4, 2, 2), draw(2), draw(2)
    index = torch.tensor([[1, 1], [0, 1]])
    mask = torch.rand(2, 4, 2, 2) > 0.3
    for arguments in ((None, None, None), (index, mean, rstd), (index, mean, rstd, mask), (index, None, None, mask)):
        assert gradcheck(lambda v: reference.patchify3d(v, 2, *arguments, out_dtype=torch.float64), volume)  # noqa: B023
    assert gradcheck(lambda p: reference.unpatchify3d(p, 2, (2, 1, 1)), draw(2, 2, 8))


@pytest.mark.parametrize("kind", ["l1", "l2"])
@pytest.mark.parametrize("norm", [False, True])
def test_masked_loss_is_what_numpy_says(kind: str, norm: bool) -> None:
    rng = np.random.default_rng(0)
    volume = rng.integers(-20, 20, (2, 4, 4, 8)).astype(np.int16)
    mean, rstd = rng.uniform(1, 5, 2), rng.uniform(0.1, 1, 2)
    index = np.array([[1, 0, 1], [0, 0, 1]])
    pred = rng.standard_normal((2, 3, 64))
    wanted = []
    for b in range(2):
        z = np.where(volume[b] == 0, 0, (volume[b] - mean[b]) * rstd[b])
        halves = [z[..., :4].ravel(), z[..., 4:].ravel()]
        for k in range(3):
            target = halves[index[b, k]]
            if norm:
                target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
            error = pred[b, k] - target
            wanted.append(np.abs(error).mean() if kind == "l1" else (error**2).mean())
    tensors = [torch.from_numpy(a) for a in (pred, volume, index, mean, rstd)]
    tensors[0].requires_grad_()

    def loss(p: torch.Tensor) -> torch.Tensor:
        return kernels.masked_patch_loss(p, tensors[1], tensors[2], 4, tensors[3], tensors[4], norm, kind)  # type: ignore[arg-type]

    torch.testing.assert_close(float(loss(tensors[0].detach())), float(np.mean(wanted)))
    assert gradcheck(loss, tensors[0])


def test_the_cpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("G3N_KERNELS", raising=False)
    x = torch.randn(2, 3, 8)
    shift, scale = torch.randn(2, 8), torch.randn(2, 8)
    assert dispatch.choose(x) == "reference"
    assert torch.equal(kernels.adaln_modulate(x, shift, scale), reference.adaln_modulate(x, shift, scale))
    monkeypatch.setenv("G3N_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=r"G3N_KERNELS=triton cannot be done: .*(CUDA|triton)"):
        dispatch.choose(x)
    monkeypatch.setenv("G3N_KERNELS", "cuda")
    with pytest.raises(ValueError, match="G3N_KERNELS=cuda is unknown"):
        dispatch.choose(x)


def test_double_precision_stays_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose(torch.zeros(1, dtype=torch.float64)) == "reference"


def test_what_does_not_fit_is_refused() -> None:
    volume, x = torch.zeros(1, 4, 4, 4), torch.zeros(2, 3, 8)
    one, m = torch.ones(1), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"volume \(5, 4, 4\) is not divisible by patch 4"):
        kernels.patchify3d(torch.zeros(1, 5, 4, 4), 4)
    with pytest.raises(ValueError, match="do not fill a grid"):
        kernels.unpatchify3d(torch.zeros(1, 3, 64), 4, (1, 1, 2))
    with pytest.raises(ValueError, match="give both or neither"):
        kernels.patchify3d(volume, 4, None, one)
    with pytest.raises(ValueError, match=r"mask .* is not of the volume's shape"):
        kernels.patchify3d(volume, 4, mask_BXYZ=torch.ones(1, 4, 4))
    with pytest.raises(ValueError, match="kind 'huber' is unknown"):
        kernels.masked_patch_loss(
            torch.zeros(1, 1, 64), volume, torch.zeros(1, 1).long(), 4, one, one, kind="huber"  # type: ignore[arg-type]
        )  # fmt: skip
    with pytest.raises(ValueError, match="a patch for each index"):
        kernels.masked_patch_loss(torch.zeros(1, 2, 64), volume, torch.zeros(1, 1).long(), 4, one, one)
    with pytest.raises(ValueError, match=r"scale is \(8,\), expected \(2, 8\) or \(2, 3, 8\)"):
        kernels.adaln_modulate(x, m, torch.zeros(8))
    with pytest.raises(ValueError, match="is not of x's shape"):
        kernels.gate_residual(x, torch.zeros(2, 4, 8), m)
    with pytest.raises(ValueError, match=r"expected \[B, T, D\]"):
        kernels.gate_residual_adaln(x[0], x[0], m, m, m)
