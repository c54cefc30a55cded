"""Every shipped YAML loads, and the published sizes are the published sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from g3n.engine.trainer import check
from g3n.models.decoder import Tokenizer
from g3n.models.dit import DiT
from g3n.models.mae import MAE, Encoder
from g3n.train import load_config

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("sweeps", "probes.yaml", "probes_more.yaml")  # of g3n sweep and g3n probe, with tests of their own
CONFIGS = sorted(p for p in ROOT.glob("configs/**/*.yaml") if not set(OTHERS) & set(p.parts))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_yaml_loads(path: Path) -> None:
    check(load_config(path), world=1)


def test_all_tasks_have_both_sizes() -> None:
    names = {str(p.relative_to(ROOT / "configs")) for p in CONFIGS}
    tasks = ("mae", "decoder", "dit", "forecast", "autoencoder")
    assert {f"{t}.yaml" for t in tasks} | {f"tiny/{t}.yaml" for t in tasks} <= names


def linear(n_in: int, n_out: int, bias: bool = True) -> int:
    return n_in * n_out + bias * n_out


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def vit_block(width: int, mlp: int, qkv_bias: bool) -> int:
    attention = linear(width, 3 * width, qkv_bias) + linear(width, width)
    return attention + linear(width, mlp) + linear(mlp, width) + 2 * 2 * width


def test_published_mae() -> None:
    """160x192x160 in patches of 16: 1200 tokens of 1152, 12 blocks; 4096 voxels a patch."""
    config = load_config(ROOT / "configs/mae.yaml").model.net
    with torch.device("meta"):
        mae, encoder = MAE(config), Encoder(config)
    assert (config.width, config.depth, config.tokens) == (1152, 12, (10, 12, 10))
    bias = bool(mae.encoder.blocks[0].attention.qkv.bias is not None)
    own = linear(4096, 1152) + 1152 + 12 * vit_block(1152, config.mlp, bias) + 2 * 1152
    positions = encoder.positions.numel() if isinstance(encoder.positions, torch.nn.Parameter) else 0
    assert count(encoder) == own + positions
    d = config.decoder_width
    decoder = (
        linear(1152, d) + d + config.decoder_depth * vit_block(d, config.decoder_mlp, bias) + 2 * d + linear(d, 4096)
    )
    positions += mae.decoder.positions.numel() if isinstance(mae.decoder.positions, torch.nn.Parameter) else 0
    assert count(mae) == own + decoder + positions


def test_published_decoder() -> None:
    """P has 1152 x 32 numbers; four doublings from 10x12x10 to 160x192x160."""
    config = load_config(ROOT / "configs/decoder.yaml").model.net
    with torch.device("meta"):
        net = Tokenizer(config, 1152, (10, 12, 10), 16)

    def conv(n_in: int, n_out: int) -> int:
        return 27 * n_in * n_out + n_out

    channels = config.decoder_channels
    widths = [*channels[1:], max(8, channels[-1] // 2)]
    expected = 1152 * 32 + conv(32, channels[0]) + conv(widths[-1], 1)
    for c, n in zip(channels, widths, strict=True):
        expected += 2 * conv(c, c) + 2 * 2 * c + conv(c, 8 * n)
    assert count(net) == expected
    assert channels == (512, 256, 128, 64)


@pytest.mark.parametrize("size", ["", "tiny/"])
def test_the_baseline_has_as_many_latent_numbers_as_the_tokenizer(size: str) -> None:
    mae, decoder, baseline = (
        load_config(ROOT / f"configs/{size}{t}.yaml").model.net for t in ("mae", "decoder", "autoencoder")
    )
    places = math.prod(n // baseline.stride for n in mae.volume_shape)
    assert places * baseline.latent_channels == math.prod(mae.tokens) * decoder.latent_channels


@pytest.mark.parametrize(("name", "source"), [("dit", 0), ("forecast", 32)])
def test_published_dit(name: str, source: int) -> None:
    config = load_config(ROOT / f"configs/{name}.yaml").model.net
    with torch.device("meta"):
        net = DiT(config, source_channels=source)
    d, mlp = config.width, config.mlp
    block = linear(d, 3 * d) + linear(d, d) + linear(d, mlp) + linear(mlp, d) + linear(d, 6 * d)
    block += 2 * (d // config.heads) if config.qk_norm else 0
    conditioning = linear(256, d) + linear(d, d) + 2 * d
    for variable in config.variables.values():
        if variable.levels:
            conditioning += (len(variable.levels) + 1) * d  # one more for null
        else:
            conditioning += linear(7, d) + linear(d, d) + 2 * d + d
    head = linear(d, 2 * d) + linear(d, 32)
    by_hand = linear(32 + source, d) + conditioning + linear(d, d) + config.depth * block + head
    assert count(net) == by_hand
    assert (d, config.depth, config.heads) == (1152, 12, 16)
