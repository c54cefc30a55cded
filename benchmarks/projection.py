"""What P keeps: ``python -m benchmarks.projection --encoder runs/demo/mae --shards runs/demo/shards --output out/projection``.

Trains a tokenizer for each kind of P, width and seed on the given shards, measures its reconstruction, and probes the clinical
variables linearly from mean-pooled projected tokens and from mean-pooled features. P is linear, so the mean of projected tokens is
P times the mean of the features, and volumes are encoded once. Kinds: ``learned`` begins as a regression and is trained, ``random``
is trained too, ``pca`` is fixed, ``pooled`` begins as a regression but for a fifth of its channels, which keep what all places of a
scan share (``model.pooled_channels``). Width ``full`` is the fixed identity. Words ``key=value`` before the options go to g3n/train.py.

Probes: logistic or ridge regression (scikit-learn) on standardized features, strength of the penalty chosen inside each of five folds;
all scans of a subject are in one fold. Scores are balanced accuracy and R^2 of the held-out
predictions with intervals over subjects; ``relative_loss`` is 1 - score / score of full features. The same line goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from g3n.config import G3nError
from g3n.evaluate.intervals import Interval, bootstrap, mean
from g3n.evaluate.report import write_json
from g3n.latent import open_encoder, pick_device
from g3n.meters import progress_bar
from g3n.models.pretrained import open_run
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import eval_batches

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "learned": ("regression", "true"),
    "pooled": ("regression", "true"),
    "random": ("random", "true"),
    "pca": ("pca", "false"),
}
POOLED = 5  # one channel in so many
FOLDS, INNER_FOLDS = 5, 3
PENALTIES = np.logspace(-3, 5, 9)


@dataclass(frozen=True)
class Cell:
    """One tokenizer to train."""

    kind: str  # of KINDS, or identity
    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.width}-seed{self.seed}"

    @property
    def settings(self) -> list[str]:
        start, trained = ("identity", "false") if self.kind == "identity" else KINDS[self.kind]
        net = f"model.net.latent_channels={self.width}"
        return [
            f"name={self.name}",
            f"seed={self.seed}",
            net,
            f"model.projection={start}",
            f"model.pooled_channels={self.width // POOLED if self.kind == 'pooled' else 0}",
            f"model.projection_trained={trained}",
        ]


def plan(kinds: Sequence[str], widths: Sequence[str], full: int, seeds: Sequence[int]) -> list[Cell]:
    """Seed by seed, so that a run that is stopped has whole comparisons. Raises G3nError for a width the encoder cannot give."""
    cells = []
    for seed in seeds:
        for width in widths:
            if width != "full" and not (width.isdigit() and 1 <= int(width) <= full):
                raise G3nError(f"--widths has '{width}', expected 1 to {full} (the encoder's width), or full")
            of_width = [("identity", full)] if width == "full" else [(kind, int(width)) for kind in kinds]
            cells += [Cell(kind, w, seed) for kind, w in of_width]
    return cells


# --- features and probes


@dataclass(frozen=True)
class Scans:
    """Mean-pooled encoder features [n, D] of scans, who they are of, and variables [n]: numbers, NaN missing, or text, "" missing."""

    features: np.ndarray
    subjects: np.ndarray
    variables: dict[str, np.ndarray]


@torch.no_grad()
def pooled_scans(encoder_run: str, index: ShardIndex, batch: int, device: str | None) -> Scans:
    """Every scan of every split, in the shards' order."""
    where = pick_device(device)
    encoder = open_encoder(encoder_run)[0].to(where)
    subjects = {
        sample.key: sample.subject for shards in index.splits.values() for shard in shards for sample in shard.samples
    }
    features, names, found = [], [], []
    with progress_bar() as progress:
        bar = progress.add_task("encode", total=len(subjects))
        for split, shards in index.splits.items():
            if not any(shard.samples for shard in shards):
                continue
            for b in eval_batches(index, None, "volume", split, batch, rank=0, world=1, seed=0):
                b = b.to(where)
                real = [i for i in range(len(b)) if b.weights[i] > 0]
                tokens = encoder(*(b.tensors[k] for k in ("volume", "mean", "rstd")))
                features.append(tokens.float().mean(1)[real].cpu().numpy())
                names += [subjects[b.keys[i]] for i in real]
                found += [b.variables[i] for i in real]
                progress.advance(bar, len(real))
    columns = {}
    for name, known in index.variables.items():
        values = [row.get(name) for row in found]
        if isinstance(known[0], str):
            columns[name] = np.array(["" if v is None else str(v) for v in values])
        else:
            columns[name] = np.array([np.nan if v is None else float(v) for v in values])
    return Scans(np.concatenate(features), np.array(names), columns)


def balanced_accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """Mean over the classes in ``truth`` of the share found."""
    return float(np.mean([(guess[truth == c] == c).mean() for c in np.unique(truth)]))


def held_out(features: np.ndarray, values: np.ndarray, subjects: np.ndarray) -> np.ndarray | None:
    """Prediction [n] of each scan by a probe that saw no scan of its subject; None where there is too little to learn from.

    Text is classified (each class needs FOLDS x INNER_FOLDS subjects), numbers are regressed.
    """
    classes = values.dtype.kind in "US"
    kinds = np.unique(values)
    groups = [np.unique(subjects[values == k]) for k in kinds] if classes else [np.unique(subjects)]
    if len(kinds) < 2 or min(len(g) for g in groups) < FOLDS * INNER_FOLDS:
        return None
    folds = StratifiedGroupKFold if classes else GroupKFold
    if classes:
        model, grid = (
            LogisticRegression(max_iter=2000, class_weight="balanced"),
            {"logisticregression__C": 1 / PENALTIES},
        )
    else:
        model, grid = Ridge(), {"ridge__alpha": PENALTIES}
    scoring = "balanced_accuracy" if classes else "r2"
    guess = np.empty_like(values)
    for train, test in folds(FOLDS).split(features, values, subjects):
        search = GridSearchCV(make_pipeline(StandardScaler(), model), grid, scoring=scoring, cv=folds(INNER_FOLDS))
        search.fit(features[train], values[train], groups=subjects[train])
        guess[test] = search.predict(features[test])
    return guess


def probes(features: np.ndarray, scans: Scans) -> dict[str, Interval]:
    """Score of each variable that can be probed, by name."""
    scores = {}
    for name, values in scans.variables.items():
        there = values != "" if values.dtype.kind in "US" else np.isfinite(values)
        truth, subjects = values[there], scans.subjects[there]
        guess = held_out(features[there], truth, subjects)
        if guess is not None:
            score = balanced_accuracy if truth.dtype.kind in "US" else r2_score
            scores[name] = bootstrap(score, truth, guess, subjects=subjects)
    return scores


# --- cells, table and picture


def row(cell: Cell, what: str, score: Interval, full: float | None = None) -> dict[str, Any]:
    about = {
        "kind": cell.kind,
        "width": cell.width,
        "seed": cell.seed,
        "what": what,
        "scans": score.n,
        "subjects": score.subjects,
    }
    about |= {"value": score.value, "low": score.low, "high": score.high, "full": full}
    return about | {"relative_loss": None if not full else 1 - score.value / full}


def reconstruction_rows(cell: Cell, table: Path) -> list[dict[str, Any]]:
    """From the volumes.csv of ``g3n evaluate reconstruction``."""
    volumes = pd.read_csv(table)
    subjects = volumes["key"].str.split("_").str[0]
    return [row(cell, what, mean(volumes[what], subjects)) for what in ("psnr_db", "ssim", "mae")]


def collect(output: Path) -> pd.DataFrame:
    """All finished cells; writes ``projection.csv`` and ``projection.png``."""
    rows = [r for file in sorted((output / "cells").glob("*.json")) for r in json.loads(file.read_text())]
    table = pd.DataFrame(rows).sort_values(["what", "kind", "width", "seed"], ignore_index=True)
    part = output / ".projection.csv.part"
    table.to_csv(part, index=False, float_format="%.6g")
    part.replace(output / "projection.csv")
    picture(table, output / "projection.png")
    return table


def picture(table: pd.DataFrame, path: Path) -> None:
    """PSNR and each probe by width: a point a seed, a line through the means of a kind, dashes for full features."""
    names = ["psnr_db", *sorted(w for w in table["what"].unique() if w.startswith("probe "))]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        part = table[table["what"] == name]
        for number, (kind, cells) in enumerate(part.groupby("kind")):
            means = cells.groupby("width")["value"].mean()
            axis.plot(means.index, means.to_numpy(), color=f"C{number}", label=str(kind))
            axis.plot(cells["width"], cells["value"], "o", color=f"C{number}", markersize=3)
        if part["full"].notna().any():
            axis.axhline(part["full"].astype(float).mean(), color="0.5", linestyle="--", label="full features")
        widths = sorted(part["width"].unique())
        axis.set(xscale="log", xlabel="channels", title="PSNR, dB" if name == "psnr_db" else name)
        axis.set_xticks(widths, [str(w) for w in widths])
        axis.minorticks_off()
    axes[len(names) - 1].legend(frameon=False)
    part_path = path.with_name(f".{path.name}.part")
    figure.savefig(part_path, dpi=150, format="png")
    plt.close(figure)
    part_path.replace(path)


def run(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise G3nError(f"'{' '.join(words)}' failed ({''.join(last)}); run it by hand to see more")


def finish(cell: Cell, args: argparse.Namespace, scans: Scans, full: dict[str, Interval]) -> None:
    """Train, evaluate and probe one cell; its rows are written last."""
    output = args.output.resolve()
    inputs = [f"runs={output}/runs", f"data.shards={args.shards}", f"model.encoder={args.encoder}"]
    run("g3n/train.py", "--config", str(args.config), *args.overrides, *inputs, *cell.settings)
    trained, to = output / "runs" / cell.name, output / "reconstruction" / cell.name
    words = ("--run", str(trained), "--shards", args.shards, "--output", str(to), "--split", args.split)
    run("-m", "g3n.cli", "evaluate", "reconstruction", *words)
    p_CD = open_run(trained, "decoder").weights["projection.weight"].float().numpy()
    rows = reconstruction_rows(cell, to / "volumes.csv")
    for name, score in probes(scans.features @ p_CD.T, scans).items():
        rows.append(row(cell, f"probe {name}", score, full[name].value))
    write_json(output / "cells" / f"{cell.name}.json", rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny/decoder.yaml")
    parser.add_argument("--encoder", required=True, help="run of task mae")
    parser.add_argument("--shards", required=True, help="the volume shards it was trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs, projection.csv and projection.png")
    parser.add_argument("--widths", nargs="+", default=["8", "16", "32", "64", "full"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=["learned", "pca"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="val", help="of the reconstruction: train, val or test")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(argv)


def check_plan(args: argparse.Namespace, index: ShardIndex, encoder: str) -> None:
    """Raise G3nError where ``output`` holds cells of other inputs."""
    now = {"config": args.config.read_text(), "overrides": args.overrides, "split": args.split}
    now |= {"shards": index.fingerprint, "encoder": encoder}
    path = args.output / "plan.json"
    if path.is_file() and (before := json.loads(path.read_text())) != now:
        changed = ", ".join(k for k in now if before.get(k) != now[k])
        raise G3nError(f"'{args.output}' holds results of another {changed}; give another --output or the same line")
    write_json(path, now)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if not args.config.is_file():
            raise G3nError(f"config '{args.config}' does not exist; give a YAML of task decoder")
        args.config, args.encoder = args.config.resolve(), str(Path(args.encoder).resolve())
        if Path(args.shards).exists():
            args.shards = str(Path(args.shards).resolve())
        index = load_index(args.shards)
        _, mae, _, fingerprint = open_encoder(args.encoder)
        cells = plan(args.kinds, args.widths, mae.width, args.seeds)
        check_plan(args, index, fingerprint)
        left = [cell for cell in cells if not (args.output / "cells" / f"{cell.name}.json").is_file()]
        if left:
            scans = pooled_scans(args.encoder, index, args.batch, args.device)
            full = probes(scans.features, scans)
            with progress_bar() as progress:
                for cell in progress.track(left, description="tokenizers"):
                    finish(cell, args, scans, full)
                    collect(args.output)
        collect(args.output)
        print(args.output / "projection.csv")
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
