"""``g3n report``: every evaluation of a generator in one folder and on one page that stands alone."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g3n.config import G3nError, build
from g3n.evaluate.page import Part, write_page
from g3n.evaluate.report import leaves, write_json
from g3n.models.pretrained import Run, open_run
from g3n.tracking import TrackingConfig, git_sha, log_evaluation

Call = Callable[[Sequence[str]], None]  # runs ``g3n`` with these words


@dataclass(frozen=True)
class Step:
    """One command of the report. ``folder`` and ``metrics`` say where its figures lie; ``words`` lack ``--output``."""

    title: str
    folder: str
    words: tuple[str, ...]
    metrics: str = "metrics.json"
    note: str = ""
    told_twice: tuple[str, ...] = ()  # keys that the page leaves out, because intervals say the same


def steps(run: Path, forecaster: Path | None, count: int, seed: int) -> list[Step]:
    """What is evaluated, by the config of the run: tokenizer and shards are those it was trained on. Raises G3nError for a mix."""
    config = open_run(run, "dit").config
    tokenizer, latents = config["model"]["tokenizer"], config["data"]["shards"]
    shards = open_run(tokenizer, "decoder").config["data"]["shards"]
    for name, value in (("latents", latents), ("volume shards", shards)):
        if not isinstance(value, str):
            raise G3nError(
                f"'{run}' was trained on a mix of {name}; a report is of one folder, run the evaluations singly"
            )
    of_run = ("--run", str(run))
    more = ("--count", str(count), "--seed", str(seed))
    found = [
        Step(
            "Reconstruction", "reconstruction", ("evaluate", "reconstruction", "--run", tokenizer, "--shards", shards),
            note="Validation volumes through encoder, projection and decoder, against themselves.",
            told_twice=("psnr_db", "psnr_gain_db", "ssim", "ms_ssim", "mae", "high_frequency_error", "dice", "by_modality",
                        "by_cohort"),
        ),
        Step(
            "Does it obey?", "generation", ("evaluate", "generation", *of_run, "--latents", latents, "--seed", str(seed), "--guidance", "auto"),
            note="What was asked for against what is measured on the generated volumes; guidance chosen on training subjects alone.",
        ),
        Step(
            "Distance to real scans", "distances", ("evaluate", "distances", *of_run, "--latents", latents, *more),
            note="Each distance beside that of real scans to scans of other people at the same n.",
        ),
        Step("Privacy", "audit", ("audit", *of_run, "--latents", latents, *more), metrics="audit.json"),
    ]  # fmt: skip
    if forecaster is not None:
        of_forecaster = ("--run", str(forecaster), "--latents", latents)
        note = "Decoded forecasts against decoded follow-ups, beside simple predictors."
        found.insert(3, Step("Forecasts", "forecasting", ("evaluate", "forecasting", *of_forecaster), note=note))
    return found


def write_report(call: Call, run: Path, forecaster: Path | None, output: Path, count: int, seed: int) -> Path:
    """Run what is missing, write ``index.html`` and ``report.json`` to ``output``, log both to the run's MLflow; the page.

    A part that was finished by the same command on the same weights is not run again. Raises G3nError as the evaluations do, and for a
    folder with the report of another run.
    """
    generator = open_run(run, "dit")
    about: dict[str, Any] = {"run": str(run), "step": generator.step, "count": count, "seed": seed, "git": git_sha()}
    weights = {"run": generator.step}
    if forecaster is not None:
        weights["forecaster"] = open_run(forecaster, "forecast").step
        about |= {"forecaster": str(forecaster), "forecaster_step": weights["forecaster"]}
    others = output / "report.json"
    if others.is_file() and json.loads(others.read_text())["about"]["run"] != str(run):
        raise G3nError(f"'{output}' holds the report of another run; give a new folder")
    parts, tree = [], {}
    for step in steps(run, forecaster, count, seed):
        folder = output / step.folder
        words = [*step.words, "--output", str(folder)]
        command = shlex.join(["g3n", *words])
        mark = {"command": command, "steps": weights}
        if not _is_done(folder / "part.json", mark):
            print(f"\n{step.title}\n$ {command}", flush=True)
            begin = time.monotonic()
            call(words)
            write_json(folder / "part.json", {**mark, "seconds": round(time.monotonic() - begin, 1)})
        metrics = json.loads((folder / step.metrics).read_text())
        tree[step.folder] = metrics
        pictures = sorted(p for p in folder.iterdir() if p.suffix in (".png", ".svg"))
        shown = {name: value for name, value in metrics.items() if name not in step.told_twice}
        parts.append(Part(step.title, command, shown, pictures, step.note))
    line = ["g3n", "report", "--run", str(run), *(["--forecaster", str(forecaster)] if forecaster else [])]
    line += ["--output", str(output), "--count", str(count), "--seed", str(seed)]
    about["command"] = shlex.join(line)
    write_json(output / "report.json", {"about": about, **tree})
    page = output / "index.html"
    write_page(page, f"g3n report: {generator.path.parents[1].name}", about, parts)
    _log(generator, figures(tree), page)
    return page


def _is_done(path: Path, mark: Mapping[str, Any]) -> bool:
    if not path.is_file():
        return False
    known = json.loads(path.read_text())
    return all(known.get(name) == value for name, value in mark.items())


def figures(tree: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a report by path, intervals by their value: what MLflow can plot."""
    found = {path: leaf["value"] if isinstance(leaf, Mapping) else leaf for path, leaf in leaves(tree, "report/")}
    return {path: float(value) for path, value in found.items() if value is not None}


def _log(run: Run, values: Mapping[str, float], page: Path) -> None:
    tracking = build(TrackingConfig, run.config.get("tracking", {}), "tracking")
    run_id = json.loads((run.path / "state.json").read_text()).get("mlflow_run_id")
    if tracking.mlflow and run_id:
        log_evaluation(run.path.parents[1], tracking, run_id, run.step, values, page)
