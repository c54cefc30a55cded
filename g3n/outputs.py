"""Generated volumes on disk: NIfTI, a montage, and a JSON that says how they were made. A run that was stopped goes on."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from g3n.config import G3nError, did_you_mean
from g3n.evaluate.anatomy import measure
from g3n.evaluate.montage import write_montage
from g3n.evaluate.report import claim, write_json
from g3n.flow import Sampler
from g3n.generate import Generator, forecast, sample
from g3n.meters import progress_bar
from g3n.models.conditioning import VariableSet
from g3n.nifti import Grid, place_on_atlas, read_volume, resample, to_grid, write_volume

BRAIN_MEAN, BRAIN_STD = 500.0, 100.0  # intensities of a generated volume: 500 + 100 z in the brain, background 0
SHOWN = 8
MAX_SWEPT = 1000
MAX_CSV_ROWS = 1_000_000


def read_conditions(path: Path, variables: VariableSet) -> list[dict[str, Any]]:
    """Rows of a CSV whose columns are variables; empty or ``n/a`` is null.

    Raises G3nError, with the line, for an unknown column or an impossible value.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for name in reader.fieldnames or ():
                if name not in variables.names:
                    raise G3nError(f"'{path}' has the column '{name}'{did_you_mean(name, variables.names)}")
            rows: list[dict[str, Any]] = []
            for line, row in enumerate(reader, 2):
                if None in row or len(rows) >= MAX_CSV_ROWS:
                    raise G3nError(f"'{path}' line {line} has too many cells, or the file too many lines")
                rows.append({k: v for k, v in row.items() if v not in (None, "", "n/a")})
                try:
                    variables.check(rows[-1])
                except G3nError as error:
                    raise G3nError(f"'{path}' line {line}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise G3nError(f"conditions '{path}' cannot be read ({error}); expected a CSV with a header line") from error
    if not rows:
        raise G3nError(f"'{path}' has no rows; give one a volume")
    return rows


def read_sweep(text: str) -> tuple[str, list[Any]]:
    """``age_years=20:90:10`` (start:stop:step, both ends included) or ``diagnosis=HC,AD`` -> (variable, values in order).

    ``n/a`` among listed values is null. Whether a variable may have a value is for ``VariableSet.check`` to say. Raises G3nError.
    """
    name, equals, given = text.partition("=")
    words = [word.strip() for word in given.split(",")]
    if not equals or not name or not all(words):
        raise G3nError(f"--sweep '{text}' is not name=start:stop:step or name=value,value")
    if ":" not in given:
        return name, [None if word == "n/a" else word for word in words]
    try:
        start, stop, step = (float(word) for word in given.split(":"))
    except ValueError:
        raise G3nError(
            f"--sweep '{text}' is not name=start:stop:step of three numbers, such as age_years=20:90:10"
        ) from None
    if not (math.isfinite(start) and start <= stop < math.inf and 0 < step < math.inf):
        raise G3nError(f"--sweep '{text}' needs start <= stop and a step > 0, such as age_years=20:90:10")
    if (stop - start) / step >= MAX_SWEPT:
        raise G3nError(f"--sweep '{text}' has more than {MAX_SWEPT} values; give a larger step")
    last = math.floor((stop - start) / step + 1e-9)  # 0:0.3:0.1 ends at 0.3
    return name, [round(start + i * step, 9) for i in range(last + 1)]


def swept(rows: Sequence[Mapping[str, Any]], sweep: tuple[str, list[Any]], count: int) -> list[dict[str, Any]]:
    """Conditions: each row ``count`` times, and each of these under all values of the sweep one after the other.

    Raises G3nError where a row has the swept variable already.
    """
    name, values = sweep
    if any(name in row for row in rows):
        raise G3nError(f"variable '{name}' is given and swept; leave out one")
    return [{**row, name: value} for row in rows for _ in range(count) for value in values]


def to_intensity(z_XYZ: np.ndarray, mean: float = BRAIN_MEAN, std: float = BRAIN_STD) -> np.ndarray:
    """z-scores as positive intensities, background exactly 0: what ``data_prep`` and ``g3n forecast`` read."""
    floor = 1e-3 * std
    return np.where(z_XYZ == 0, 0, np.maximum(mean + std * z_XYZ, floor)).astype(np.float32)


def about(generator: Generator, **more: Any) -> dict[str, Any]:
    """What every JSON says of the model."""
    return {"run": str(generator.run.path), "step": generator.run.step, **more}


def resume(output: Path, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of volumes that an earlier call with the same recipe finished. Raises G3nError for another recipe's."""
    if not claim(output, recipe):
        return []
    done = [json.loads(file.read_text()) for file in sorted(output.glob("volume-*.json"))]
    return [record for record in done if (output / record["file"]).is_file()]


@dataclass(frozen=True)
class Scan:
    """A scan of the user's on a model's grid, and the way back. Its name is not kept: names of files may be names of people."""

    sha256: str  # of the file
    volume: np.ndarray  # float32 [X, Y, Z] intensities on the model's grid, background 0
    mean: float  # of the brain there
    std: float
    affine: np.ndarray  # the file's own
    native: Grid  # its voxels, in the world of the atlas: moved where the scan had to be centered


def read_scan(path: Path, grid: Grid, center: bool = False) -> Scan:
    """A NIfTI of any orientation and spacing on ``grid``. Raises G3nError for a damaged file or no brain there."""
    raw, affine = read_volume(path)
    placed = place_on_atlas(raw, affine, always=center)
    volume = to_grid(raw, placed, grid)
    brain = volume[volume != 0]
    if brain.size == 0 or float(brain.std()) == 0:
        raise G3nError(f"'{path}' has no brain on the atlas grid; is its affine right? try --center")
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    native = Grid(raw.shape, tuple(tuple(row) for row in placed.tolist()))
    return Scan(sha256, volume, float(brain.mean()), float(brain.std()), affine, native)


def write_native(path: Path, volume: np.ndarray, grid: Grid, scan: Scan) -> None:
    """``volume`` [X, Y, Z] >= 0 on ``grid`` at the scan's own voxels, with the scan's own affine, so that it overlays the
    file. Background stays exactly 0; what lies outside of ``grid`` is 0."""
    write_volume(path, to_grid(volume, grid.matrix, scan.native), scan.affine)


def _label(condition: Mapping[str, Any]) -> str:
    parts = ["n/a" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in condition.values()]
    return " ".join(parts)


def write_samples(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    output: Path,
    seed: int = 0,
    steps: int = 50,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float | None = None,
    alike: int = 1,
) -> list[dict[str, Any]]:
    """One ``volume-00000.nii.gz`` and ``.json`` a condition, ``samples.json`` and ``montage.png``; the records.

    Each ``alike`` conditions in a row, such as the values of a sweep, share a seed: volume i has seed + i // alike. The montage
    shows the first ``SHOWN`` or, of a longer sweep, those of the first seed (2 ``SHOWN`` of them at most, evenly taken).
    ``interval`` and ``shift`` as in ``g3n.generate.sample``. Raises G3nError before anything is written.
    """
    for condition in conditions:
        generator.variables.check(condition)
    seeds = [seed + i // alike for i in range(len(conditions))]
    recipe = about(
        generator, conditions=list(conditions), seed=seed, alike=alike, steps=steps, guidance=guidance,
        guidance_interval=list(interval), sampler=sampler, shift=generator.shift if shift is None else shift,
    )  # fmt: skip
    records = {record["file"]: record for record in resume(output, recipe)}
    names = [f"volume-{i:05d}.nii.gz" for i in range(len(conditions))]
    todo = [i for i, name in enumerate(names) if name not in records]
    volumes = sample(
        generator,
        [conditions[i] for i in todo],
        [seeds[i] for i in todo],
        steps,
        guidance,
        sampler,
        batch,
        interval,
        shift,
    )
    with progress_bar() as progress:
        bar = progress.add_task("sample", total=len(names), completed=len(names) - len(todo))
        for i, z_XYZ in zip(todo, volumes, strict=True):
            record = {"file": names[i], "conditions": dict(conditions[i]), "seed": seeds[i]}
            _write(generator, output, names[i], to_intensity(z_XYZ), record, conditions[i].get("modality"))
            records[names[i]] = record
            progress.advance(bar)
    made = [records[name] for name in names]
    intensities = f"{BRAIN_MEAN:g} + {BRAIN_STD:g} z in the brain, 0 outside"
    write_json(output / "samples.json", {**recipe, "intensities": intensities, "volumes": made})
    first = made[: max(SHOWN // alike, 1) * alike]
    columns = [first[round(i)] for i in np.linspace(0, len(first) - 1, min(len(first), 2 * SHOWN))]
    shown = [(_label(r["conditions"]), _back(output / r["file"], BRAIN_MEAN, BRAIN_STD)) for r in columns]
    write_montage(output / "montage.png", shown)
    return made


def _write(
    generator: Generator, output: Path, name: str, volume: np.ndarray, record: dict[str, Any], modality: Any
) -> None:
    if modality is not None:
        record["ventricle_ml"] = round(measure(volume, generator.grid, str(modality)).ventricle_ml, 2)
    write_volume(output / name, volume, generator.grid.matrix)
    write_json(output / name.replace(".nii.gz", ".json"), record)


def _back(path: Path, mean: float, std: float) -> np.ndarray:
    volume, _ = read_volume(path)
    return np.where(volume == 0, 0, (volume - mean) / std)


def write_forecasts(
    generator: Generator,
    baseline: Path,
    variables: Mapping[str, Any],
    target_ages: Sequence[float],
    output: Path,
    draws: int = 1,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 1.0,
    sampler: Sampler = "heun",
    batch: int = 8,
    center: bool = False,
    earlier: Sequence[tuple[Path, float]] = (),
) -> list[dict[str, Any]]:
    """``volume-<n>.nii.gz`` for each target age and draw on the atlas grid, ``baseline.nii.gz`` on the same grid,
    ``volume-<n>_native.nii.gz`` at the baseline's own voxels, ``forecast.json`` and ``montage.png``; the records.

    From two draws on also ``mean.nii.gz`` and ``spread.nii.gz`` over the draws (``mean-<target>.nii.gz`` where there are
    several target ages), each with its ``_native``. Intensities are those of the baseline, so the two can be subtracted.

    ``variables`` are the baseline's and need ``age_years``. ``earlier`` are scans before it, each with its age in years, for a
    forecaster that reads several. Raises G3nError before anything is written.
    """
    age = variables.get("age_years")
    if age is None:
        raise G3nError("a forecast needs the baseline's age; give --age")
    generator.variables.check(variables)
    for target in target_ages:
        if not target >= float(age):
            raise G3nError(f"target age {target:g} is before the baseline's age {float(age):g}; give a later one")
        generator.variables.check({"age_years": target, "elapsed_years": target - float(age)})
    if len(earlier) >= generator.history:
        raise G3nError(
            f"the forecaster reads at most {generator.history} scans (model.history), but {1 + len(earlier)} baselines are "
            f"given; leave out the oldest"
        )
    latest_first = sorted(earlier, key=lambda scan: -scan[1])
    scan = read_scan(baseline, generator.grid, center)
    before = [(read_scan(path, generator.grid, center), float(age) - years) for path, years in latest_first]
    past = {"earlier": [{"sha256": s.sha256, "years_before": years} for s, years in before]} if before else {}
    plan = [(target, draw) for target in target_ages for draw in range(draws)]
    recipe = about(
        generator, baseline_sha256=scan.sha256, variables=dict(variables), target_ages=list(target_ages), draws=draws,
        seed=seed, steps=steps, guidance=guidance, sampler=sampler, center=center, **past,
    )  # fmt: skip
    records = {record["file"]: record for record in resume(output, recipe)}
    names = [f"volume-{i:05d}.nii.gz" for i in range(len(plan))]
    todo = [i for i, name in enumerate(names) if name not in records]
    made = forecast(
        generator, scan.volume, variables, [{"age_years": plan[i][0]} for i in todo],
        [plan[i][0] - float(age) for i in todo], [seed + plan[i][1] for i in todo], steps, guidance, sampler, batch,
        [(s.volume, years) for s, years in before],
    )  # fmt: skip
    write_volume(output / "baseline.nii.gz", scan.volume, generator.grid.matrix)
    with progress_bar() as progress:
        bar = progress.add_task("forecast", total=len(names), completed=len(names) - len(todo))
        for i, z_XYZ in zip(todo, made, strict=True):
            volume = to_intensity(z_XYZ, scan.mean, scan.std)
            native = names[i].replace(".nii.gz", "_native.nii.gz")
            record: dict[str, Any] = {"file": names[i], "native": native, "target_age_years": plan[i][0]}
            record["seed"] = seed + plan[i][1]
            write_native(output / native, volume, generator.grid, scan)
            _write(generator, output, names[i], volume, record, variables.get("modality"))
            records[names[i]] = record
            progress.advance(bar)
    done = [records[name] for name in names]
    of_targets: list[dict[str, Any]] = []
    for i, target in enumerate(target_ages):
        of_target = done[i * draws : (i + 1) * draws]
        of_targets.append({"target_age_years": target, **_over_draws(of_target)})
        if draws > 1:
            suffix = "" if len(target_ages) == 1 else f"-{i:02d}"
            of_targets[-1] |= _write_mean_and_spread(generator, output, scan, of_target, suffix)
    write_json(output / "forecast.json", {**recipe, "targets": of_targets, "volumes": done})
    columns = [(f"baseline {float(age):g}", _back(output / "baseline.nii.gz", scan.mean, scan.std))]
    columns += [
        (f"{r['target_age_years']:g}", _back(output / r["file"], scan.mean, scan.std)) for r in done[: SHOWN - 1]
    ]
    write_montage(output / "montage.png", columns)
    return done


def _over_draws(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ventricle volume over the draws of one target: mean, and standard deviation from two draws on."""
    ml = [record["ventricle_ml"] for record in records if "ventricle_ml" in record]
    mean = {"ventricle_ml_mean": float(np.mean(ml))} if ml else {}
    return {**mean, "ventricle_ml_spread": float(np.std(ml, ddof=1))} if len(ml) > 1 else mean


def _write_mean_and_spread(
    generator: Generator, output: Path, scan: Scan, records: Sequence[Mapping[str, Any]], suffix: str
) -> dict[str, str]:
    """Voxel-wise mean and standard deviation (n - 1) over draws, on the grid and at the scan's voxels; the files' names.

    Background counts as 0, so the spread at the brain's edge says how sure its outline is.
    """
    files = [output / record["file"] for record in records]
    total = np.zeros(generator.grid.shape, np.float64)
    for file in files:
        total += read_volume(file)[0]
    mean = total / len(files)
    squares = np.zeros_like(mean)
    for file in files:
        squares += (read_volume(file)[0] - mean) ** 2
    spread = np.sqrt(squares / (len(files) - 1)).astype(np.float32)
    names = {what: f"{what}{suffix}.nii.gz" for what in ("mean", "spread")}
    names |= {f"{what}_native": f"{what}{suffix}_native.nii.gz" for what in ("mean", "spread")}
    write_volume(output / names["mean"], mean.astype(np.float32), generator.grid.matrix)
    write_volume(output / names["spread"], spread, generator.grid.matrix)
    write_native(output / names["mean_native"], mean, generator.grid, scan)
    at_scan = np.maximum(resample(spread, generator.grid.matrix, scan.native), 0)  # 0 is a value here, not background
    write_volume(output / names["spread_native"], at_scan, scan.affine)
    return names
