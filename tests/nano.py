"""The whole chain at a size that trains in seconds: 16^3 volumes, 8 tokens, 4 latent channels."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.shards import PackedSample, write_index, write_split
from g3n.config import write_yaml

SHAPE = (16, 16, 16)
AFFINE = [[-1.0, 0, 0, 8], [0, -1.0, 0, 8], [0, 0, 1.0, -8], [0, 0, 0, 1]]
VARIABLES = {"modality": ["T1"], "age_years": [20.0, 80.0], "sex": ["F", "M"]}


def volume(age_years: float, seed: int) -> np.ndarray:
    """int16 [16, 16, 16]: a noisy ball with a dark core that grows with age."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(16) - 7.5,) * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    ball = (1000 + 100 * rng.standard_normal(SHAPE)) * (radius < 7)
    ball[radius < 1 + age_years / 30] *= 0.4
    return ball.round().astype(np.int16)


def packed(subject: int, visit: int, rng: np.random.Generator) -> PackedSample:
    age = float(rng.uniform(20, 70)) if visit == 1 else 0.0
    array = volume(age + 5 * visit, seed=10 * subject + visit)
    brain = array[array != 0].astype(np.float64)
    name = f"{subject:016x}"
    sex = "FM"[subject % 2]
    meta = {
        "shape": list(SHAPE),
        "scale": 1.0,
        "brain_mean": brain.mean(),
        "brain_std": brain.std(),
        "affine": AFFINE,
        "days_from_baseline": 0 if visit == 1 else 730,
        "variables": {"modality": "T1", "age_years": age + 5 * visit, "sex": sex},
    }
    return PackedSample(f"sub-{name}_ses-{visit:02d}_T1", name, "T1", 1, array, meta)


def shards(folder: Path, train: int = 16, val: int = 3) -> None:
    """Volume shards: subjects with two visits each, one subject a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    groups = [[packed(subject, visit, rng) for visit in (1, 2)] for subject in range(train + val)]
    splits = {
        "train": write_split(folder, "train", groups[:train]),
        "val": write_split(folder, "val", groups[train:]),
    }
    header = {"kind": "volume", "recipe": {}, "grid": {"shape": list(SHAPE), "affine": AFFINE}, "variables": VARIABLES}
    write_index(folder, header, splits)


def configs(root: Path) -> dict[str, Path]:
    """YAML files of the four tasks; runs go to ``root/runs``, shards come from ``root/shards`` and ``root/latents``."""
    mae = {"volume_shape": list(SHAPE), "patch": 8, "width": 48, "depth": 2, "heads": 2, "mlp": 96}
    mae |= {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp": 48}
    tokenizer = {"latent_channels": 4, "decoder_channels": [16, 8, 8], "mask_head": True}
    table: dict[str, Any] = {"modality": {"levels": ["T1"]}, "age_years": {"low": 0, "high": 110}}
    table["sex"] = {"levels": ["F", "M"]}
    dit = {"tokens": [2, 2, 2], "channels": 4, "width": 24, "depth": 2, "heads": 2, "mlp": 48}
    of_tokenizer = {"tokenizer": f"{root}/runs/decoder"}
    models = {
        "mae": {"net": mae, "visible_weight": 1.0},
        "decoder": {"encoder": f"{root}/runs/mae", "net": tokenizer, "init_volumes": 8},
        "dit": {**of_tokenizer, "net": {**dit, "variables": table}},
        "forecast": {
            **of_tokenizer,
            "net": {**dit, "variables": {**table, "elapsed_years": {"low": 0, "high": 10}}},
        },
    }
    paths = {}
    for task, model in models.items():
        tree = {
            "task": task,
            "name": task,
            "runs": f"{root}/runs",
            "model": model,
            "data": {"shards": f"{root}/{'shards' if task in ('mae', 'decoder') else 'latents'}", "lanes": 4},
            "trainer": {
                "steps": 20,
                "global_batch": 8,
                "micro_batch": 2,
                "precision": "fp32",
                "log_every": 1,
                "eval_every": 20,
                "save_every": 10,
                "keep_last": 3,
            },
            "optim": {"lr": 2e-3, "warmup_steps": 5},
            "tracking": {"mlflow": False},
        }
        paths[task] = root / f"{task}.yaml"
        paths[task].write_text(write_yaml(tree))
    return paths


def stopped_at_10(run: Path) -> str:
    """The name of a copy of a run as it was after its checkpoint of step 10."""
    copy = run.with_name(f"{run.name}-resumed")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "ckpt" / "step_00000020")
    (copy / "latest").write_text("step_00000010")
    return copy.name
