"""FLOPs counted from the model against a count by hand, and peaks of GPUs by their names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from g3n import flops
from g3n.models.dit import DiT
from g3n.stream.samples import Batch
from g3n.tasks.mae import MAETask
from g3n.train import load_config

ROOT = Path(__file__).resolve().parents[2]


def batch(size: int, **tensors: Tensor) -> Batch:
    numbers = torch.arange(size)
    keys = [f"s{i}" for i in range(size)]
    return Batch(tensors, [{}] * size, keys, numbers, numbers, numbers, torch.ones(size))


def blocks(depth: int, tokens: int, width: int, mlp: int) -> int:
    """Forward of transformer blocks: 2mnk a product, 4 T^2 D for attention."""
    return depth * (2 * tokens * (4 * width * width + 2 * width * mlp) + 4 * tokens**2 * width)


@pytest.mark.parametrize(("config", "size"), [("mae", 2), ("tiny/mae", 3)])
def test_mae_by_hand(config: str, size: int) -> None:
    """Tokens: 30 % of the patches and CLS in the encoder, all and CLS in the decoder; the head sees what the loss sees."""
    model = load_config(ROOT / f"configs/{config}.yaml").model
    net = model.net
    index: Any = SimpleNamespace(grid=SimpleNamespace(shape=net.volume_shape), url="")
    task = MAETask(model, index)
    with torch.device("meta"):
        module = task.build()
    volume = torch.empty(size, *net.volume_shape, dtype=torch.int16, device="meta")
    found = flops.flops_a_sample(
        flops.twin(task, module), batch(size, volume=volume, mean=torch.ones(size), rstd=torch.ones(size))
    )
    n, p, d = task.n_tokens, net.patch**3, net.decoder_width
    visible = int((1 - model.mask_ratio) * n)
    predicted = n if model.visible_weight else n - visible
    embed = 2 * visible * p * net.width
    rest = blocks(net.depth, 1 + visible, net.width, net.mlp) + 2 * (1 + visible) * net.width * d
    rest += blocks(net.decoder_depth, 1 + n, d, net.decoder_mlp) + 2 * predicted * d * p
    assert found == 2 * embed + 3 * rest  # voxels need no gradient: the embedding's backward is once its forward


class Velocity:
    """A flow's loss without its data: what the dit task computes."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x = batch.tensors["latent"]
        t = x.new_zeros(len(x))
        cond = x.new_zeros(len(x), 6)
        return (model(x, t, cond) - x).square().mean(), {}


def test_dit_by_hand() -> None:
    """Conditioning layers see one vector a sample: Fourier features of t and numbers, modulation of each block."""
    net = load_config(ROOT / "configs/dit.yaml").model.net
    with torch.device("meta"):
        module = DiT(net)
    task: Any = Velocity()
    found = flops.flops_a_sample(flops.twin(task, module), batch(2, latent=torch.empty(2, 1200, 32)))
    n, w = 1200, net.width
    inputs = 2 * n * 32 * w + 2 * 256 * w + 2 * 2 * 7 * w  # latents, time, age and field strength
    rest = blocks(net.depth, n, w, net.mlp) + 2 * n * w * 32
    rest += 2 * w * w * (1 + 2 + 1) + 2 * w * (6 * w * net.depth + 2 * w)  # second layers, place; modulations
    assert found == 2 * inputs + 3 * rest


class Tokens:
    """A frozen layer before a trained one, as the decoder task has."""

    def __init__(self) -> None:
        self.encoder = nn.Linear(5, 7).requires_grad_(False)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            features = self.encoder(batch.tensors["x"])
        return model(features).sum(), {}


def test_a_frozen_module_counts_forward_only_and_nothing_of_the_task_moves() -> None:
    task = Tokens()
    module = nn.Linear(7, 11)
    found = flops.flops_a_sample(flops.twin(task, module), batch(4, x=torch.zeros(4, 3, 5)))  # type: ignore[arg-type]
    assert found == 2 * 3 * 5 * 7 + 2 * (2 * 3 * 7 * 11)
    assert task.encoder.weight.device.type == module.weight.device.type == "cpu"
    assert module.weight.grad is None


def test_convolutions_count_27_products_a_voxel_and_channel_pair() -> None:
    class Voxels:
        def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return model(batch.tensors["x"]).sum(), {}

    task: Any = Voxels()
    found = flops.flops_a_sample(
        flops.twin(task, nn.Conv3d(3, 5, 3, padding=1)), batch(2, x=torch.zeros(2, 3, 4, 4, 4))
    )
    assert found == 2 * (2 * 27 * 3 * 5 * 64)


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5, 67.0),
        ("NVIDIA H100 PCIe", 756.5, 51.0),
        ("NVIDIA H100 NVL", 835.5, 60.0),
        ("NVIDIA H200", 989.5, 67.0),
        ("NVIDIA A100-SXM4-40GB", 312.0, 19.5),
        ("NVIDIA A100-PCIE-40GB", 312.0, 19.5),
        ("Tesla V100-SXM2-16GB", None, 15.7),
        ("Tesla V100-PCIE-16GB", None, 14.0),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA L4", 121.0, 30.3),
        ("NVIDIA RTX A6000", 154.8, 38.7),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A1000", None, None),
        ("cpu", None, None),
    ],
)
def test_peaks_by_name(device: str, bf16: float | None, fp32: float | None) -> None:
    assert flops.peak_tflops(device, "bf16") == bf16
    assert flops.peak_tflops(device, "fp32") == fp32
