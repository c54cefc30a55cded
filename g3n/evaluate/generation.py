"""Does the generator obey? Anatomy of generated volumes against the age that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from g3n.config import G3nError
from g3n.evaluate.anatomy import measure
from g3n.evaluate.montage import write_montage
from g3n.evaluate.report import means, print_means, write_csv, write_json
from g3n.flow import Sampler
from g3n.generate import Generator, sample
from g3n.meters import progress_bar

COLUMNS = ("ventricle_ml", "brain_ml")


def evaluate_generation(
    generator: Generator,
    ages: Sequence[float],
    output: Path,
    fixed: Mapping[str, Any],
    count: int = 8,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``volumes.csv`` and ``generation.png`` to ``output`` and return the metrics.

    ``count`` volumes an age, the same noises at each age, under the ``fixed`` variables (which need a modality). Volumes
    are measured by ``g3n.evaluate.anatomy``; ``interval`` and ``shift`` as in ``g3n.generate.sample``.
    Raises G3nError for impossible conditions before anything is computed.
    """
    if fixed.get("modality") is None or count < 1 or len(ages) < 2:
        raise G3nError(f"give a modality, at least 2 ages and a count >= 1, not {fixed}, {list(ages)}, {count}")
    conditions = [{**fixed, "age_years": float(age)} for age in ages for _ in range(count)]
    seeds = [seed + i for _ in ages for i in range(count)]
    rows: list[dict[str, Any]] = []
    pictures: dict[float, np.ndarray] = {}
    with progress_bar() as progress:
        bar = progress.add_task("generate", total=len(conditions))
        volumes = sample(generator, conditions, seeds, steps, guidance, sampler, batch, interval, shift)
        for condition, s, volume in zip(conditions, seeds, volumes, strict=True):
            anatomy = measure(volume, generator.grid, str(fixed["modality"]))
            age = condition["age_years"]
            rows.append(
                {"age_years": age, "seed": s, "ventricle_ml": anatomy.ventricle_ml, "brain_ml": anatomy.brain_ml}
            )
            pictures.setdefault(age, volume)
            progress.advance(bar)
    by_age = {age: [row for row in rows if row["age_years"] == age] for age in map(float, ages)}
    ventricles = {f"{age:g}": means(part, COLUMNS)["ventricle_ml"] for age, part in by_age.items()}
    first, last = ventricles[f"{min(ages):g}"], ventricles[f"{max(ages):g}"]
    result = {
        "run": str(generator.run.path),
        "conditions": dict(fixed),
        "count": count,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": list(interval),
        "sampler": sampler,
        "shift": generator.shift if shift is None else shift,
        "ventricle_ml_by_age": ventricles,
        "ventricle_ml_sd_by_age": {
            f"{age:g}": float(np.std([row["ventricle_ml"] for row in part])) for age, part in by_age.items()
        },
        "ventricle_ratio": last / first if first > 0 else float("nan"),
        "age_r": float(np.corrcoef([r["age_years"] for r in rows], [r["ventricle_ml"] for r in rows])[0, 1]),
    }
    write_csv(output / "volumes.csv", rows)
    write_montage(output / "generation.png", [(f"{age:g} years", volume) for age, volume in pictures.items()])
    write_json(output / "metrics.json", result)
    table = {f"{age:g} years": {"n": len(part), **means(part, COLUMNS)} for age, part in by_age.items()}
    print_means(f"generated volumes, {' '.join(str(v) for v in fixed.values())}", table)
    return result
