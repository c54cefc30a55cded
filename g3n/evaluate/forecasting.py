"""Is a forecast nearer to the follow-up than simple predictors are, and does it move with the time that is asked for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate import intervals, metrics
from g3n.evaluate.anatomy import measure
from g3n.evaluate.baselines import (
    LEAST_PAIRS,
    Pairs,
    Predictor,
    baseline_age_years,
    mean_change,
    regression,
    train_pairs,
)
from g3n.evaluate.montage import write_montage
from g3n.evaluate.report import means, print_means, write_csv, write_json
from g3n.flow import elapsed_gate, integrate
from g3n.generate import Generator, open_latents
from g3n.meters import progress_bar
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch, subject_of
from g3n.tasks.base import randn_like_samples
from g3n.tasks.forecast import gated, start_from, with_elapsed, with_history

COLUMNS = ("psnr_db", "no_change_psnr_db", "psnr_gain_db", "ventricle_error_ml", "no_change_ventricle_error_ml")
FIGURES = ("mae", "psnr_db", "ssim", "ventricle_error_ml")
CURVE_YEARS = (0.0, 1.0, 2.0, 5.0, 10.0)
DRAWS = 4  # forecasts from different noises; ours is their mean
CURVES = 64  # baselines whose growth is followed through CURVE_YEARS


@torch.no_grad()
def evaluate_forecasting(
    generator: Generator,
    latents: str,
    output: Path,
    split: str = "val",
    steps: int = 25,
    batch: int = 8,
    draws: int = DRAWS,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``pairs.csv``, ``growth.csv`` and ``forecast.png`` to ``output`` and return the metrics.

    First to last visit of every subject and modality of ``split``. Everything is compared after decoding, with the decoded
    follow-up: what is judged is the forecaster, not the tokenizer. ``ours`` is the mean of ``draws`` forecasts, as ``g3n forecast
    --draws`` writes it, because the others predict means too; ``one_draw`` the first of them, which has the noise of a scan.
    ``no_change`` takes the baseline for the forecast,
    ``mean_change`` and ``regression`` (``g3n.evaluate.baselines``) learn from pairs of the train split.
    ``ventricle_error_ml`` is the error of the predicted change of ventricle volume, and so of the volume itself.
    Intervals are over subjects. Raises G3nError for latents of another tokenizer, or without pairs in ``split``.
    """
    index = open_latents(generator, latents)
    rows: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    picture: tuple[float, list[tuple[str, Any]]] = (-1.0, [])
    undated = 0
    years = curve_years(generator)
    with progress_bar() as progress:
        train = train_pairs(index, generator.space, batch, progress)
        predictors = fit(train)
        bar = progress.add_task("forecast", total=None)
        for b in eval_batches(index, None, "pair", split, batch, rank=0, world=1, seed=0, history=generator.history):
            elapsed = b.tensors["elapsed_years"]
            use = [i for i in range(len(b)) if b.weights[i] > 0 and bool(elapsed[i].isfinite())]
            undated += int((b.weights > 0).sum()) - len(use)
            progress.advance(bar, len(b))
            if not use:
                continue
            made = predict(generator, b, predictors, steps, draws)
            target = made.pop("target")
            figures = {name: compare(volumes, target, generator, b) for name, volumes in made.items()}
            for i in use:
                rows.append(row_of(b, i, float(elapsed[i]), figures))
                if float(elapsed[i]) > picture[0]:
                    shown = [("baseline", made["no_change"]), ("follow-up", target), ("forecast", made["ours"])]
                    shown += [(name.replace("_", " "), made[name]) for name in predictors]
                    picture = float(elapsed[i]), [(name, v[i].numpy()) for name, v in shown]
            if len(curves) < CURVES * len(years):
                curves += growth(generator, b, use, made["no_change"], years, steps)
    if not rows:
        raise G3nError(f"latents '{latents}' have no subject with two dated visits in split '{split}'")
    subjects = [row["subject"] for row in rows]
    result: dict[str, Any] = {
        "run": str(generator.run.path),
        "split": split,
        "pairs": len(rows),
        "pairs_without_dates": undated,
        "train_pairs": len(train),
        "draws": draws,
        **means(rows, COLUMNS),
        "methods": {
            method: {f: asdict(intervals.mean(column(rows, method, f), subjects)) for f in FIGURES}
            for method in ("ours", "one_draw", "no_change", *predictors)
        },
        "ours_minus": {
            method: {
                f: asdict(intervals.mean(column(rows, "ours", f) - column(rows, method, f), subjects)) for f in FIGURES
            }
            for method in ("no_change", *predictors)
        },
        "left_out": {} if predictors else {"mean_change, regression": f"fewer than {LEAST_PAIRS} dated train pairs"},
        "growth": growth_figures(curves, years),
    }
    write_csv(output / "pairs.csv", rows)
    write_csv(output / "growth.csv", curves)
    write_montage(output / "forecast.png", picture[1], f"{picture[0]:.1f} years")
    write_json(output / "metrics.json", result)
    table = {m: {"n": len(rows), **{f: float(v[f]["value"]) for f in FIGURES}} for m, v in result["methods"].items()}
    print_means(f"forecasts of {len(rows)} {split} pairs", table)
    return result


def fit(train: Pairs) -> dict[str, Predictor]:
    """The learned baselines by name; none where there is too little to learn from."""
    return {"mean_change": mean_change(train), "regression": regression(train)} if len(train) >= LEAST_PAIRS else {}


def solve(
    generator: Generator,
    b: Batch,
    rows: Sequence[int],
    cond_BV: Tensor,
    elapsed_years: Tensor,
    steps: int,
    draw: int = 0,
) -> Tensor:
    """Latents float32 [rows, N, C] forecast from baselines of ``b`` over ``elapsed_years``; the noise of a row depends on its seed and
    ``draw`` alone."""
    space, device = generator.space, generator.device
    source = space.standardize(b.tensors["baseline"][rows].to(device))
    read = source
    if generator.history > 1:
        earlier, years = (b.tensors[k][rows].to(device) for k in ("earlier", "earlier_years"))
        read = with_history(source, space.standardize(earlier), years)
    noise = randn_like_samples(b.seeds[rows] + draw, tuple(source.shape[1:])).to(device)
    gate_B = elapsed_gate(elapsed_years.nan_to_num(0).to(device), generator.gate_years)
    velocity = gated(generator.model, gate_B)
    start = start_from(source, noise, generator.start_noise, gate_B)
    return integrate(lambda x, t: velocity(x, t, cond_BV, read), start, steps, shift=generator.shift)


def predict(
    generator: Generator, b: Batch, predictors: Mapping[str, Predictor], steps: int, draws: int
) -> dict[str, Tensor]:
    """Decoded volumes float32 [B, X, Y, Z] on the CPU: ``target``, ``ours``, ``one_draw``, ``no_change`` and each predictor's."""
    space, device = generator.space, generator.device
    elapsed = b.tensors["elapsed_years"]
    source, target = (space.standardize(b.tensors[k].to(device)) for k in ("baseline", "target"))
    cond_BV = generator.variables.encode(with_elapsed(b.variables, elapsed)).to(device)
    ages = [baseline_age_years(v, float(e)) for v, e in zip(b.variables, elapsed, strict=True)]
    modality = tuple(str(v.get("modality")) for v in b.variables)
    pairs = Pairs(
        source.cpu().numpy(), target.cpu().numpy(), elapsed.nan_to_num(0).double().numpy(), np.array(ages), modality
    )
    latents = {"target": target, "no_change": source}
    latents |= {name: torch.from_numpy(call(pairs)).to(device) for name, call in predictors.items()}
    made = {name: space.decode(z).cpu() for name, z in latents.items()}
    everyone = list(range(len(b)))
    drawn = [space.decode(solve(generator, b, everyone, cond_BV, elapsed, steps, d)).cpu() for d in range(draws)]
    return {**made, "ours": torch.stack(drawn).mean(dim=0), "one_draw": drawn[0]}


def compare(volumes: Tensor, target: Tensor, generator: Generator, b: Batch) -> dict[str, list[float]]:
    """FIGURES of each volume against its target."""
    ml = [
        [measure(v.numpy(), generator.grid, str(about.get("modality"))).ventricle_ml for v in pair]
        for *pair, about in zip(volumes, target, b.variables, strict=True)
    ]
    return {
        "mae": metrics.brain_mae(volumes, target).tolist(),
        "psnr_db": metrics.psnr_db(volumes, target).tolist(),
        "ssim": metrics.ssim(volumes, target).tolist(),
        "ventricle_error_ml": [abs(made - true) for made, true in ml],
    }


def row_of(b: Batch, i: int, elapsed: float, figures: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """One line of pairs.csv; figures of our forecast have no prefix."""
    about = {"key": b.keys[i], "subject": subject_of(b.keys[i]), "modality": str(b.variables[i].get("modality"))}
    values = {
        name if method == "ours" else f"{method}_{name}": float(v[i])
        for method, part in figures.items()
        for name, v in part.items()
    }
    return {
        **about,
        "elapsed_years": elapsed,
        **values,
        "psnr_gain_db": values["psnr_db"] - values["no_change_psnr_db"],
    }


def column(rows: Sequence[Mapping[str, Any]], method: str, figure: str) -> np.ndarray:
    return np.array([row[figure if method == "ours" else f"{method}_{figure}"] for row in rows], np.float64)


def curve_years(generator: Generator) -> list[float]:
    """Those of CURVE_YEARS that the run's table allows."""
    low, high = generator.variables.table["elapsed_years"].bounds
    return [y for y in CURVE_YEARS if low <= y <= high]


def growth(
    generator: Generator, b: Batch, use: Sequence[int], baseline: Tensor, years: Sequence[float], steps: int
) -> list[dict[str, Any]]:
    """Ventricle volume forecast for each of ``years`` from the baselines ``use`` of a batch, the same noise every time.

    The age moves along with the years; where it would leave the table's range the baseline is left out.
    """
    age = generator.variables.table.get("age_years")
    start_age = {i: baseline_age_years(b.variables[i], float(b.tensors["elapsed_years"][i])) for i in use}
    kept = [
        i
        for i in use
        if age is None
        or np.isnan(start_age[i])
        or (age.bounds[0] <= start_age[i] and start_age[i] + max(years) <= age.bounds[1])
    ]
    if not kept:
        return []
    found = []
    for y in years:
        conditions = [
            {**b.variables[i], "elapsed_years": y, "age_years": None if np.isnan(start_age[i]) else start_age[i] + y}
            for i in kept
        ]
        cond_BV = generator.variables.encode(conditions).to(generator.device)
        made = generator.space.decode(solve(generator, b, kept, cond_BV, torch.full((len(kept),), y), steps)).cpu()
        for i, volume in zip(kept, made, strict=True):
            modality = str(b.variables[i].get("modality"))
            before, after = (measure(v.numpy(), generator.grid, modality) for v in (baseline[i], volume))
            found.append(
                {
                    "key": b.keys[i],
                    "subject": subject_of(b.keys[i]),
                    "elapsed_years": y,
                    "ventricle_ml": after.ventricle_ml,
                    "change_ml": after.ventricle_ml - before.ventricle_ml,
                }
            )
    return found


def growth_figures(curves: Sequence[Mapping[str, Any]], years: Sequence[float]) -> dict[str, Any]:
    """Change of ventricle volume by years, its size at 0 (where nothing should change), and the share of baselines whose
    ventricles grow from each of ``years`` to the next; all with intervals over subjects."""
    keys = list(dict.fromkeys(row["key"] for row in curves))
    if not keys:
        return {"left_out": "no baseline whose age stays in the table's range"}
    change_KY = np.array([[r["change_ml"] for r in curves if r["key"] == key] for key in keys])
    subjects = [subject_of(key) for key in keys]
    result: dict[str, Any] = {
        "years": list(years),
        "change_ml": {f"{y:g}": asdict(intervals.mean(change_KY[:, j], subjects)) for j, y in enumerate(years)},
    }
    if len(years) > 1:
        grows = (np.diff(change_KY, axis=1) > 0).all(axis=1)
        result["monotone_share"] = asdict(intervals.mean(grows.astype(float), subjects))
    if years[0] == 0:
        result["absolute_change_at_0_ml"] = asdict(intervals.mean(np.abs(change_KY[:, 0]), subjects))
    return result
