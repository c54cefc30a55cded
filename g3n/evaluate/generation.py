"""Does the generator obey? Anatomy and latents of generated volumes against the variables that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate.anatomy import lesion_present, measure
from g3n.evaluate.effects import effects, plan
from g3n.evaluate.guidance import choose, train_ventricles
from g3n.evaluate.montage import write_montage
from g3n.evaluate.probes import (
    Pooled,
    agreement,
    conditions_of,
    fit_probe,
    pool,
    probe_figures,
    read_pooled,
)
from g3n.evaluate.report import means, print_means, write_csv, write_json
from g3n.evaluate.utility import MOST_SCANS, rare_group, train_on_synthetic
from g3n.flow import Sampler
from g3n.generate import Generator, open_latents, sample_latents
from g3n.meters import progress_bar
from g3n.stream.index import ShardIndex

COLUMNS = ("ventricle_ml", "brain_ml", "lesion_ml")
MOST_PROBED = 256  # held-out scans whose variables are generated again
NO_LATENTS = "needs --latents"


@dataclass(frozen=True)
class Maker:
    """A generator with the settings of one evaluation and its progress bars."""

    generator: Generator
    steps: int
    sampler: Sampler
    batch: int
    progress: Progress
    interval: tuple[float, float] = (0.0, 1.0)
    shift: float | None = None

    def latents(
        self, conditions: Sequence[Mapping[str, Any]], seeds: Sequence[int], guidance: float, what: str
    ) -> Iterator[Tensor]:
        """float32 [B, N, C] a batch."""
        bar = self.progress.add_task(what, total=len(conditions))
        for z in sample_latents(
            self.generator, conditions, seeds, self.steps, guidance, self.sampler, self.batch, self.interval, self.shift
        ):
            yield z
            self.progress.advance(bar, len(z))

    def pooled(
        self, variables: Sequence[Mapping[str, Any]], subjects: Sequence[str], seed: int, guidance: float, what: str
    ) -> Pooled:
        """A made-up scan for each of the ``variables``, with a noise of its own."""
        asked = conditions_of(self.generator, variables)
        seeds = [seed + i for i in range(len(asked))]
        parts = [pool(z) for z in self.latents(asked, seeds, guidance, what)]
        return Pooled(np.concatenate(parts), tuple(asked), tuple(subjects))

    def ventricles_ml(
        self, conditions: Sequence[Mapping[str, Any]], seeds: Sequence[int], guidance: float
    ) -> list[float]:
        volumes = (
            v for z in self.latents(conditions, seeds, guidance, f"guidance {guidance:g}") for v in decode(self, z)
        )
        return [
            measure(v, self.generator.grid, str(c["modality"])).ventricle_ml
            for c, v in zip(conditions, volumes, strict=True)
        ]


def decode(maker: Maker, latent_BNC: Tensor) -> np.ndarray:
    """float32 [B, X, Y, Z]."""
    return maker.generator.space.decode(latent_BNC).cpu().numpy()


def evaluate_generation(
    generator: Generator,
    ages: Sequence[float],
    output: Path,
    fixed: Mapping[str, Any],
    count: int = 8,
    seed: int = 0,
    steps: int = 25,
    guidance: float | Literal["auto"] = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
    latents: str | None = None,
    split: str = "val",
    utility: bool = False,
) -> dict[str, Any]:
    """Write ``metrics.json``, ``volumes.csv`` and ``generation.png`` to ``output`` and return the metrics.

    ``count`` volumes for each value of each variable, from the same noises, under the ``fixed`` variables (which need a
    modality), are measured by ``g3n.evaluate.anatomy`` (``effects``). ``latents``, the run's, give probes trained on the
    train split and tested on ``split`` (``probes``), with ``utility`` what generated latents are good for as training data,
    and ``guidance`` 'auto', chosen on the train split alone. A part that the run or the latents do not allow is named in
    ``left_out``. ``interval`` and ``shift`` as in ``g3n.generate.sample``. Raises G3nError for impossible conditions before anything is computed.
    """
    if fixed.get("modality") is None or count < 1 or len(set(ages)) < 2:
        raise G3nError(f"give a modality, at least 2 ages and a count >= 1, not {dict(fixed)}, {list(ages)}, {count}")
    if latents is None and (utility or guidance == "auto"):
        raise G3nError("utility and guidance auto need the run's latents; give --latents")
    sweeps, left_out = plan(generator.variables, ages, fixed)
    if latents is None:
        sweeps.pop("modality", None)  # only a probe recognizes it
    for conditions in sweeps.values():
        for condition in conditions:
            generator.variables.check(condition)
    index = None if latents is None else open_latents(generator, latents)
    extra: dict[str, Any] = {}
    with progress_bar() as progress:
        maker = Maker(generator, steps, sampler, batch, progress, interval, shift)
        if guidance == "auto":
            assert index is not None
            train = train_ventricles(index, generator, fixed, batch, progress)
            strength, extra["guidance_choice"] = choose(maker.ventricles_ml, fixed, train, seed)
        else:
            strength = float(guidance)
        rows, pooled, pictures = run_sweeps(maker, sweeps, count, seed, strength)
        found = effects(rows, generator.variables, str(fixed["modality"]))
        if index is None:
            left_out |= {"modality": NO_LATENTS, "probes": NO_LATENTS}
        else:
            more, why = with_latents(maker, index, split, seed, strength, rows.get("modality", []), pooled, utility)
            found |= more.pop("effects")
            extra |= more
            left_out |= why
    result = {
        "run": str(generator.run.path),
        "conditions": dict(fixed),
        "count": count,
        "seed": seed,
        "steps": steps,
        "guidance": strength,
        "guidance_interval": list(interval),
        "sampler": sampler,
        "shift": generator.shift if shift is None else shift,
        **by_age(rows["age_years"], ages),
        "effects": found,
        **extra,
        "left_out": left_out,
    }
    every = [{"sweep": name, **row} for name, part in rows.items() for row in part]
    write_csv(output / "volumes.csv", every)
    write_montage(output / "generation.png", pictures)
    write_json(output / "metrics.json", result)
    report(rows["age_years"], ages, fixed, left_out)
    return result


@torch.no_grad()
def run_sweeps(
    maker: Maker, sweeps: Mapping[str, Sequence[Mapping[str, Any]]], count: int, seed: int, guidance: float
) -> tuple[dict[str, list[dict[str, Any]]], np.ndarray, list[tuple[str, np.ndarray]]]:
    """(rows of each sweep: the conditions, seed and anatomy of each volume; pooled latents of the sweep of modalities
    [rows, C]; the first volume of each age)."""
    rows: dict[str, list[dict[str, Any]]] = {}
    pooled: list[np.ndarray] = []
    pictures: list[tuple[str, np.ndarray]] = []
    columns = list(dict.fromkeys(name for part in sweeps.values() for c in part for name in c))
    for sweep, values in sweeps.items():
        asked = [value for value in values for _ in range(count)]
        seeds = [seed + i for _ in values for i in range(count)]
        rows[sweep] = []
        for z in maker.latents(asked, seeds, guidance, f"generate by {sweep.removesuffix('_years')}"):
            if sweep == "modality":
                pooled.append(pool(z))
            for volume in decode(maker, z):
                k = len(rows[sweep])
                modality = str(asked[k]["modality"])
                anatomy = measure(volume, maker.generator.grid, modality)
                measured = {name: getattr(anatomy, name) for name in COLUMNS}
                measured["lesion_present"] = int(lesion_present(anatomy, modality))
                rows[sweep].append({**{c: asked[k].get(c) for c in columns}, "seed": seeds[k], **measured})
                if sweep == "age_years" and k % count == 0:
                    pictures.append((f"{asked[k]['age_years']:g} years", volume))
    return rows, np.concatenate(pooled) if pooled else np.zeros((0, 0)), pictures


def with_latents(
    maker: Maker,
    index: ShardIndex,
    split: str,
    seed: int,
    guidance: float,
    modality_rows: Sequence[Mapping[str, Any]],
    modality_PC: np.ndarray,
    utility: bool,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What only real latents can tell: {effects: {modality}, probes, utility}, and what is left out."""
    generator, left_out = maker.generator, {}
    train, held_out = (read_pooled(index, generator, part, maker.batch, maker.progress) for part in ("train", split))
    found: dict[str, Any] = {"effects": {}}
    probe = fit_probe(train, "modality")
    if modality_rows and probe is not None:
        made = Pooled(modality_PC, tuple(modality_rows), tuple(str(row["seed"]) for row in modality_rows))
        found["effects"]["modality"] = {
            "generated": agreement(probe, made, "modality"),
            "real": agreement(probe, held_out, "modality"),
        }
    else:
        left_out["modality"] = "the run's table or the latents have fewer than two modalities"
    few = held_out.pick(range(min(len(held_out), MOST_PROBED)))
    made = maker.pooled(few.variables, few.subjects, seed, guidance, f"generate like {split}")
    found["probes"], why = probe_figures(train, held_out, made)
    left_out |= {f"probes of {name}": reason for name, reason in why.items()}
    if utility:
        some = train.pick(range(min(len(train), MOST_SCANS)))
        made = maker.pooled(some.variables, some.subjects, seed + len(few), guidance, "generate like train")
        start = seed + len(few) + len(some)
        found["utility"] = {
            "train_scans": len(some),
            "train_on_synthetic": train_on_synthetic(some, made, held_out),
            "rare_group": rare_group(
                some, held_out, lambda v, who: maker.pooled(v, who, start, guidance, "generate the rare group")
            ),
        }
    return found, left_out


def by_age(rows: Sequence[Mapping[str, Any]], ages: Sequence[float]) -> dict[str, Any]:
    """Means and spread of ventricle volume by age, the ratio of oldest and youngest, and r."""
    of = {float(age): [r["ventricle_ml"] for r in rows if r["age_years"] == age] for age in ages}
    first, last = np.mean(of[min(of)]), np.mean(of[max(of)])
    return {
        "ventricle_ml_by_age": {f"{age:g}": float(np.mean(ml)) for age, ml in of.items()},
        "ventricle_ml_sd_by_age": {f"{age:g}": float(np.std(ml)) for age, ml in of.items()},
        "ventricle_ratio": float(last / first) if first > 0 else float("nan"),
        "age_r": float(np.corrcoef([r["age_years"] for r in rows], [r["ventricle_ml"] for r in rows])[0, 1]),
    }


def report(
    rows: Sequence[Mapping[str, Any]], ages: Sequence[float], fixed: Mapping[str, Any], left_out: Mapping[str, str]
) -> None:
    parts = {age: [row for row in rows if row["age_years"] == age] for age in map(float, ages)}
    table = {f"{age:g} years": {"n": len(part), **means(part, COLUMNS)} for age, part in parts.items()}
    print_means(f"generated volumes, {' '.join(str(v) for v in fixed.values())}", table)
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
