"""The strength of guidance whose generated anatomy moves with age as that of the training subjects does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from g3n.config import G3nError
from g3n.evaluate import intervals
from g3n.evaluate.anatomy import measure
from g3n.evaluate.effects import slope
from g3n.generate import Generator
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import subject_of

CANDIDATES = (1.0, 1.5, 2.0, 3.0, 5.0)
LEAST_SCANS, MOST_SCANS = 8, 256
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 8


@torch.no_grad()
def train_ventricles(
    index: ShardIndex, generator: Generator, fixed: Mapping[str, Any], batch: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(ages, ventricles in mL, subjects) of decoded real latents of the train split that have the ``fixed`` values.

    At most ``MOST_SCANS``. Raises G3nError for fewer than ``LEAST_SCANS`` or a single age.
    """
    ages: list[float] = []
    found: list[float] = []
    subjects: list[str] = []
    bar = progress.add_task("ventricles of train scans", total=MOST_SCANS)
    for b in eval_batches(index, None, "latent", "train", batch, rank=0, world=1, seed=0):
        for i, v in enumerate(b.variables):
            fits = all(str(v.get(name)) == str(value) or _equal(v.get(name), value) for name, value in fixed.items())
            if b.weights[i] == 0 or not fits or v.get("age_years") is None or len(ages) == MOST_SCANS:
                continue
            latent = generator.space.standardize(b.tensors["latent"][i : i + 1].to(generator.device))
            volume = generator.space.decode(latent)[0].cpu().numpy()
            ages.append(float(v["age_years"]))
            found.append(measure(volume, generator.grid, str(v.get("modality"))).ventricle_ml)
            subjects.append(subject_of(b.keys[i]))
            progress.advance(bar)
    if len(ages) < LEAST_SCANS or len(set(ages)) < 2:
        raise G3nError(
            f"latents '{index.url}' have {len(ages)} training scans of {dict(fixed)} with an age, guidance auto needs "
            f"{LEAST_SCANS} of several ages; give --guidance a number"
        )
    return np.array(ages), np.array(found), subjects


def _equal(a: Any, b: Any) -> bool:
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and abs(a - b) < 1e-6


def choose(
    ventricles_ml: Callable[[Sequence[Mapping[str, Any]], Sequence[int], float], Sequence[float]],
    fixed: Mapping[str, Any],
    train: tuple[np.ndarray, np.ndarray, list[str]],
    seed: int,
) -> tuple[float, dict[str, Any]]:
    """(the guidance of CANDIDATES whose slope of ventricles over age is nearest the train subjects', what was compared).

    ``ventricles_ml(conditions, seeds, guidance)`` generates and measures. Ages are quantiles of the train scans', the noises
    the same at each age and guidance, so that they cancel. Of two equally near the weaker is taken.
    """
    ages, real_ml, subjects = train
    real = intervals.bootstrap(slope, ages, real_ml, subjects=subjects)
    asked = [float(age) for age in np.quantile(ages, QUANTILES) for _ in range(NOISES)]
    seeds = [seed + i for _ in QUANTILES for i in range(NOISES)]
    conditions = [{**fixed, "age_years": age} for age in asked]
    slopes = {g: slope(np.array(asked), np.asarray(ventricles_ml(conditions, seeds, g))) for g in CANDIDATES}
    chosen = min(CANDIDATES, key=lambda g: (abs(slopes[g] - real.value), g))
    compared = {"train_scans": len(ages), "train_slope_ml_a_year": asdict(real)}
    return chosen, {**compared, "slope_ml_a_year": {f"{g:g}": value for g, value in slopes.items()}, "chosen": chosen}
