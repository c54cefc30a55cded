"""Throughput, MFU, memory and waiting of real trainings: ``python -m benchmarks.train`` on a machine with GPUs.

Makes volumes of the published size, then trains as a user would, every stage at its published config: the MAE from shards and again from
memory (``data.keep_gib``), which is what storage and decoding cost; the decoder, for a few steps; latents are encoded; the DiT.
Figures are medians of the trainer's own log lines after the first third. One row a training; ``from_memory_ratio`` compares
the two of one stage. ``--small`` does it with configs/tiny on any machine and proves the path, not the speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_rows
from benchmarks.stream import made_shards
from g3n.train import load_config

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    "step_ms_p50": "speed/step_ms_p50",
    "step_ms_p95": "speed/step_ms_p95",
    "mfu": "speed/mfu",
    "tflops_per_second": "speed/tflops_per_second",
    "memory_gib": "speed/memory_gib",
    "data_wait_share": "speed/data_wait_share",
}
LOG_EVERY = 5


def call(words: list[str]) -> None:
    print("$ " + " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def train(task: str, folder: Path, configs: str, gpus: int, steps: int, name: str, *more: str) -> dict[str, Any]:
    """Train one stage in a process of its own; the medians of its log lines."""
    path = f"{configs}/{task}.yaml"
    micro = load_config(path).trainer.micro_batch
    words = [
        f"runs={folder}/runs", f"name={name}", "data.lanes=8", f"trainer.steps={steps}", f"trainer.log_every={LOG_EVERY}",
        f"trainer.eval_every={steps}", "trainer.eval_batches=1", f"trainer.save_every={steps}", "trainer.panels=false",
        "tracking.mlflow=false", f"trainer.global_batch={micro * gpus}", *more,
    ]  # fmt: skip
    start = [sys.executable] if gpus == 1 else ["deepspeed", "--num_gpus", str(gpus)]
    call([*start, "g3n/train.py", "--config", path, *words])
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "train/loss" in row and row["step"] > steps // 3]
    rate = next(k for k in rows[0] if k.startswith("speed/") and k.endswith("_per_second") and "flops" not in k)
    found = {name: median(rows, key) for name, key in FIGURES.items()}
    return {"task": task, "source": "memory" if "memory" in name else "shards", "config": configs, "gpus": gpus,
            "micro_batch": micro, "steps": steps, "samples_per_second": median(rows, rate), **found}  # fmt: skip


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return round(statistics.median(values), 4) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="configs/tiny, few steps: proves the path on any machine")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--volumes", type=int, default=128, help="made volumes; they must fit --keep-gib")
    parser.add_argument("--keep-gib", type=float, default=4.0, help="memory a rank for the runs from memory")
    parser.add_argument("--output", type=Path, help="folder of train.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    gpus = max(1, torch.cuda.device_count())
    configs, shape = ("configs/tiny", (40, 48, 40)) if args.small else ("configs", (160, 192, 160))
    steps, volumes = (12, 16) if args.small else (args.steps, args.volumes)
    with tempfile.TemporaryDirectory(prefix="train-") as temporary:
        folder = Path(temporary)
        made_shards(folder / "shards", volumes, shape)
        shards, runs = f"data.shards={folder}/shards", folder / "runs"
        keep = f"data.keep_gib={args.keep_gib}"
        rows = [train("mae", folder, configs, gpus, steps, "mae", shards)]
        rows.append(train("mae", folder, configs, gpus, steps, "mae-memory", shards, keep))
        first = max(LOG_EVERY + 1, steps // 4)
        rows.append(
            train(
                "decoder",
                folder,
                configs,
                gpus,
                first,
                "decoder",
                shards,
                f"model.encoder={runs}/mae",
                "model.init_volumes=16",
            )
        )
        call([sys.executable, "-m", "data_prep", "encode", "--tokenizer", f"{runs}/decoder", "--shards", f"{folder}/shards",
              "--output", f"{folder}/latents"])  # fmt: skip
        latents = (f"data.shards={folder}/latents", f"model.tokenizer={runs}/decoder")
        rows.append(train("dit", folder, configs, gpus, steps, "dit", *latents))
        rows.append(train("dit", folder, configs, gpus, steps, "dit-memory", *latents, keep))
    for task in ("mae", "dit"):
        real, memory = (next(r for r in rows if (r["task"], r["source"]) == (task, s)) for s in ("shards", "memory"))
        real["from_memory_ratio"] = round(real["samples_per_second"] / memory["samples_per_second"], 4)
    for row in rows:
        print({k: v for k, v in row.items() if v is not None})
    print(write_rows("train", rows, args.output))


if __name__ == "__main__":
    main()
