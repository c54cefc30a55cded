"""``g3n compare``: what differs between runs, and what it did to them."""

from __future__ import annotations

import csv
import fnmatch
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from g3n.config import G3nError, read_yaml
from g3n.engine.checkpoint import flat, write_atomically
from g3n.evaluate.report import leaves
from g3n.meters import progress_bar

DEFAULT_METRICS = ("val/*", "train/*")
_PARTS = re.compile(r"_by_[a-z_]+/")  # figures of a level or an age
_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")
_MOST_POINTS = 2000  # of a curve in the picture
_ABSENT = "\N{EM DASH}"

Curve = list[tuple[int, float]]  # (step, value), by step


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run: its config as text by flat key, metrics by name, figures of evaluations as (value, low, high)."""

    name: str
    source: str
    config: dict[str, str]
    curves: dict[str, Curve]
    figures: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def compare(
    sources: Sequence[str], output: Path, uri: str | None, evaluations: Sequence[Path], metrics: Sequence[str]
) -> None:
    """Print and write compare.json, compare.csv and compare.png of run folders, or of MLflow run ids with ``uri``.

    ``evaluations`` are folders in which metrics.json files of these runs are looked for; ``metrics`` are patterns of names, of which the default
    leaves out levels and ages. Raises G3nError for fewer than two runs, one given twice, one that is not there, or no metric of these names.
    """
    if len(sources) < 2:
        raise G3nError(f"{len(sources)} run given; name two or more")
    if len({str(Path(s).resolve()) for s in sources}) < len(sources):
        raise G3nError("a run is given twice")
    names = _names(sources)
    with progress_bar() as progress:
        bar = progress.add_task("read runs", total=len(sources))
        runs = []
        for name, source in zip(names, sources, strict=True):
            runs.append(_read(name, source, uri))
            progress.advance(bar)
    patterns = list(metrics) or list(DEFAULT_METRICS)
    chosen = sorted({n for run in runs for n in run.curves if _wanted(n, patterns, bool(metrics))}, key=_order)
    if not chosen:
        there = sorted({n for run in runs for n in run.curves if not _PARTS.search(n)})
        raise G3nError(f"no metric matches {', '.join(patterns)}; there are: {', '.join(there) or 'none'}")
    for run in runs:
        run.figures.update(_figures(run.source, evaluations))
    differences = config_differences(runs)
    summary = {
        name: {run.name: last_and_best(name, run.curves[name]) for run in runs if name in run.curves} for name in chosen
    }
    output.mkdir(parents=True, exist_ok=True)
    tree = {
        "runs": {run.name: run.source for run in runs},
        "config": differences,
        "metrics": summary,
        "evaluations": {n: {r.name: dict(zip(("value", "low", "high"), r.figures[n], strict=True)) for r in runs if n in r.figures}
                        for n in _figure_names(runs)},
    }  # fmt: skip
    write_atomically(output / "compare.json", json.dumps(_finite(tree), indent=1) + "\n")
    _write_csv(output / "compare.csv", tree)
    draw(runs, chosen, output / "compare.png")
    _show(runs, differences, summary)
    print(f"{output / 'compare.json'}, compare.csv, picture compare.png")


def config_differences(runs: Sequence[RunRecord]) -> dict[str, dict[str, str | None]]:
    """Values by key and run, of the keys that are not alike in all; None where a run has none."""
    keys = sorted({key for run in runs for key in run.config})
    table = {key: {run.name: run.config.get(key) for run in runs} for key in keys}
    return {key: values for key, values in table.items() if len({*values.values()}) > 1}


def last_and_best(name: str, curve: Curve) -> dict[str, float]:
    """The last value, and of validation figures, which are all errors, the lowest; with their steps."""
    found: dict[str, float] = {"last": curve[-1][1], "step": curve[-1][0]}
    finite = [point for point in curve if math.isfinite(point[1])]
    if name.startswith("val/") and finite:
        step, value = min(finite, key=lambda point: (point[1], point[0]))
        found |= {"best": value, "best_step": step}
    return found


def _names(sources: Sequence[str]) -> list[str]:
    """The last part of each path, with as many parts before it as tell them apart."""
    parts = [Path(source).resolve().parts if not _MLFLOW_ID.fullmatch(source) else (source,) for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len({*names}) == len(names):
            break
    return names


def _read(name: str, source: str, uri: str | None) -> RunRecord:
    if Path(source).is_dir():
        return _read_folder(name, Path(source))
    if uri is not None and _MLFLOW_ID.fullmatch(source):
        return _read_mlflow(source, uri)
    hint = "" if uri is not None else "; an MLflow run id needs --tracking-uri"
    raise G3nError(f"'{source}' is no run folder{hint or ' and no MLflow run id (32 hex digits)'}")


def _read_folder(name: str, folder: Path) -> RunRecord:
    path = folder / "metrics.jsonl"
    if not path.is_file() or not (folder / "config.yaml").is_file():
        raise G3nError(f"'{folder}' has no config.yaml and metrics.jsonl; give a run folder, such as runs/demo/dit")
    config = {key: str(value) for key, value in flat(read_yaml(folder / "config.yaml")).items()}
    environment = json.loads((folder / "env.json").read_text()) if (folder / "env.json").is_file() else {}
    if "git_sha" in environment:
        config["git_sha"] = str(environment["git_sha"])
    curves: dict[str, Curve] = {}
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        for metric, value in row.items():
            if metric not in ("step", "time") and isinstance(value, (int, float)):
                curves.setdefault(metric, []).append((int(row["step"]), float(value)))
    return RunRecord(name, str(folder), _told(config), curves)


def _read_mlflow(run_id: str, uri: str) -> RunRecord:
    for word in ("mlflow", "alembic"):
        logging.getLogger(word).setLevel(logging.ERROR)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(uri)
        run = client.get_run(run_id)
        curves: dict[str, Curve] = {}
        for name in run.data.metrics:
            if name.startswith("system/"):
                continue
            by_step = {
                m.step: m.value for m in sorted(client.get_metric_history(run_id, name), key=lambda m: m.timestamp)
            }
            curves[name] = sorted(by_step.items())
    except MlflowException as error:
        raise G3nError(
            f"MLflow run '{run_id}' cannot be read from '{uri}' ({' '.join(str(error).split())[:200]})"
        ) from None
    config = dict(run.data.params)
    if "git_sha" in run.data.tags:
        config["git_sha"] = run.data.tags["git_sha"]
    return RunRecord(f"{run.info.run_name} ({run_id[:8]})", run_id, _told(config), curves)


def _told(config: Mapping[str, str]) -> dict[str, str]:
    """Without what differs between any two runs and says nothing; cut as MLflow cuts it."""
    return {k: v[:500] for k, v in config.items() if k not in ("name", "runs") and not k.startswith("tracking.")}


def _wanted(name: str, patterns: Sequence[str], given: bool) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and (given or not _PARTS.search(name))


def _order(name: str) -> tuple[bool, str]:
    return not name.startswith("val/"), name


def _figures(source: str, evaluations: Sequence[Path]) -> dict[str, tuple[float, float, float]]:
    """Figures of a run with an interval, by <folder of the evaluation>/<path>."""
    found: dict[str, tuple[float, float, float]] = {}
    run = Path(source).resolve()
    for folder in evaluations:
        if not folder.is_dir():
            raise G3nError(f"--evaluations '{folder}' is no folder; give one that g3n evaluate or g3n report wrote")
        for path in sorted(folder.rglob("metrics.json")):
            tree = json.loads(path.read_text())
            of = Path(str(tree.get("run", ""))).resolve() if isinstance(tree, Mapping) else None
            if of is None or (of != run and run not in of.parents):
                continue
            for name, leaf in leaves(tree, f"{path.parent.name}/"):
                if isinstance(leaf, Mapping):
                    value, low, high = (
                        math.nan if leaf[end] is None else float(leaf[end]) for end in ("value", "low", "high")
                    )
                    found[name] = (value, low, high)
    return found


def _figure_names(runs: Sequence[RunRecord]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.figures))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, tree: Mapping[str, Any]) -> None:
    """One line a run and key, metric or figure."""
    columns = ["kind", "name", "run", "value", "step", "best", "best_step", "low", "high"]
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for key, values in tree["config"].items():
            writer.writerows(
                {"kind": "config", "name": key, "run": run, "value": value} for run, value in values.items()
            )
        for name, runs in tree["metrics"].items():
            for run, last in runs.items():
                more = {column: last[column] for column in ("step", "best", "best_step") if column in last}
                writer.writerow({"kind": "metric", "name": name, "run": run, "value": last["last"], **more})
        for name, runs in tree["evaluations"].items():
            writer.writerows({"kind": "evaluation", "name": name, "run": run, **figure} for run, figure in runs.items())
    part.replace(path)


def draw(runs: Sequence[RunRecord], metrics: Sequence[str], path: Path) -> None:
    """A small picture a metric, a line a run."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    colors = colormaps["tab10" if len(runs) <= 10 else "turbo"]
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    lines = []
    for number, run in enumerate(runs):
        color = colors(number if len(runs) <= 10 else number / (len(runs) - 1))
        for ax, metric in zip(axes, metrics, strict=False):
            curve = run.curves.get(metric, [])
            shown = curve[:: max(1, len(curve) // _MOST_POINTS)]
            ax.plot(
                *zip(*shown, strict=True), color=color, lw=1, marker="o" if len(shown) < 12 else None, ms=2.5
            ) if shown else None
        lines.append(axes[0].plot([], [], color=color, label=run.name)[0])
    for ax, metric in zip(axes, metrics, strict=False):
        ax.set_title(metric, fontsize=8)
        ax.tick_params(labelsize=7)
        values = [value for run in runs for _, value in run.curves.get(metric, []) if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 30 * min(values):
            ax.set_yscale("log")
    for ax in axes[len(metrics) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(metrics) - columns) : len(metrics)]:
        ax.set_xlabel("step", fontsize=8)
    figure.legend(handles=lines, loc="outside upper center", ncols=min(5, len(runs)), fontsize=8, frameon=False)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def _show(runs: Sequence[RunRecord], differences: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    console = Console()
    names = [escape(run.name) for run in runs]

    def table(title: str) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE)
        made.add_column("", overflow="fold")
        for name in names:
            made.add_column(name, justify="right", overflow="fold")
        return made

    config = table("config, where it differs")
    for key, values in differences.items():
        config.add_row(key, *(_ABSENT if values[run.name] is None else escape(str(values[run.name])) for run in runs))
    metrics = table("last (lowest at step)")
    for name, of_runs in summary.items():
        metrics.add_row(name, *(_in_words(of_runs.get(run.name)) for run in runs))
    figures = table("evaluations, 95% intervals over subjects")
    for name in _figure_names(runs):
        ends = [run.figures.get(name) for run in runs]
        figures.add_row(name, *(_ABSENT if e is None else escape(f"{e[0]:.3g} [{e[1]:.3g}, {e[2]:.3g}]") for e in ends))
    console.print(config if differences else "configs are alike")
    console.print(metrics)
    if figures.row_count:
        console.print(figures)


def _in_words(found: Mapping[str, float] | None) -> str:
    if found is None:
        return _ABSENT
    best = f" ({found['best']:.4g} at {found['best_step']:.0f})" if "best" in found else ""
    return f"{found['last']:.4g}{best}"
