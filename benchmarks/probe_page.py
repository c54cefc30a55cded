"""Results of ``g3n probe`` as a page: ``python -m benchmarks.probe_page out/probe --output docs/results/probes.md --title "..." --how "..."``.

Two tables: each task and predictor with its figure, interval and tests against chance; each pair of encoders with the difference of the
main figure. Sections that people wrote below the tables stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.report import table
from benchmarks.targets import write_page
from g3n.config import G3nError

MAIN = ("auroc", "mae", "r")
TESTS = ("p", "p_holm", "q_bh")


def figure(found: Mapping[str, Any] | None) -> str:
    if not found or found["value"] is None:
        return ""
    ends = "" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]"
    return f"{found['value']:.3g}{ends}"


def number(value: float | None) -> str:
    return "" if value is None or pd.isna(value) else f"{value:.2g}"


def results(metrics: Mapping[str, Any]) -> list[str]:
    """Markdown of the first table."""
    lines = []
    for name, task in metrics["tasks"].items():
        task_name = name.removesuffix(" all")
        people = f"{task['n_subjects']} ({task['n_scans']})" + "".join(f"; {c} {n}" for c, n in task["classes"].items())
        for scheme in ("folds", *(key for key in task if key.startswith("leave-"))):
            label = task_name if scheme == "folds" else f"{task_name}, {scheme}"
            for who, found in task[scheme].items():
                cells = [label, people, who, *(figure(found.get(m)) for m in MAIN)]
                lines.append([*cells, *(number(found.get(t)) for t in TESTS)])
    return table(("task", "people (scans)", "features", "AUROC", "MAE", "r", "p", "Holm", "BH"), lines)


def comparisons(path: Path) -> list[str]:
    """Markdown of the second table."""
    lines = []
    for row in pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records"):
        names = (
            " ".join(str(row[c]) for c in pair if not pd.isna(row[c]))
            for pair in (("encoder", "kind"), ("other", "other_kind"))
        )
        difference = figure({"value": row["difference"], "low": row["low"], "high": row["high"]})
        task = row["task"] if row["modality"] == "all" else f"{row['task']} {row['modality']}"
        lines.append([task, *names, row["metric"], difference, *(number(row[t]) for t in TESTS)])
    return table(("task", "first", "second", "figure", "first minus second", "p", "Holm", "BH"), lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what g3n probe wrote")
    parser.add_argument("--output", type=Path, required=True, help="the .md to write")
    parser.add_argument("--title", default="Probes")
    parser.add_argument("--how", action="append", default=[], help="a command that led to the results; repeatable")
    parser.add_argument("--picture", help="beside the page")
    args = parser.parse_args(argv)
    try:
        if not (args.folder / "metrics.json").is_file():
            raise G3nError(f"'{args.folder}' has no metrics.json; run g3n probe first")
        metrics = json.loads((args.folder / "metrics.json").read_text())
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = metrics["about"]
    lines = [f"# {args.title}", "", "```bash", *args.how, "```", ""]
    lines.append(
        f"{about['folds']} folds, {about['repeats']} repeats, seed {about['seed']}; intervals are 95 %. "
        f"{'. '.join(note[:1].upper() + note[1:] for note in about['notes'])}."
    )
    lines += ["", f"![figures by task]({args.picture})"] if args.picture else []
    lines += ["", *results(metrics)]
    if metrics["did_not_run"]:
        lines += [*(f"- not run: {name}: {why}" for name, why in metrics["did_not_run"].items()), ""]
    text = "\n".join([*lines, *comparisons(args.folder / "comparisons.csv")])
    write_page(args.output, text)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
