"""The same brain under other conditions: drawn from one noise, or a real scan taken back to its noise and made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g3n.config import G3nError, did_you_mean
from g3n.evaluate import intervals
from g3n.evaluate.anatomy import measure
from g3n.evaluate.metrics import brain_mse, psnr_db
from g3n.evaluate.montage import write_difference_montage
from g3n.evaluate.report import write_json
from g3n.flow import Sampler, Velocity, guided, integrate, invert
from g3n.generate import Generator, encode_scan, sample
from g3n.meters import progress_bar
from g3n.models.conditioning import VariableSet
from g3n.nifti import read_volume, write_volume
from g3n.outputs import BRAIN_MEAN, BRAIN_STD, about, read_scan, resume, to_intensity

SHOWN_SEEDS, SHOWN_VALUES = 8, 5
MEASURED = ("ventricle_ml", "brain_ml")


@dataclasses.dataclass(frozen=True)
class Varied:
    """One variable and the values it takes, at least one; numbers as float, levels as they are called."""

    name: str
    values: tuple[float | str, ...]


def read_varied(text: str, variables: VariableSet) -> Varied:
    """``age_years=30,50,70`` as ``Varied``. Raises G3nError for another form, an unknown variable or an impossible value."""
    name, _, rest = text.partition("=")
    words = [word.strip() for word in rest.split(",")]
    if not name or not all(words):
        raise G3nError(f"--vary '{text}' is not name=value,value, for example --vary age_years=30,50,70")
    if name not in variables.names:
        raise G3nError(f"unknown variable '{name}'{did_you_mean(name, variables.names)}")
    for word in words:
        variables.check({name: word})
    values: tuple[float | str, ...] = tuple(words if variables.table[name].levels else map(float, words))
    if len(set(values)) < len(values):
        raise G3nError(f"--vary '{text}' gives a value twice; leave out one")
    return Varied(name, values)


def write_counterfactuals(
    generator: Generator,
    conditions: Mapping[str, Any],
    varied: Varied,
    output: Path,
    seeds: int = 1,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> dict[str, Any]:
    """For each of ``seeds`` noises a ``volume-<n>.nii.gz`` for each value, and a ``difference-<n>.nii.gz`` of each but the
    first against the first: signed, in the volumes' intensities. All on the atlas grid, with ``montage.png`` (a row a seed)
    and ``counterfactual.json``, which is returned.

    Raises G3nError before anything is written.
    """
    if len(varied.values) < 2:
        raise G3nError(f"--vary {varied.name} has one value; give at least two, the first to compare with")
    if conditions.get(varied.name) is not None:
        raise G3nError(f"variable '{varied.name}' is varied and also given; leave out one")
    rows = [{**conditions, varied.name: value} for value in varied.values] * seeds
    for row in rows:
        generator.variables.check(row)
    recipe = about(
        generator, conditions=dict(conditions), varied=varied.name, values=list(varied.values), seeds=seeds, seed=seed,
        steps=steps, guidance=guidance, sampler=sampler,
    )  # fmt: skip
    records = {record["file"]: record for record in resume(output, recipe)}
    plan: list[dict[str, Any]] = [
        {"file": f"volume-{i:05d}.nii.gz", "conditions": row, "seed": seed + i // len(varied.values)}
        for i, row in enumerate(rows)
    ]
    todo = [record for record in plan if record["file"] not in records]
    made = sample(
        generator, [r["conditions"] for r in todo], [r["seed"] for r in todo], steps, guidance, sampler, batch
    )
    volumes = (to_intensity(z_XYZ) for z_XYZ in made)
    done = _write_volumes(generator, output, plan, records, todo, volumes)
    labels = [_text(value) for value in varied.values]
    return _write_comparison(generator, output, recipe, varied.name, done, labels, BRAIN_MEAN, BRAIN_STD)


def write_edits(
    generator: Generator,
    baseline: Path,
    variables: Mapping[str, Any],
    varied: Varied,
    output: Path,
    steps: int = 50,
    guidance: float = 1.0,
    batch: int = 8,
    center: bool = False,
) -> dict[str, Any]:
    """A real scan under other conditions, as ``write_counterfactuals`` writes it, in the scan's intensities.

    The scan's latent is taken back along the flow under its own ``variables``, without guidance, to the noise it would have
    come from, and made again from there (as DDIM inversion does, Song 2021, arXiv 2010.02502). ``volume-00000`` is made under
    its own variables: what the differences are taken against. ``scan.nii.gz`` is the scan on the atlas grid,
    ``tokenizer.nii.gz`` its latent decoded without going anywhere, and ``reconstruction`` in the JSON says how far
    ``volume-00000`` is from that: over the brain, ``rms_z`` in standard deviations and ``psnr_db`` (null: identical).

    The solver is Heun's, whose steps ``g3n.flow.invert`` undoes, in float32. Raises G3nError before anything is written.
    """
    own = variables.get(varied.name)
    if own is None:
        raise G3nError(f"an edit of '{varied.name}' starts from the scan's own; give it, as --set {varied.name}=...")
    rows = [dict(variables), *({**variables, varied.name: value} for value in varied.values)]
    for row in rows:
        generator.variables.check(row)
    scan = read_scan(baseline, generator.grid, center)
    recipe = about(
        generator, baseline_sha256=scan.sha256, variables=dict(variables), varied=varied.name,
        values=list(varied.values), steps=steps, guidance=guidance, center=center,
    )  # fmt: skip
    records = {record["file"]: record for record in resume(output, recipe)}
    plan: list[dict[str, Any]] = [{"file": f"volume-{i:05d}.nii.gz", "conditions": row} for i, row in enumerate(rows)]
    todo = [record for record in plan if record["file"] not in records]
    latent_1NC = encode_scan(generator.space, scan.volume)
    plain = to_intensity(generator.space.decode(latent_1NC)[0].cpu().numpy(), scan.mean, scan.std)
    write_volume(output / "scan.nii.gz", scan.volume, generator.grid.matrix)
    write_volume(output / "tokenizer.nii.gz", plain, generator.grid.matrix)
    made = _edited(generator, latent_1NC, variables, [r["conditions"] for r in todo], steps, guidance, batch)
    volumes = (to_intensity(z_XYZ, scan.mean, scan.std) for z_XYZ in made)
    done = _write_volumes(generator, output, plan, records, todo, volumes)
    first, truth = (torch.from_numpy(v)[None] for v in (read_volume(output / plan[0]["file"])[0], plain))
    error = {
        "rms_z": float(brain_mse(first, truth).sqrt()) / scan.std,
        "psnr_db": float(psnr_db(first, truth)),
    }
    labels = [f"own {_text(own)}", *map(_text, varied.values)]
    told = {**recipe, "reconstruction": error}
    return _write_comparison(generator, output, told, varied.name, done, labels, scan.mean, scan.std)


@torch.no_grad()
def _edited(
    generator: Generator,
    latent_1NC: Tensor,
    own: Mapping[str, Any],
    conditions: Sequence[Mapping[str, Any]],
    steps: int,
    guidance: float,
    batch: int,
) -> Iterator[np.ndarray]:
    """The latent made again under each of ``conditions``: z-scored float32 [X, Y, Z], in order."""
    if not conditions:
        return

    def velocity(cond_BV: Tensor) -> Velocity:
        return lambda x_BNC, t_B: generator.model(x_BNC, t_B, cond_BV)

    noise_1NC = invert(velocity(generator.variables.encode([own]).to(generator.device)), latent_1NC, steps)
    for i in range(0, len(conditions), batch):
        cond_BV = generator.variables.encode(conditions[i : i + batch]).to(generator.device)
        v = guided(velocity(cond_BV), velocity(torch.full_like(cond_BV, torch.nan)), guidance)
        latents = integrate(v, noise_1NC.expand(len(cond_BV), -1, -1), steps, "heun")
        yield from generator.space.decode(latents).cpu().numpy()


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _write_volumes(
    generator: Generator,
    output: Path,
    plan: Sequence[dict[str, Any]],
    records: dict[str, dict[str, Any]],
    todo: Sequence[dict[str, Any]],
    volumes: Iterator[np.ndarray],
) -> list[dict[str, Any]]:
    """Measure and write ``volumes``, those of ``todo``; the records of all of ``plan``."""
    with progress_bar() as progress:
        bar = progress.add_task("counterfactual", total=len(plan), completed=len(plan) - len(todo))
        for record, volume in zip(todo, volumes, strict=True):
            modality = record["conditions"].get("modality")
            if modality is not None:
                anatomy = measure(volume, generator.grid, str(modality))
                record |= {name: round(getattr(anatomy, name), 3) for name in MEASURED}
            write_volume(output / record["file"], volume, generator.grid.matrix)
            write_json(output / record["file"].replace(".nii.gz", ".json"), record)
            records[record["file"]] = record
            progress.advance(bar)
    return [records[record["file"]] for record in plan]


def _write_comparison(
    generator: Generator,
    output: Path,
    recipe: Mapping[str, Any],
    varied: str,
    records: list[dict[str, Any]],
    labels: Sequence[str],
    mean: float,
    std: float,
) -> dict[str, Any]:
    """Differences, montage and JSON of records that stand seed by seed, each in the order of ``labels``."""
    shown: list[list[np.ndarray]] = []
    for s in range(0, len(records), len(labels)):
        group = records[s : s + len(labels)]
        first = read_volume(output / group[0]["file"])[0]
        row = []
        for i, record in enumerate(group):
            volume = read_volume(output / record["file"])[0]
            if i:
                record["difference"] = record["file"].replace("volume", "difference")
                write_volume(output / record["difference"], volume - first, generator.grid.matrix)
            if len(shown) < SHOWN_SEEDS and i < SHOWN_VALUES:
                row.append(np.where(volume == 0, 0, (volume - mean) / std))
        if row:
            shown.append(row)
    by_value: dict[str, Any] = {}
    for i, label in enumerate(labels):
        of_value = records[i :: len(labels)]
        by_value[label] = {
            name: dataclasses.asdict(intervals.mean([record[name] for record in of_value]))
            for name in MEASURED
            if all(name in record for record in of_value)
        }
    result = {**recipe, "by_value": by_value, "volumes": records}
    write_json(output / "counterfactual.json", result)
    write_difference_montage(output / "montage.png", shown, list(labels[:SHOWN_VALUES]), varied)
    return result
