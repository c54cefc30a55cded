"""Holds the Triton kernels against ``kernels.reference`` in float64; prints one JSON object of largest errors.

A script, because TRITON_INTERPRET has to be set before Triton is imported. On a GPU it runs as it is.
"""

from __future__ import annotations

import json
import sys

import torch

import kernels
from kernels import dispatch, reference
from kernels.adaln import _adaln
from kernels.patchify import _patchify_op, _unpatchify_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()


def adaln(B: int, T: int, D: int, per_token: bool, dtype: torch.dtype) -> float:
    """Largest error of output and gradients, relative to the largest value of each."""
    rows = (B, T, D) if per_token else (B, D)
    x, shift, scale = draw(B, T, D, dtype=dtype), draw(*rows), draw(*rows)
    y = kernels.adaln_modulate(x, shift, scale)
    dy = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in (x, shift, scale)]
    want = reference.adaln_modulate(*exact)
    found = [y, *torch.autograd.grad(y, (x, shift, scale), dy)]
    wanted = [want, *torch.autograd.grad(want, exact, dy.double())]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def patchify(patch: int, tokens: tuple[int, int, int], chosen: bool, normalized: bool, dtype: torch.dtype) -> float:
    """Largest absolute error of patches and of the volume's gradient."""
    n = tokens[0] * tokens[1] * tokens[2]
    volume = (torch.randn(2, *(patch * t for t in tokens), device=DEVICE) * 50).round()
    volume[:, : patch // 2 + 1] = 0
    index = torch.stack([torch.randperm(n, device=DEVICE)[: n // 2 + 1] for _ in range(2)]) if chosen else None
    stats = (torch.rand(2, device=DEVICE) * 9, torch.rand(2, device=DEVICE)) if normalized else (None, None)
    found = kernels.patchify3d(volume.to(dtype), patch, index, *stats)
    wanted = reference.patchify3d(volume.to(dtype), patch, index, *stats)
    worst = float((found - wanted).abs().max())
    a, b = volume.clone().requires_grad_(), volume.clone().requires_grad_()
    weight = torch.randn_like(found)
    (kernels.patchify3d(a, patch, index, *stats) * weight).sum().backward()
    (reference.patchify3d(b, patch, index, *stats) * weight).sum().backward()
    worst = max(worst, float((a.grad - b.grad).abs().max()))  # type: ignore[operator]
    if not chosen and not normalized:
        p = found.detach().requires_grad_()
        back = kernels.unpatchify3d(p, patch, tokens)
        (gradient,) = torch.autograd.grad(back, p, volume)
        worst = max(worst, float((back - volume).abs().max()), float((gradient - wanted).abs().max()))
    return worst


def main() -> None:
    torch.manual_seed(0)
    assert dispatch.choose(torch.zeros(1, device=DEVICE)) == "triton"
    errors = {
        "adaln": max(
            adaln(B, T, D, per_token, torch.float32)
            for B, T, D in ((2, 37, 24), (1, 16, 64), (3, 5, 192), (2, 3, 1152))
            for per_token in (False, True)
        ),
        "adaln_bf16": adaln(2, 21, 192, False, torch.bfloat16),
        "patchify": max(
            patchify(patch, tokens, chosen, normalized, dtype)
            for patch, tokens in ((4, (2, 3, 2)), (8, (2, 1, 3)), (16, (1, 2, 1)), (3, (2, 2, 2)))
            for chosen in (False, True)
            for normalized in (False, True)
            for dtype in (torch.int16, torch.float32)
        ),
    }
    x, shift, scale = draw(2, 5, 24), draw(2, 24), draw(2, 24)
    torch.library.opcheck(_adaln, (x, shift, scale, 1e-6))
    volume, index = draw(2, 4, 4, 8), torch.tensor([[1, 0], [3, 1]], device=DEVICE)
    torch.library.opcheck(_patchify_op, (volume, 4, index % 2, None, None, torch.float32))
    torch.library.opcheck(_unpatchify_op, (draw(2, 2, 64), 4, 1, 1, 2))
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
