"""A checkpoint of MONAI's ``MaskedAutoEncoderViT``, the layout in which BrainG3N (arXiv 2606.19651) is published."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g3n.config import G3nError, build, read_yaml
from g3n.encoders.contract import Encoder
from g3n.encoders.ours import from_vit
from g3n.encoders.weights import load_reported, read_weights, shape_of, under_prefix
from g3n.latent import freeze
from g3n.models import mae
from g3n.models.pretrained import fingerprint, from_monai
from g3n.nifti import atlas_grid

_ANCHORS = ("patch_embedding.patch_embeddings.weight", "patch_embedding.patch_embeddings.1.weight")  # conv, perceptron
_DECODER = ("decoder", "mask_tokens")
WHAT = "MaskedAutoEncoderViT of MONAI"


@dataclass(frozen=True)
class Asked:
    """What the weights do not tell; defaults are BrainG3N's."""

    volume_shape: tuple[int, int, int] = (160, 192, 160)
    heads: int = 16
    spacing_mm: float = 1.0


def open_monai_mae(path: Path, config_path: Path | None, device: torch.device) -> Encoder:
    """Kinds ``mean`` and ``cls``, of the encoder without masking.

    Width, depth and sizes of MLP and patch follow from the weights, the rest is a YAML of ``Asked``. Intensities and orientation are
    BrainG3N's. Raises G3nError for another model or size.
    """
    asked = build(Asked, read_yaml(config_path) if config_path else {}, "encoder")
    weights = read_weights(path)
    anchor = next((a for a in _ANCHORS if any(key.endswith(a) for key in weights)), _ANCHORS[0])
    inside, outside = under_prefix(weights, anchor, WHAT)
    decoder = tuple(key for key in inside if key.startswith(_DECODER))
    own = {key: value for key, value in inside.items() if key not in decoder}
    sizes = {**_sizes(own, anchor), "volume_shape": asked.volume_shape, "heads": asked.heads}
    config = build(mae.MAEConfig, sizes, "encoder")
    encoder = mae.Encoder(config)
    renamed = {k.removeprefix("encoder."): v for k, v in from_monai(own, config.depth, 0).items()}
    about = {"keys": load_reported(encoder, renamed, WHAT, (*outside, *decoder)), "heads": asked.heads}
    grid = atlas_grid(config.volume_shape, asked.spacing_mm)
    return from_vit("monai-mae", freeze(encoder).to(device), fingerprint(encoder.state_dict()), grid, about)


def _sizes(weights: Mapping[str, Tensor], anchor: str) -> dict[str, Any]:
    """The sizes that weights tell. Raises G3nError where they are not those of such a model."""
    width, *patch = shape_of(weights, anchor, 5 if anchor == _ANCHORS[0] else 2, WHAT)
    mlp, _ = shape_of(weights, "blocks.0.mlp.linear1.weight", 2, WHAT)
    depth = len({key.split(".")[1] for key in weights if re.match(r"blocks\.\d+\.mlp\.linear1\.weight$", key)})
    side = round(math.prod(patch) ** (1 / 3))
    if patch not in ([1, side, side, side], [side**3]):
        raise G3nError(f"weight '{anchor}' is {(width, *patch)}; expected cubes of one channel")
    return {"patch": side, "width": width, "depth": depth, "mlp": mlp}
