"""From nothing to generated brain volumes: every stage of g3n at a small grid, each launched as you would.

The phantom cohort is made from the ICBM152 templates, so nothing is downloaded. A stage that is done is not done again: stop it
whenever you like and run it again. About twenty minutes on two processors.

Words ``TASK.key=value`` change the training of a task (mae, decoder, dit, forecast): ``demo.py --subjects 1500 mae.trainer.steps=2000``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
OUT = "runs/demo"
AGES = (25, 55, 85)
TASKS = ("mae", "decoder", "dit", "forecast")


@dataclass(frozen=True)
class Stage:
    """One command of the chain."""

    name: str
    command: str


def stages(seed: int, subjects: int, ranks: int, overrides: Sequence[str] = ()) -> list[Stage]:
    """The commands of the demo in order; those that need a scan are in ``last_stages``."""

    def train(task: str) -> str:
        more = "".join(f" {word.removeprefix(f'{task}.')}" for word in overrides if word.startswith(f"{task}."))
        more += f" seed={seed}" if seed else ""
        return f"deepspeed --num_gpus {ranks} g3n/train.py --config configs/tiny/{task}.yaml{more}"

    prep = "python -m data_prep"
    return [
        Stage("phantom", f"{prep} phantom --output {OUT}/bids --subjects {subjects} --spacing-mm 4 --seed {seed}"),
        Stage("scan", f"{prep} scan {OUT}/bids --output {OUT}/manifest.tsv --val 0.12 --test 0.04 --seed {seed}"),
        Stage(
            "preprocess",
            f"{prep} preprocess {OUT}/manifest.tsv --output {OUT}/derivatives --spacing-mm 4 --shape 40,48,40 "
            "--align header --strip none --bias none",
        ),
        Stage(
            "pack",
            f"{prep} pack {OUT}/derivatives/manifest.tsv --output {OUT}/shards",
        ),
        Stage("train mae", train("mae")),
        Stage("train decoder", train("decoder")),
        Stage("encode", f"{prep} encode --tokenizer {OUT}/decoder --shards {OUT}/shards --output {OUT}/latents"),
        Stage("train dit", train("dit")),
        Stage("train forecast", train("forecast")),
    ]


def last_stages(seed: int, baseline: dict[str, str], target_age: float) -> list[Stage]:
    """Using and judging what was trained."""
    b = baseline
    return [
        Stage("sample", f"g3n sample --run {OUT}/dit --conditions {OUT}/ages.csv --output {OUT}/samples --seed {seed}"),
        Stage(
            "forecast",
            f"g3n forecast --run {OUT}/forecast --baseline {OUT}/bids/{b['path']} --modality {b['modality']} "
            f"--age {b['age_years']} --sex {b['sex']} --diagnosis {b['diagnosis']} --target-age {target_age:g} "
            f"--output {OUT}/forecasts --seed {seed}",
        ),
        Stage(
            "evaluate reconstruction",
            f"g3n evaluate reconstruction --run {OUT}/decoder --shards {OUT}/shards --output {OUT}/eval/reconstruction",
        ),
        Stage(
            "evaluate generation",
            f"g3n evaluate generation --run {OUT}/dit --ages {','.join(map(str, AGES))} --modality T1 --diagnosis HC "
            f"--field-strength 3 --count 8 --seed {seed} --latents {OUT}/latents --output {OUT}/eval/generation",
        ),
        Stage(
            "evaluate forecasting",
            f"g3n evaluate forecasting --run {OUT}/forecast --latents {OUT}/latents --output {OUT}/eval/forecasting",
        ),
    ]


def run(stage: Stage, number: str, environment: dict[str, str]) -> None:
    """Run a stage unless it is done; its marker holds the command and the seconds it took. Exits where it fails."""
    marker = Path(OUT) / "stages" / f"{stage.name.replace(' ', '-')}.json"
    if marker.is_file() and json.loads(marker.read_text())["command"] == stage.command:
        print(f"[{number}] {stage.name}: done before", flush=True)
        return
    command = stage.command
    if command.startswith("deepspeed") and not port_is_free(29500):
        command = command.replace("deepspeed", f"deepspeed --master_port {free_port()}", 1)
    print(f"\n[{number}] {stage.name}\n$ {command}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command.split(), env=environment).returncode
    if code:
        print(f"\n'{stage.name}' ended with exit code {code}; run the demo again to go on from here", file=sys.stderr)
        sys.exit(code if code > 0 else 1)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"command": stage.command, "seconds": round(time.monotonic() - start, 1)}))


def port_is_free(port: int) -> bool:
    """Whether ranks can meet there: another training on this machine may hold DeepSpeed's default."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pick_baseline(manifest: Path) -> tuple[dict[str, str], float]:
    """The healthy validation subject's T1 with the longest time to the last visit, and the age then."""
    with open(manifest, newline="") as file:
        scans = [r for r in csv.DictReader(file, delimiter="\t") if r["split"] == "val" and r["modality"] == "T1"]
    visits: dict[str, list[dict[str, str]]] = {}
    for scan in sorted(scans, key=lambda r: r["session"]):
        visits.setdefault(scan["subject"], []).append(scan)
    years = {s: float(v[-1]["age_years"]) - float(v[0]["age_years"]) for s, v in visits.items()}
    chosen = visits[max(years, key=lambda s: (visits[s][0]["diagnosis"] == "HC", years[s]))]
    return chosen[0], float(chosen[-1]["age_years"])


def keep_older_demo(seed: int, subjects: int, overrides: Sequence[str]) -> None:
    """Move a demo of another seed, size or training out of the way."""
    mark = Path(OUT) / "demo.json"
    this = {"seed": seed, "subjects": subjects, **({"overrides": sorted(overrides)} if overrides else {})}
    if mark.is_file() and json.loads(mark.read_text()) != this:
        old = json.loads(mark.read_text())
        aside = Path(f"{OUT}-seed{old['seed']}-{int(time.time())}")
        Path(OUT).rename(aside)
        print(f"'{OUT}' held another demo, of seed {old['seed']}; it is '{aside}' now")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(this))
    # No one is to be hidden here, and one seed must give one demo; your own key stays secret and random.
    Path(OUT, "subjects.key").write_text(hashlib.sha256(f"demo {seed}".encode()).hexdigest() + "\n")


def draw_montage() -> Path:
    """Real, reconstructed, generated at three ages, baseline and forecast, beside each other."""
    from g3n.evaluate.montage import write_montage
    from g3n.latent import LatentSpace, normalize
    from g3n.nifti import read_volume
    from g3n.outputs import BRAIN_MEAN, BRAIN_STD
    from g3n.stream.index import load_index
    from g3n.stream.lanes import eval_batches

    space = LatentSpace.open(f"{OUT}/decoder")
    for batch in eval_batches(load_index(f"{OUT}/shards"), None, "volume", "val", 1, 0, 1, 0):
        if batch.variables[0]["modality"] == "T1" and batch.variables[0]["diagnosis"] == "HC":
            break
    scan = tuple(batch.tensors[k] for k in ("volume", "mean", "rstd"))
    columns = [("real", normalize(*scan)[0].numpy()), ("reconstructed", space.decode(space.encode(*scan))[0].numpy())]

    def shown(name: str, path: str, mean: float = BRAIN_MEAN, std: float = BRAIN_STD) -> None:
        volume, _ = read_volume(path)
        columns.append((name, (volume != 0) * (volume - mean) / std))

    for i, age in enumerate(AGES):
        shown(f"generated, {age}", f"{OUT}/samples/volume-{i:05d}.nii.gz")
    baseline, _ = read_volume(f"{OUT}/forecasts/baseline.nii.gz")
    brain = baseline[baseline != 0]
    about = json.loads(Path(f"{OUT}/forecasts/forecast.json").read_text())
    scale = float(brain.mean()), float(brain.std())
    shown(f"baseline, {float(about['variables']['age_years']):.0f}", f"{OUT}/forecasts/baseline.nii.gz", *scale)
    age = about["volumes"][0]["target_age_years"]
    shown(f"forecast, {age:.0f}", f"{OUT}/forecasts/{about['volumes'][0]['file']}", *scale)
    write_montage(f"{OUT}/montage.png", columns)
    return Path(f"{OUT}/montage.png")


def collect(seed: int) -> dict[str, Any]:
    """The figures of the demo."""
    parts = {
        name: json.loads(Path(f"{OUT}/eval/{name}/metrics.json").read_text())
        for name in ("reconstruction", "generation", "forecasting")
    }
    marks = sorted(Path(OUT, "stages").glob("*.json"), key=lambda f: f.stat().st_mtime)
    return {
        "seed": seed,
        "reconstruction_psnr_gain_db": parts["reconstruction"]["psnr_gain_db"],
        "reconstruction_psnr_db": parts["reconstruction"]["psnr_db"],
        "reconstruction_ssim": parts["reconstruction"]["ssim"],
        "ventricle_ml_by_age": parts["generation"]["ventricle_ml_by_age"],
        "ventricle_ratio_85_25": parts["generation"]["ventricle_ratio"],
        "ventricle_age_r": parts["generation"]["age_r"],
        "forecast_psnr_gain_db": parts["forecasting"]["psnr_gain_db"],
        "forecast_ventricle_error_ml": parts["forecasting"]["ventricle_error_ml"],
        "no_change_ventricle_error_ml": parts["forecasting"]["no_change_ventricle_error_ml"],
        "seconds": {mark.stem: json.loads(mark.read_text())["seconds"] for mark in marks},
    }


def print_table(metrics: dict[str, Any], montage: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title="g3n demo", title_justify="left")
    ages = "  ".join(f"{age}: {ml:.1f}" for age, ml in metrics["ventricle_ml_by_age"].items())
    table.add_row("reconstruction, PSNR above the mean volume", f"{metrics['reconstruction_psnr_gain_db']:.2f} dB")
    table.add_row(
        "reconstruction, PSNR / SSIM",
        f"{metrics['reconstruction_psnr_db']:.2f} dB / {metrics['reconstruction_ssim']:.3f}",
    )
    table.add_row("generated ventricles by age, mL", ages)
    table.add_row("ratio 85 / 25 years", f"{metrics['ventricle_ratio_85_25']:.2f}")
    table.add_row("forecast, PSNR above no change", f"{metrics['forecast_psnr_gain_db']:.2f} dB")
    table.add_row(
        "forecast, error of ventricles (no change)",
        f"{metrics['forecast_ventricle_error_ml']:.2f} mL ({metrics['no_change_ventricle_error_ml']:.2f} mL)",
    )
    table.add_row("time in stages", f"{sum(metrics['seconds'].values()) / 60:.1f} min")
    console = Console()
    console.print(table)
    console.print(
        f"picture  {montage}\nfigures  {OUT}/metrics.json\nMLflow   .venv/bin/mlflow ui --backend-store-uri sqlite:///{OUT}/mlflow.db",
        soft_wrap=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the cohort, the trainings and the samples")
    parser.add_argument("--subjects", type=int, default=500, help="phantom subjects")
    parser.add_argument("overrides", nargs="*", metavar="TASK.key=value", help="such as dit.trainer.steps=2000")
    args = parser.parse_args()
    for word in args.overrides:
        if word.split(".")[0] not in TASKS or "=" not in word or word.split() != [word]:
            parser.error(f"'{word}' is not TASK.key=value with a task of {', '.join(TASKS)}")
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    import torch

    ranks = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    alone = {**os.environ, "PATH": path}
    together = {**alone, "OMP_NUM_THREADS": str(threads)}
    keep_older_demo(args.seed, args.subjects, args.overrides)
    first = stages(args.seed, args.subjects, ranks, args.overrides)
    total = len(first) + 5
    try:
        for i, stage in enumerate(first, 1):
            run(stage, f"{i}/{total}", together if stage.name.startswith("train") else alone)
        rows = "".join(f"T1,{age},HC,3\n" for age in AGES)
        Path(OUT, "ages.csv").write_text(f"modality,age_years,diagnosis,field_strength_t\n{rows}")
        baseline, target_age = pick_baseline(Path(OUT) / "manifest.tsv")
        for i, stage in enumerate(last_stages(args.seed, baseline, target_age), len(first) + 1):
            run(stage, f"{i}/{total}", alone)
    except KeyboardInterrupt:
        print("\nstopped; run the demo again to go on from here", file=sys.stderr)
        return 130
    montage = draw_montage()
    metrics = collect(args.seed)
    Path(OUT, "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print_table(metrics, montage)
    return 0


if __name__ == "__main__":
    sys.exit(main())
