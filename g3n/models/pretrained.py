"""Finding trained weights: our own run folders, and state dicts with MONAI's module names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from g3n.config import G3nError, read_yaml


@dataclass(frozen=True)
class Run:
    """A checkpoint of one stage: ``path`` is the step folder."""

    path: Path
    task: str
    config: dict[str, Any]
    artifact: dict[str, Any]  # what Task.artifact() said: fingerprints of its inputs
    step: int
    weights: dict[str, Tensor]  # EMA weights where the run kept them, else the last


def open_run(path: str | Path, *tasks: str) -> Run:
    """Open a run folder (its latest checkpoint) or a step folder of one of ``tasks``.

    Raises G3nError for a folder without a finished checkpoint, a damaged one, or one of another task.
    """
    path = Path(path)
    folder = path
    if (path / "latest").is_file():
        folder = path / "ckpt" / (path / "latest").read_text().strip()
    if not (folder / "COMPLETE").is_file():
        raise G3nError(f"'{path}' holds no finished checkpoint; train it first, or name a run or step folder that does")
    state = json.loads((folder / "state.json").read_text())
    if state["task"] not in tasks:
        expected = " or ".join(f"'{task}'" for task in tasks)
        raise G3nError(f"'{path}' is a checkpoint of task '{state['task']}', expected task {expected}")
    weights = folder / "ema.safetensors"
    if not weights.is_file():
        weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise G3nError(f"weights '{weights}' cannot be read ({error}); use an earlier step folder") from error
    return Run(folder, state["task"], read_yaml(folder / "config.yaml"), state["artifact"], state["step"], tensors)


def load_weights(
    module: nn.Module, weights: Mapping[str, Tensor], prefix: str = "", source: str = "checkpoint"
) -> None:
    """Strict load of the entries under ``prefix``. Raises G3nError that names the first missing, extra or misshaped key."""
    chosen = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    own = module.state_dict()
    for kind, keys in (("lacks", own.keys() - chosen.keys()), ("has an unknown", chosen.keys() - own.keys())):
        if keys:
            raise G3nError(
                f"{source} {kind} weight '{prefix}{min(keys)}' ({len(keys)} in all); config and weights differ"
            )
    for key, value in chosen.items():
        if value.shape != own[key].shape:
            raise G3nError(
                f"{source}: weight '{prefix}{key}' is {tuple(value.shape)}, expected {tuple(own[key].shape)}"
            )
    module.load_state_dict(chosen)


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """xxh3 of names, dtypes and bytes: two weight files agree exactly if and only if their fingerprints do."""
    digest = xxhash.xxh3_64()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_MONAI_NAMES = [
    (r"^cls_token$", "encoder.cls_token"),
    (r"^patch_embedding\.position_embeddings$", "encoder.positions"),
    (r"^patch_embedding\.patch_embeddings(?:\.1)?\.(weight|bias)$", r"encoder.embed.\1"),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^mask_tokens$", "decoder.mask_token"),
    (r"^decoder_pos_embedding$", "decoder.positions"),
    (r"^decoder_pred\.", "decoder.predict."),
]
_MONAI_BLOCK = [
    ("norm1.", "norm1."),
    ("norm2.", "norm2."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.out_proj.", "attention.out."),
    ("mlp.linear1.", "mlp.up."),
    ("mlp.linear2.", "mlp.down."),
]


def from_monai(state: Mapping[str, Tensor], depth: int, decoder_depth: int) -> dict[str, Tensor]:
    """A state dict of MONAI's ``MaskedAutoEncoderViT`` under the names of our ``MAE``.

    Norms and weights of MONAI's never-used cross attention are left out. Raises G3nError for any other unknown key.
    """
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        name = _monai_name(key, depth, decoder_depth)
        if name is None:
            continue
        if name == "encoder.embed.weight":
            value = value.flatten(1)  # a [D, 1, p, p, p] convolution is a Linear on flattened patches
        ours[name] = value
    return ours


def _monai_name(key: str, depth: int, decoder_depth: int) -> str | None:
    for pattern, name in _MONAI_NAMES:
        if re.match(pattern, key):
            return re.sub(pattern, name, key)
    match = re.match(r"^(decoder_)?blocks\.(\d+)\.(.*)$", key)
    if match:
        part, count = ("decoder", decoder_depth) if match[1] else ("encoder", depth)
        number, rest = int(match[2]), match[3]
        if number == count and rest in ("weight", "bias"):
            return f"{part}.norm.{rest}"
        if "cross_attn" in rest:
            return None
        for theirs, ours in _MONAI_BLOCK:
            if rest.startswith(theirs) and number < count:
                return f"{part}.blocks.{number}.{rest.replace(theirs, ours, 1)}"
    raise G3nError(f"MONAI state dict has the key '{key}', which no part of the MAE answers to; check depth and width")
