"""The benchmark as bars: a group a task, a bar an encoder in its best modality, 95 % intervals, baselines as marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from g3n.probing.align import BASELINES
from g3n.probing.judge import MAJORITY, MEAN

MARKS = {**dict.fromkeys(BASELINES, "D"), MEAN: "_", MAJORITY: "_"}
NAMES = {
    "auroc": "AUROC",
    "balanced_accuracy": "balanced accuracy",
    "auprc": "AUPRC",
    "mae": "MAE",
    "r": "r",
    "r2": "R²",
}
CHANCE = {"auroc": 0.5, "r": 0.0, "r2": 0.0}


def best_modality(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The row of each (task, predictor) with the best value over modalities."""
    sign = -1 if metric == "mae" else 1
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in rows:
        if row["value"] is None or row["scheme"] != "folds" or row["metric"] != metric:
            continue
        at = (row["task"], f"{row['encoder']} {row['kind']}".strip())
        if at not in best or sign * row["value"] > sign * best[at]["value"]:
            best[at] = row
    return best


def write_picture(path: Path, results: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> None:
    """A panel for each metric that the tasks' table names. A star: better than chance, p below 0.05 after Holm's
    correction. Atomic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metric_of = {result["task"]: result["metric"] for result in results}
    panels = [m for m in NAMES if m in metric_of.values()]
    names = list(dict.fromkeys(f"{r['encoder']} {r['kind']}".strip() for r in rows if r["encoder"] not in MARKS))
    most = max(sum(m == metric for m in metric_of.values()) for metric in panels)
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(max(6.0, 2.5 + 0.55 * most * max(1, len(names) ** 0.5)), 3.6 * len(panels)),
        squeeze=False,
    )
    colors = plt.get_cmap("tab10")
    for ax, metric in zip(axes[:, 0], panels, strict=True):
        tasks = [task for task, m in metric_of.items() if m == metric]
        best = best_modality([row for row in rows if row["task"] in tasks], metric)
        starred = {
            (r["task"], r["modality"], r["encoder"], r["kind"])
            for r in rows
            if r.get("p_holm") is not None and r["p_holm"] < 0.05
        }
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            for x, task in enumerate(tasks):
                row = best.get((task, name))
                if row is None:
                    continue
                at = x + (i - (len(names) - 1) / 2) * width
                ax.bar(at, row["value"], width * 0.95, color=colors(i % 10), label=name if x == 0 else None)
                ends = [row["low"], row["high"]]
                if None not in ends:
                    ax.plot([at, at], ends, color="black", lw=1)
                if (task, row["modality"], row["encoder"], row["kind"]) in starred:
                    top = max(row["value"], *(e for e in ends if e is not None)) if None not in ends else row["value"]
                    ax.text(at, top, "*", ha="center", va="bottom", fontsize=9)
        for name, mark in MARKS.items():
            points = [(x, best[task, name]["value"]) for x, task in enumerate(tasks) if (task, name) in best]
            if points:
                ax.scatter(*zip(*points, strict=True), marker=mark, color="0.35", s=28, zorder=3, label=name)
        if metric in CHANCE:
            ax.axhline(CHANCE[metric], color="0.6", lw=0.8, ls="--")
        if metric == "auroc":
            ax.set_ylim(0.3, 1.05)
        counts = {r["task"]: r["n_subjects"] for r in results}
        shown = [(t, {best[t, n]["modality"] for n in names if (t, n) in best} - {"all"}) for t in tasks]
        labels = [f"{t}\n{'/'.join(sorted(m)) + ', ' if m else ''}{counts[t]} subj." for t, m in shown]
        ax.set_xticks(np.arange(len(tasks)), labels, rotation=35, ha="right", fontsize=7)
        ax.set_ylabel(NAMES[metric])
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.text(
        0.01,
        0.005,
        "lines: 95 % intervals; *: better than chance, p < 0.05 after Holm's correction over tasks",
        fontsize=7,
    )
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.png")
    figure.savefig(part, dpi=150)
    plt.close(figure)
    part.replace(path)
