"""``g3n probe`` from its words to its files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from g3n.config import G3nError
from g3n.evaluate.page import Part, write_page
from g3n.features import Features
from g3n.probing.align import align
from g3n.probing.foreign import Targets, joined, read_any, read_targets
from g3n.probing.run import Options, write_probes
from g3n.probing.tasks import Task, chosen, read_tasks

TASKS = Path("configs/probes.yaml")
_LOG_WIDTH = 150  # of a table that goes to a file


def probe(
    files: Sequence[Path],
    output: Path,
    kinds: Sequence[str],
    tasks: Path | None,
    only: Sequence[str],
    targets: Path | None,
    id_column: str | None,
    folds: int,
    repeats: int,
    splits: Path | None,
    seed: int,
    mlflow: bool,
) -> dict[str, Any]:
    """As ``g3n probe --help`` tells; what metrics.json holds. Raises G3nError."""
    if (targets is None) != (id_column is None):
        raise G3nError("--targets and --id go together: a table, and its column with the features' ids")
    if splits is not None and not splits.is_dir():
        raise G3nError(f"--splits '{splits}' is no folder; give splits/ of an earlier call, or leave it out")
    options = Options(folds, repeats, seed)
    known = read_targets(targets, id_column, folds) if targets is not None and id_column is not None else None
    sources = {name: _source(path, known, id_column or "ids") for name, path in names_of(files).items()}
    about: dict[str, Any] = {"features": [str(path) for path in files]}
    if known is not None:
        about |= {"targets": str(targets), "understood": known.why}
    metrics = write_probes(
        align(sources, kinds), _tasks(tasks, known, only), output, options, splits, about, mlflow, strict=len(only) == 1
    )
    line = ["g3n", "probe", *(word for path in files for word in ("--features", str(path)))]
    line += [word for kind in kinds for word in ("--kind", kind)] + [word for name in only for word in ("--task", name)]
    given = {"--tasks": tasks, "--targets": targets, "--id": id_column, "--splits": splits}
    line += [str(word) for name, value in given.items() if value is not None for word in (name, value)]
    line += ["--folds", str(folds), "--repeats", str(repeats), "--seed", str(seed), "--output", str(output)]
    parts = [Part(name, shlex.join(line), task) for name, task in metrics["tasks"].items()]
    parts.insert(0, Part("All tasks", shlex.join(line), metrics["did_not_run"], [output / "probe.png"]))
    write_page(output / "index.html", "g3n probe", metrics["about"], parts)
    print_results(metrics)
    return metrics


def names_of(files: Sequence[Path]) -> dict[str, Path]:
    """Encoders by the names of their files, with the folder's in front where two are alike. Raises G3nError for one file twice."""
    stems = [path.stem for path in files]
    names = [
        path.stem if stems.count(path.stem) == 1 else f"{path.absolute().parent.name}-{path.stem}" for path in files
    ]
    if len(set(names)) < len(names):
        raise G3nError(
            f"features {', '.join(map(str, files))}: two have the same name; give each file once, under its own name"
        )
    return dict(zip(names, files, strict=True))


def _source(path: Path, targets: Targets | None, id_column: str) -> Features:
    features = read_any(path, id_column)
    if targets is not None:
        return joined(features, targets, path)
    if "subject" not in features.table:
        raise G3nError(f"features '{path}' tell nothing of their scans; give --targets TABLE --id COLUMN")
    return features


def _tasks(path: Path | None, targets: Targets | None, only: Sequence[str]) -> dict[str, Task]:
    if path is not None or targets is None:
        return read_tasks(path or TASKS, only)
    if not targets.tasks:
        reasons = "; ".join(f"{name}: {why}" for name, why in targets.why.items()) or "no column besides ids"
        raise G3nError(f"the targets have no column to predict ({reasons})")
    for name in only:
        if name in targets.why and name not in targets.tasks:
            raise G3nError(f"target '{name}' cannot be predicted: {targets.why[name]}")
    return chosen(targets.tasks, only)


def print_results(metrics: Mapping[str, Any]) -> None:
    """A line a task and predictor, and why tasks did not run."""
    table = Table(title="Probes, means over repeats, 95% intervals over people", title_justify="left", box=box.SIMPLE)
    for column in ("task", "subjects (scans)", "classes", "features", "figures", "p", "Holm", "BH"):
        table.add_column(column, overflow="fold")
    for name, task in metrics["tasks"].items():
        people = f"{task['n_subjects']} ({task['n_scans']})"
        classes = " ".join(f"{c}:{n}" for c, n in task["classes"].items())
        for scheme, predictors in task.items():
            if scheme != "folds" and not scheme.startswith("leave-"):
                continue
            for who, found in predictors.items():
                shown = [m for m in ("auroc", "mae", "r") if m in found and found[m]["value"] is not None]
                figures = "\n".join(f"{m} {_figure(found[m])}" for m in shown)
                tests = [_p(found.get(test)) for test in ("p", "p_holm", "q_bh")]
                table.add_row(
                    f"{name}{'' if scheme == 'folds' else ', ' + scheme}", people, classes, who, figures, *tests
                )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_LOG_WIDTH).print(table)
    for name, why in metrics["did_not_run"].items():
        console.print(f"not run: {name}: {why}", markup=False, highlight=False)


def _figure(found: Mapping[str, Any]) -> str:
    ends = [found[end] for end in ("low", "high") if found[end] is not None]
    return f"{found['value']:.3g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if len(ends) == 2 else "")


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value >= 1e-4 else "<1e-4"
