"""What each option of the generator changes: ``python -m benchmarks.ablation --latents runs/demo/latents --tokenizer runs/demo/decoder``.

Trains the tiny generator under each named variant and several seeds (``g3n/train.py``) and measures what it draws
(``g3n evaluate generation``). Variants of sampling share the baseline's training. ``runs.csv`` has a line for each variant and seed,
``ablation.csv`` for each variant and figure its mean over seeds, and its difference from the baseline under the same seed, which
has the same validation noise and the same noises to start from. Validation is the same for all: t uniform, channels alike.

Intervals are a bootstrap over seeds and tell nothing of the data; with fewer than about ten seeds they are too narrow.
The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from g3n.config import G3nError, did_you_mean
from g3n.evaluate import intervals
from g3n.evaluate.report import write_csv, write_json
from g3n.meters import progress_bar

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """What differs from the baseline: overrides of the config, options of ``g3n evaluate generation``."""

    train: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


# The baseline samples by Heun in 25 steps, 50 evaluations; other samplers get as many, or half where the name says so.
VARIANTS: dict[str, Variant] = {
    "baseline": Variant(),
    "time_uniform": Variant(("model.time_power=1",)),
    "time_logit_normal": Variant(("model.time_power=1", "model.time_law=logit_normal")),
    "time_logit_normal_noise": Variant(
        ("model.time_power=1", "model.time_law=logit_normal", "model.time_mean=-0.5"),
    ),
    "time_shift_auto": Variant(("model.time_power=1", "model.time_shift=auto")),
    "time_shift_3": Variant(("model.time_power=1", "model.time_shift=3")),
    "channel_weights": Variant(("model.channel_weights=variance",)),
    "wide_head": Variant(("model.net.head_depth=2", "model.net.head_width=384")),
    "euler": Variant(sample=("--sampler", "euler", "--steps", "50")),
    "multistep": Variant(sample=("--sampler", "multistep", "--steps", "49")),
    "multistep_half": Variant(sample=("--sampler", "multistep", "--steps", "24")),
    "guidance_interval": Variant(sample=("--guidance-interval", "0.2,0.9")),
    "sample_shift_3": Variant(sample=("--shift", "3")),
}


@dataclass(frozen=True)
class Job:
    """One variant under one seed. ``run`` is shared by variants that train alike."""

    variant: str
    seed: int
    run: Path
    result: Path  # folder of g3n evaluate generation
    train: tuple[str, ...]
    evaluate: tuple[str, ...]


def plan(args: argparse.Namespace) -> list[Job]:
    """Jobs in the order of variants, seeds inside. Raises G3nError for an unknown variant or a seed given twice."""
    names = args.variants.split(",")
    for name in names:
        if name not in VARIANTS:
            raise G3nError(f"--variants has '{name}'{did_you_mean(name, list(VARIANTS))}")
    try:
        seeds = [int(word) for word in args.seeds.split(",")]
    except ValueError:
        raise G3nError(f"--seeds '{args.seeds}' are not whole numbers such as 0,1,2") from None
    if len({*seeds}) < len(seeds) or len({*names}) < len(names) or min(seeds) < 0:
        raise G3nError(f"--seeds {args.seeds} and --variants {args.variants} must be different ones, seeds from 0 on")
    trained: dict[tuple[str, ...], str] = {VARIANTS["baseline"].train: "baseline"}
    jobs = []
    for name in ["baseline", *(n for n in names if n != "baseline")]:
        variant = VARIANTS[name]
        run_name = trained.setdefault(variant.train, name)
        for seed in seeds:
            run = args.output / "runs" / f"{run_name}-{seed}"
            result = args.output / "results" / f"{name}-{seed}"
            fixed = (f"model.tokenizer={args.tokenizer}", f"data.shards={args.latents}", f"seed={seed}")
            place = (f"runs={run.parent}", f"name={run.name}", "tracking.mlflow=false")
            train = ("g3n/train.py", "--config", args.config, *fixed, *variant.train, *args.overrides, *place)
            words: tuple[str, ...] = (
                "--run",
                f"{run}",
                "--output",
                f"{result}",
                "--count",
                f"{args.count}",
                "--ages",
                args.ages,
            )
            words += ("--seed", f"{seed * args.count}", *variant.sample)
            jobs.append(Job(name, seed, run, result, train, ("-m", "g3n.cli", "evaluate", "generation", *words)))
    return jobs


def execute(words: Sequence[str], log: Path) -> None:
    """``python`` with these words from the repository's root, output to ``log``. Raises G3nError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise G3nError(f"'{' '.join(words[:3])}' ended with {done.returncode} ({' '.join(last)[-300:]}); see '{log}'")


def carry_out(jobs: Sequence[Job], logs: Path) -> None:
    """Train and measure what is not there yet. A training that was stopped goes on from its checkpoint."""
    with progress_bar() as progress:
        bar = progress.add_task("ablation", total=len(jobs))
        for job in jobs:
            progress.update(bar, description=f"{job.variant} seed {job.seed}")
            if not _measured(job):
                if not any(
                    _measured(other) for other in jobs if other.run == job.run
                ):  # only what was trained is measured
                    execute(job.train, logs / f"{job.run.name}.log")
                execute(job.evaluate, logs / f"{job.result.name}-evaluate.log")
            progress.advance(bar)


def _measured(job: Job) -> bool:
    return (job.result / "metrics.json").is_file()  # the last file of an evaluation


def figures(job: Job) -> dict[str, float]:
    """Last validation loss, and what the ventricles of drawn volumes do; NaN where a figure has none."""
    rows = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val/velocity"] for row in rows if "val/velocity" in row]
    if not losses:
        raise G3nError(f"'{job.run}' has no validation loss; its latents need a val split")
    metrics = json.loads((job.result / "metrics.json").read_text())
    found = {"val_velocity": losses[-1], "ventricle_ratio": metrics["ventricle_ratio"], "age_r": metrics["age_r"]}
    found |= {f"ventricle_ml_at_{age}": ml for age, ml in metrics["ventricle_ml_by_age"].items()}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def summarize(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each variant and figure; ``runs`` are rows of variant, seed and figures. NaN is left out."""
    names = [name for name in runs[0] if name not in ("variant", "seed")]
    baseline = {row["seed"]: row for row in runs if row["variant"] == "baseline"}
    rows = []
    for variant in dict.fromkeys(row["variant"] for row in runs):
        mine = [row for row in runs if row["variant"] == variant]
        for name in names:
            values = [row[name] for row in mine if math.isfinite(row[name])]
            changes = [row[name] - baseline[row["seed"]][name] for row in mine]
            changes = [change for change in changes if math.isfinite(change)]
            row: dict[str, Any] = {"variant": variant, "figure": name, "seeds": len(values)}
            row |= _interval("", values) | _interval("change_", changes if variant != "baseline" else [])
            rows.append(row)
    return rows


def _interval(prefix: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {f"{prefix}{end}": math.nan for end in ("mean", "low", "high")}
    found = intervals.mean(values)
    return {f"{prefix}mean": found.value, f"{prefix}low": found.low, f"{prefix}high": found.high}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        "variant", "figure", "seeds", "mean", "change from the baseline", title="Ablation", title_justify="left"
    )
    for row in rows:
        texts = [f"{row[p + 'mean']:.3g} [{row[p + 'low']:.3g}, {row[p + 'high']:.3g}]" for p in ("", "change_")]
        table.add_row(
            row["variant"], row["figure"], f"{row['seeds']}", texts[0], texts[1] if row["variant"] != "baseline" else ""
        )
    Console().print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="run folder of the decoder task")
    parser.add_argument("--latents", required=True, help="latents of that tokenizer, with a val split")
    parser.add_argument("--output", type=Path, default=Path("out/ablation"), help="the same command goes on in it")
    parser.add_argument("--config", default="configs/tiny/dit.yaml")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated; the baseline is always there")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated; one training each and variant")
    parser.add_argument("--count", type=int, default=16, help="volumes an age")
    parser.add_argument("--ages", default="25,55,85")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for every training, such as trainer.steps=300"
    )
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.output = args.output.resolve()
    args.tokenizer, args.latents = (str(Path(p).resolve()) for p in (args.tokenizer, args.latents))
    try:
        jobs = plan(args)
        settings = {
            name: getattr(args, name) for name in ("tokenizer", "latents", "config", "count", "ages", "overrides")
        }
        recipe = args.output / "recipe.json"
        if recipe.is_file() and json.loads(recipe.read_text()) != settings:
            raise G3nError(f"'{args.output}' holds runs of other settings ({recipe.name} has them); give a new folder")
        write_json(recipe, settings)
        carry_out(jobs, args.output / "logs")
        runs = [{"variant": job.variant, "seed": job.seed, **figures(job)} for job in jobs]
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = summarize(runs)
    write_csv(args.output / "runs.csv", runs)
    write_csv(args.output / "ablation.csv", rows)
    show(rows)
    print(args.output / "ablation.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
