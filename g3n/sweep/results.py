"""What a study leaves: study.csv, best.yaml, sweep.png, and Optuna's pictures of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from g3n.config import to_plain, write_yaml
from g3n.engine.checkpoint import write_atomically
from g3n.evaluate.report import write_csv
from g3n.sweep import study as record
from g3n.sweep.plan import Plan, SweepConfig

log = logging.getLogger(__name__)


def short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def write_table(study: optuna.Study, sweep: SweepConfig) -> Path:
    path = sweep.folder / "study.csv"
    part = path.with_name(".study.csv.part")
    write_csv(part, record.rows(study, sweep.folder))
    part.replace(path)
    return path


def best_config(study: optuna.Study, plan: Plan) -> str | None:
    """The best trial's config as YAML, for a run of its own under the base's folder; None where no trial is complete."""
    best = record.best(study)
    if best is None:
        return None
    tree = to_plain(plan.config(best.number, best.params))
    return write_yaml(
        {**tree, "name": f"{plan.sweep.name}-best", "runs": plan.base["runs"], "tracking": plan.base["tracking"]}
    )


def write_all(study: optuna.Study, sweep: SweepConfig, plan: Plan) -> list[Path]:
    """Write every result that there is; the files."""
    files = [write_table(study, sweep)]
    text = best_config(study, plan)
    if text is not None:
        write_atomically(sweep.folder / "best.yaml", text)
        files.append(sweep.folder / "best.yaml")
    if any(trial.intermediate_values for trial in study.get_trials(deepcopy=False)):
        files += [draw(study, sweep), *_optuna_pictures(study, sweep)]
    return files


def draw(study: optuna.Study, sweep: SweepConfig) -> Path:
    """sweep.png: the metric over steps, over trials, and over each key of the space."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trials = study.get_trials(deepcopy=False)
    best = record.best(study)
    keys = list(sweep.space)
    columns = min(4, 2 + len(keys))
    lines = -(-(2 + len(keys)) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * lines), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    colors = {TrialState.COMPLETE: "C0", TrialState.PRUNED: "0.6"}
    shown = [trial for trial in trials if trial.state in colors and trial.value is not None]
    for trial in shown:
        steps = sorted(trial.intermediate_values)
        chosen = best is not None and trial.number == best.number
        color = "C3" if chosen else colors[trial.state]
        values = [trial.intermediate_values[step] for step in steps]
        axes[0].plot(
            steps,
            values,
            "o-" if len(steps) == 1 else "-",
            color=color,
            lw=2 if chosen else 0.9,
            ms=3,
            zorder=3 if chosen else 2,
        )
    axes[0].set(xlabel="step", ylabel=sweep.metric)
    for state, color in colors.items():
        some = [trial for trial in shown if trial.state == state]
        axes[1].scatter([t.number for t in some], [t.value for t in some], color=color, s=14, label=state.name.lower())
        for ax, key in zip(axes[2:], keys, strict=False):
            ax.scatter([_place(sweep, key, t.params[key]) for t in some], [t.value for t in some], color=color, s=14)
    axes[1].set(xlabel="trial")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax, key in zip(axes[2:], keys, strict=False):
        dimension = sweep.space[key]
        ax.set_xlabel(key)
        if dimension.log and shown:
            ax.set_xscale("log")
        if dimension.type == "categorical":
            names = dimension.points() or []
            ax.set_xticks(range(len(names)), [str(name) for name in names], fontsize=7)
        if best is not None:
            ax.scatter(_place(sweep, key, best.params[key]), best.value, marker="*", color="C3", s=70, zorder=3)
    if best is not None:
        axes[1].scatter(best.number, best.value, marker="*", color="C3", s=70, zorder=3, label="best")
    axes[1].legend(fontsize=7)
    for ax in axes[2 + len(keys) :]:
        ax.set_axis_off()
    path = sweep.folder / "sweep.png"
    part = path.with_name(".sweep.png.part")
    figure.savefig(part, format="png")
    part.replace(path)
    return path


def _place(sweep: SweepConfig, key: str, chosen: Any) -> Any:
    points = sweep.space[key].points()
    return (points or []).index(chosen) if sweep.space[key].type == "categorical" else chosen


def _optuna_pictures(study: optuna.Study, sweep: SweepConfig) -> list[Path]:
    """Parallel coordinates and importance of keys (fANOVA, Hutter 2014); those that so few trials allow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as pictures

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    if len({trial.value for trial in complete}) < 2:
        return []
    evaluator = FanovaImportanceEvaluator(seed=0)
    makers: dict[str, Callable[[], Any]] = {
        "parallel_coordinates": lambda: pictures.plot_parallel_coordinate(study, target_name=sweep.metric),
        "importance": lambda: pictures.plot_param_importances(study, evaluator=evaluator, target_name=sweep.metric),
    }
    files = []
    for name, make in makers.items():
        path = sweep.folder / f"{name}.png"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ax = make()
                for lines in ax.figure.axes[0].collections if name == "parallel_coordinates" else ():
                    lines.set_cmap(
                        "viridis" if sweep.direction == "minimize" else "viridis_r"
                    )  # Optuna's own ends in white
                ax.figure.set_size_inches(max(7, 1.6 * (1 + len(sweep.space))), 4.5)
                ax.figure.savefig(path.with_name(f".{path.name}.part"), format="png", dpi=130, bbox_inches="tight")
            path.with_name(f".{path.name}.part").replace(path)
            files.append(path)
        except (ValueError, RuntimeError) as error:  # no variance, or a key that never changed
            log.warning("no %s: %s", path.name, error)
        finally:
            pyplot.close("all")
    return files
