"""Compiled blocks have the gradients of eager ones, without a graph break; versions of torch that get them wrong are worked round."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g3n.engine.compiled import compile_blocks, guard_gradients, needs_work_around
from g3n.models.conditioning import Variable
from g3n.models.dit import DiT, DiTBlock, DiTConfig
from g3n.models.layers import Block
from g3n.models.mae import MAE, MAEConfig
from tests.launch import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(
    DEVICE == "cpu" and not (shutil.which("g++") or shutil.which("clang++")),
    reason="inductor needs a C++ compiler on a CPU",
)
TABLE = {"age_years": Variable(low=0, high=110), "sex": Variable(levels=("F", "M"))}
DIT = DiTConfig(tokens=(2, 2, 2), channels=4, width=24, depth=3, heads=2, mlp=48, variables=TABLE)


def scatter(module: nn.Module) -> nn.Module:
    """Weights that let every gradient through: adaLN-Zero starts at zero."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module.to(DEVICE)


def gradients(call: Callable[..., Tensor], module: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    leaves = [t.requires_grad_() for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    out = call(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found = torch.autograd.grad(out, [*leaves, *module.parameters()], dout, allow_unused=True)
    return [out.detach(), *(g for g in found if g is not None)]


def compare(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    torch._dynamo.reset()
    guard_gradients()
    eager = gradients(module, module, inputs)
    compiled = gradients(torch.compile(module, fullgraph=True, dynamic=False), module, inputs)
    assert len(eager) == len(compiled) > 5
    for a, b in zip(compiled, eager, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max()) + 1e-7


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)


class Chain(nn.Module):
    """Three blocks after one another: the layer norms that torch chains wrongly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DiTBlock(24, 2, 48, qk_norm=True) for _ in range(3))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD, c_BD)
        return x_BTD


@needs_compiler
def test_a_chain_of_adaln_blocks() -> None:
    compare(scatter(Chain()), (draw(2, 9, 24), draw(2, 24)))


@needs_compiler
def test_the_block_of_the_mae() -> None:
    compare(scatter(Block(24, 2, 48)), (draw(2, 9, 24),))


@needs_compiler
def test_the_whole_dit_with_its_conditioning() -> None:
    variables = torch.tensor([[40.0, 1.0], [torch.nan, 0.0]], device=DEVICE)
    net = scatter(DiT(DIT))
    compare(net, (draw(2, 8, 4), torch.tensor([0.2, 0.7], device=DEVICE), variables))


@needs_compiler
def test_the_whole_mae_from_int16_voxels() -> None:
    net = scatter(MAE(MAEConfig((16, 16, 16), 8, 24, 1, 2, 48, 24, 1, 2, 48)))
    volume = (draw(2, 16, 16, 16) * 100).short()
    visible, masked = torch.tensor([[0, 3], [5, 6]], device=DEVICE), torch.tensor([[1, 2, 7], [0, 1, 2]], device=DEVICE)
    mean, rstd = torch.ones(2, device=DEVICE), torch.full((2,), 0.01, device=DEVICE)
    compare(net, (volume, mean.requires_grad_(False), rstd, visible, masked))


def test_the_work_around_is_set_for_the_versions_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [needs_work_around(v) for v in ("2.9.1", "2.10.0", "2.13.0+cpu", "2.14.0")] == [False, True, True, False]
    import torch._inductor.config as inductor

    if not hasattr(inductor.triton, "mix_order_reduction"):
        pytest.skip("this torch has no mix-order reductions")
    with inductor.patch("triton.mix_order_reduction", True):
        compile_blocks(nn.Linear(2, 2))
        assert inductor.triton.mix_order_reduction is not needs_work_around()


def test_compiling_blocks_keeps_names_and_counts_them() -> None:
    net = DiT(DIT)
    names = list(net.state_dict())
    assert compile_blocks(net) == 3
    assert list(net.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in net.blocks)


def test_a_compiled_model_sees_through_the_triton_kernels_without_a_graph_break() -> None:
    """In the interpreter, traced whole; the kernels are opaque operators with shapes of their own."""
    pytest.importorskip("triton")
    program = (
        "import torch, tests.unit.test_compiled as t\n"
        "from kernels import dispatch\n"
        "assert dispatch.choose(torch.zeros(1)) == 'triton'\n"
        "import functools\n"
        "torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"
        "t.test_a_chain_of_adaln_blocks()\n"
        "t.test_the_whole_mae_from_int16_voxels()\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
