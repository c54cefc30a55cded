"""``g3n probe``: every task on every encoder, on the same folds, beside baselines, with intervals and corrected tests."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from g3n.config import G3nError, to_plain, write_yaml
from g3n.evaluate.intervals import Interval
from g3n.evaluate.report import claim, write_csv, write_json
from g3n.meters import progress_bar
from g3n.probing import significance
from g3n.probing.align import Scans, baseline
from g3n.probing.folds import Folds, components, plan_folds, read_folds, write_folds
from g3n.probing.judge import Judged, better_than_chance, constant, figures, judge, main_metric, paired_z
from g3n.probing.picture import write_picture
from g3n.probing.tasks import CannotRun, Task, left_out_column, select
from g3n.tracking import Tracker, TrackingConfig, environment

NOTES = (
    "intervals are over the people tested, with the probes as fitted; p of a difference also counts who trained them, so it may be "
    "above 0.05 where an interval leaves out 0",
    "p of a row: labels permuted between people and probes fitted again; 0.001 is the smallest there is",
    "a difference above 0 says that the first of the two is better: of AUROC, or of mean absolute errors with the sign turned",
)


@dataclass(frozen=True)
class Options:
    folds: int = 5
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 3 or self.repeats < 1:
            raise G3nError(f"{self.folds} folds, {self.repeats} repeats; probes take at least 3 folds and 1 repeat")


def run_task(
    name: str, task: Task, modality: str | None, scans: Scans, options: Options, splits: Path, given: Path | None
) -> dict[str, Any]:
    """Rows and comparisons of a task, or ``why`` it cannot run. Folds go to ``splits`` or come from ``given``."""
    label = {"task": name, "modality": modality or "all"}
    try:
        selection = select(task, scans.table, modality, scans.group_N, options.folds)
    except CannotRun as why:
        return {**label, "why": str(why)}
    group = scans.group_N[selection.rows]
    table = scans.table.iloc[selection.rows]
    subject = np.asarray(pd.factorize(table["subject"])[0])
    stratum = selection.y_N
    if selection.classes == 1:
        stratum = np.argsort(np.argsort(selection.y_N, kind="stable")) * 10 // len(selection.y_N)
    keys = list(table["key"])

    def divided(suffix: str, count: int, whole: np.ndarray | None) -> Folds:
        """Of an earlier call, else drawn; written in any case."""
        file = f"{cell_name(name, modality)}{suffix}.csv"
        if given is not None:
            folds = read_folds(given / file, keys, group if whole is None else whole)
        else:
            folds = plan_folds(group, subject, stratum, count, options.repeats, options.seed, whole)
        write_folds(splits / file, keys, folds)
        return folds

    folds = divided("", options.folds, None)
    encoders = list(scans.encoders)
    age_sex = baseline(scans, task)
    if age_sex is not None:
        encoders.append(age_sex)
    result: dict[str, Any] = {**label, "target": task.target, "metric": task.shown, "left_out": {}}
    result |= {"n_scans": len(group), "n_subjects": len(np.unique(subject)), "n_groups": len(np.unique(group))}
    result["classes"] = {
        c: len(np.unique(subject[selection.y_N == code])) for code, c in enumerate(selection.names)
    }  # subjects
    facts = {**label, "n_scans": result["n_scans"], "n_subjects": result["n_subjects"]}
    facts["classes"] = " ".join(f"{c}:{n}" for c, n in result["classes"].items())
    judged = [*(judge(encoder, selection, folds) for encoder in encoders), constant(selection, folds)]
    ours = range(len(scans.encoders))
    pairs = [*itertools.combinations(ours, 2), *((i, len(encoders) - 1) for i in ours if age_sex is not None)]
    found, spread = figures(judged, pairs, selection, folds, group)
    tested = "auroc" if selection.classes > 1 else "r"
    result["rows"] = []
    for i, one in enumerate(judged):
        p = None if i == len(encoders) else better_than_chance(encoders[i], selection, folds, group)
        result["rows"] += _rows(facts, "folds", one, i, found, spread, {tested: p})
    result["comparisons"] = []
    for i, j in pairs:
        z = paired_z(judged[i], judged[j], selection, folds, group)
        interval = found[f"difference|{i}|{j}"]
        names = {
            "encoder": judged[i].name,
            "kind": judged[i].kind,
            "other": judged[j].name,
            "other_kind": judged[j].kind,
        }
        ends = {"difference": interval.value, "low": interval.low, "high": interval.high, "z": z}
        metric = main_metric(selection.classes)
        result["comparisons"].append({**label, **names, "metric": metric, **ends})
    if task.leave_out is not None:
        try:
            site = left_out_column(task, scans.table, selection)
        except CannotRun as why:
            result["left_out"][f"leave-{task.leave_out}-out"] = str(why)
        else:
            whole = components(pd.DataFrame({"group": group, "site": site}), ["group", "site"])
            count = min(options.folds, len(np.unique(whole)))
            if count < 3:
                result["left_out"][f"leave-{task.leave_out}-out"] = f"people link all {task.leave_out}s but {count}"
            else:  # no p: people of a site are not exchangeable with those of another
                apart = divided(f"-{task.leave_out}", count, whole)
                judged = [*(judge(encoder, selection, apart) for encoder in encoders), constant(selection, apart)]
                found, spread = figures(judged, [], selection, apart, group)
                for i, one in enumerate(judged):
                    result["rows"] += _rows(facts, f"leave-{task.leave_out}-out", one, i, found, spread, {})
    return result


def plain(name: str) -> str:
    """``name`` as part of a path or of MLflow's names; one with other signs also gets a hash, so that no two are alike."""
    kept = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")[:80]
    return kept if kept == name else f"{kept}-{xxhash.xxh3_64_hexdigest(name)[:8]}"


def cell_name(task: str, modality: str | None) -> str:
    return f"{plain(task)}-{plain(modality or 'all')}"


def _rows(
    facts: Mapping[str, Any],
    scheme: str,
    one: Judged,
    i: int,
    found: Mapping[str, Interval],
    spread: Mapping[str, float],
    p: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    rows = []
    for name, interval in found.items():
        metric, _, which = name.partition("|")
        if which == str(i):
            numbers = {"value": interval.value, "sd": spread[name], "low": interval.low, "high": interval.high}
            rows.append({
                "task": facts["task"], "modality": facts["modality"], "encoder": one.name, "kind": one.kind, "scheme": scheme,
                "metric": metric, **numbers, "n_scans": facts["n_scans"], "n_subjects": facts["n_subjects"],
                "classes": facts["classes"], "p": p.get(metric),
            })  # fmt: skip
    return rows


def fingerprint(scans: Scans) -> str:
    """Hex of everything that is probed."""
    hashed = xxhash.xxh3_64()
    hashed.update(scans.table.to_csv(index=False).encode())
    for encoder in scans.encoders:
        hashed.update(f"{encoder.name} {encoder.kind} {encoder.array.shape}".encode())
        hashed.update(np.ascontiguousarray(encoder.array).view(np.uint8).data)
    return hashed.hexdigest()


def write_probes(
    scans: Scans,
    tasks: Mapping[str, Task],
    output: Path,
    options: Options,
    splits: Path | None = None,
    about: Mapping[str, Any] | None = None,
    mlflow: bool = True,
    strict: bool = False,
) -> dict[str, Any]:
    """Run the tasks and write metrics.json, results.csv, comparisons.csv, splits/, probe.png; what metrics.json holds.

    A call that was stopped goes on with the task it was at. With ``strict`` a task that cannot run is an error. Raises G3nError
    where none can, and for a folder with other results.
    """
    cells = [(name, task, modality) for name, task in tasks.items() for modality in (task.modalities or (None,))]
    about = {**(about or {}), **asdict(options), "fingerprint": fingerprint(scans)}
    claim(output, {**about, "splits": str(splits) if splits else None, "tasks": to_plain(dict(tasks))})
    results: list[dict[str, Any]] = []
    with progress_bar() as progress:
        bar = progress.add_task("probe", total=len(cells))
        for name, task, modality in cells:
            done = output / "tasks" / f"{cell_name(name, modality)}.json"
            if not done.is_file():
                result = run_task(name, task, modality, scans, options, output / "splits", splits)
                if strict and "why" in result:
                    raise G3nError(f"task '{name}' cannot run: {result['why']}")
                write_json(done, result)
            results.append(json.loads(done.read_text()))
            progress.advance(bar)
    ran = [result for result in results if "why" not in result]
    if not ran:
        reasons = "; ".join(f"{r['task']}: {r['why']}" for r in results[:3])
        raise G3nError(f"none of {len(results)} tasks can run ({reasons})")
    rows = [row for result in ran for row in result["rows"]]
    comparisons = [row for result in ran for row in result["comparisons"]]
    for row in comparisons:
        row["p"] = significance.p_different(row["z"])
    correct(rows, ("encoder", "kind"))
    correct(comparisons, ("encoder", "kind", "other", "other_kind"))
    metrics = {
        "about": {**about, "notes": [*scans.notes, *NOTES]},
        "tasks": {f"{r['task']} {r['modality']}": _summary(r, rows) for r in ran},
        "did_not_run": {f"{r['task']} {r['modality']}": r["why"] for r in results if "why" in r},
    }
    write_csv(output / "results.csv", rows)
    write_csv(output / "comparisons.csv", comparisons)
    write_json(output / "metrics.json", metrics)
    write_picture(output / "probe.png", ran, rows)
    if mlflow:
        _track(output, scans, rows, tasks, about)
    return metrics


def correct(rows: Sequence[dict[str, Any]], family: Sequence[str]) -> None:
    """Add corrections over the tasks of each ``family``, such as an encoder and a kind of features."""
    by: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(tuple(row[name] for name in family), []).append(row)
    for of_family in by.values():
        significance.corrected(of_family)


def _summary(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one task: counts, and each predictor's figures by scheme."""
    found: dict[str, Any] = {
        k: result[k] for k in ("target", "n_scans", "n_subjects", "n_groups", "classes", "left_out")
    }
    for row in rows:
        if (row["task"], row["modality"]) == (result["task"], result["modality"]):
            name = f"{row['encoder']} {row['kind']}".strip()
            cell = found.setdefault(row["scheme"], {}).setdefault(name, {})
            ends = {end: row[end] for end in ("value", "low", "high")}
            cell[row["metric"]] = {**ends, "n": result["n_scans"], "subjects": result["n_subjects"], "sd": row["sd"]}
            if row["p"] is not None:
                cell["p"], cell["p_holm"], cell["q_bh"] = row["p"], row["p_holm"], row["q_bh"]
    return found


def _track(
    output: Path, scans: Scans, rows: Sequence[Mapping[str, Any]], tasks: Mapping[str, Task], about: Mapping[str, Any]
) -> None:
    """A run of MLflow for each encoder and kind; best effort, as everywhere."""
    config = TrackingConfig(uri=os.environ.get("MLFLOW_TRACKING_URI"), experiment="g3n-probe")
    for encoder in scans.encoders:
        run = output / "runs" / f"{plain(encoder.name)}-{plain(encoder.kind)}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(write_yaml({"tasks": dict(tasks)}))
        write_json(run / "env.json", environment())
        known = run / "mlflow.json"
        run_id = json.loads(known.read_text())["run_id"] if known.is_file() else None
        values = {
            f"{cell_name(row['task'], row['modality'])}/{row['scheme']}/{row['metric']}": row["value"]
            for row in rows
            if (row["encoder"], row["kind"]) == (encoder.name, encoder.kind) and row["value"] is not None
        }
        params = {"encoder": encoder.name, "kind": encoder.kind, "width": encoder.array.shape[1], **about}
        tracker = Tracker(run, config, params, 0, run_id)
        tracker.metrics(0, {name: float(value) for name, value in values.items()})
        for file in ("results.csv", "comparisons.csv", "metrics.json", "probe.png"):
            tracker.artifact(output / file)
        tracker.close(finished=True)
        if tracker.run_id:
            write_json(known, {"run_id": tracker.run_id})
