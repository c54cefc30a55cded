"""Run folders of the nano chain without training: random weights, real formats. Made in a second or two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.encode import encode
from g3n.config import build, read_yaml, to_plain, write_yaml
from g3n.latent import open_encoder
from g3n.models.decoder import Tokenizer, TokenizerConfig
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.index import load_index
from g3n.tasks.base import volume_artifact
from g3n.tasks.dit import DiTTask, DiTTaskConfig
from g3n.tasks.forecast import ForecastTask, ForecastTaskConfig
from tests import nano


def save_run(run: Path, config: dict[str, Any], module: nn.Module, artifact: Any) -> None:
    """A run folder as training leaves it, as far as others read it."""
    step = run / "ckpt" / "step_00000020"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(write_yaml(config))
    (step / "state.json").write_text(json.dumps({"task": config["task"], "step": 20, "artifact": to_plain(artifact)}))
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, step / "ema.safetensors")
    (step / "COMPLETE").write_text("{}")
    (run / "latest").write_text(step.name)


def chain(root: Path, train: int = 8, val: int = 4) -> Path:
    """``root/{shards, latents, runs/{mae, decoder, dit, forecast}}``; ``root``."""
    nano.shards(root / "shards", train, val)
    configs = {task: read_yaml(path) for task, path in nano.configs(root).items()}
    volumes, runs = load_index(str(root / "shards")), root / "runs"
    mae = build(MAEConfig, configs["mae"]["model"]["net"])
    torch.manual_seed(0)
    save_run(runs / "mae", configs["mae"], MAE(mae), volume_artifact(volumes))
    artifact = {**volume_artifact(volumes), "encoder": open_encoder(runs / "mae")[3]}
    net = build(TokenizerConfig, configs["decoder"]["model"]["net"])
    save_run(runs / "decoder", configs["decoder"], Tokenizer(net, mae.width, mae.tokens, mae.patch), artifact)
    encode(str(runs / "decoder"), str(root / "shards"), root / "latents", "cpu", 8)
    latents = load_index(str(root / "latents"))
    for task in (
        DiTTask(build(DiTTaskConfig, configs["dit"]["model"]), latents),
        ForecastTask(build(ForecastTaskConfig, configs["forecast"]["model"]), latents),
    ):
        model = task.build()
        with torch.no_grad():
            for parameter in model.parameters():  # adaLN-Zero starts as a velocity of 0
                parameter += 0.05 * torch.randn(parameter.shape)
        save_run(runs / task.name, configs[task.name], model, task.artifact())
    return root
