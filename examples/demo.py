"""From nothing to generated brain volumes: every stage of g3n at a small grid, each launched as you would.

The phantom cohort is made from the ICBM152 templates, so nothing is downloaded. A stage that is done is not done again: stop it
whenever you like and run it again. ``python examples/demo.py --help`` lists the options.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
AGES = (25, 55, 85)


@dataclass(frozen=True)
class Stage:
    """One command of the chain; ``done`` is the file that tells it is finished."""

    name: str
    command: list[str]
    done: Path


def stages(out: Path, seed: int, subjects: int, ranks: int) -> list[Stage]:
    """The commands of the demo in order."""
    prep = ["python", "-m", "data_prep"]
    o = str(out)

    def train(task: str, *paths: str) -> Stage:
        line = ["deepspeed", "--num_gpus", str(ranks), "g3n/train.py", "--config", f"configs/tiny/{task}.yaml"]
        other_place = [f"runs={o}", *paths] if o != "runs/demo" else []
        return Stage(
            f"train {task}", [*line, *other_place, *([f"seed={seed}"] if seed else [])], out / task / "finished"
        )

    shards, latents = f"data.shards={o}/shards", f"data.shards={o}/latents"
    tokenizer = f"model.tokenizer={o}/decoder"
    any_subject = ["--modality", "T1", "--field-strength", "3.0", "--diagnosis", "HC"]
    return [
        Stage(
            "phantom",
            [
                *prep,
                "phantom",
                "--output",
                f"{o}/bids",
                "--subjects",
                str(subjects),
                "--spacing-mm",
                "4",
                "--seed",
                str(seed),
            ],
            out / "bids" / "truth.tsv",
        ),
        Stage("scan", [*prep, "scan", f"{o}/bids", "--output", f"{o}/manifest.tsv"], out / "manifest.tsv"),
        Stage(
            "preprocess",
            [
                *prep,
                "preprocess",
                f"{o}/manifest.tsv",
                "--output",
                f"{o}/derivatives",
                "--spacing-mm",
                "4",
                "--shape",
                "40,48,40",
            ],
            out / "derivatives" / "manifest.tsv",
        ),
        Stage(
            "pack",
            [*prep, "pack", f"{o}/derivatives/manifest.tsv", "--output", f"{o}/shards"],
            out / "shards" / "index.json",
        ),
        train("mae", shards),
        train("decoder", shards, f"model.encoder={o}/mae"),
        Stage(
            "encode",
            [*prep, "encode", "--tokenizer", f"{o}/decoder", "--shards", f"{o}/shards", "--output", f"{o}/latents"],
            out / "latents" / "index.json",
        ),
        train("dit", latents, tokenizer),
        train("forecast", latents, tokenizer),
        Stage(
            "sample",
            [
                "g3n",
                "sample",
                "--run",
                f"{o}/dit",
                "--age",
                "70",
                "--sex",
                "F",
                *any_subject,
                "--count",
                "4",
                "--output",
                f"{o}/samples",
            ],
            out / "samples" / "samples.json",
        ),
    ]
