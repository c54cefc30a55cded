"""From preprocessed volumes to shards. Nothing that names a person passes: hashes for names, bare arrays for files."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.manifest import MODALITIES, SPLITS, Manifest, Scan, read_manifest
from data_prep.progress import run_all
from data_prep.recipe import read_recipe
from data_prep.shards import (
    INDEX_VERSION,
    EncodedSample,
    PackedSample,
    encode_sample,
    fingerprint_of,
    finished_shard,
    shard_name,
    start,
    write_index,
    write_shard,
)
from g3n.config import G3nError, to_plain
from g3n.nifti import Grid, read_volume

VERSION = 2
ATLAS_SHAPE = (240, 240, 155)
PUBLISHED_SHAPE = (160, 192, 160)
_MAX_CROPPED = 0.02  # of the brain
MIN_SHARDS = 16
_LEVEL = 4095  # stored value of the 99.9th percentile
_CLASSES = ("modality", "sex", "diagnosis", "cohort")
_NUMBERS = ("age_years", "field_strength_t")


@dataclass(frozen=True)
class Packing:
    """What may be packed, and how. ``shape``: None crops 240x240x155 to the published 160x192x160 and leaves others alone."""

    shape: tuple[int, int, int] | None = None
    shard_mb: float = 256.0
    samples_per_shard: int | None = None
    seed: int = 0
    allowed_flags: tuple[str, ...] = ()
    allow_faces: bool = False
    commercial: bool = False


def pack_all(
    manifest_path: Path, output: Path, packing: Packing | None = None, workers: int | None = None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """Write shards and index.json; the index's splits, and how many scans were left out for which reason.

    The same volumes and arguments give the same bytes. Scans that preprocess flagged stay out unless their flags are
    allowed; "skull" (a face may be recognizable) by ``allow_faces`` alone. Raises G3nError for volumes that were not
    preprocessed together, a damaged volume, a subject that is not a hash, nothing left to pack, or an output folder that
    holds anything else.
    """
    packing = packing or Packing()
    manifest = read_manifest(manifest_path)
    recipe, source_grid = read_recipe(manifest_path)
    _refuse_names(manifest.scans)
    scans, left_out = choose(manifest.scans, packing)
    if not scans:
        raise G3nError(f"'{manifest_path}' has nothing to pack: {_listed(left_out)}; look at them in data_prep qc")
    grid = crop_grid(source_grid, packing.shape or (PUBLISHED_SHAPE if source_grid.shape == ATLAS_SHAPE else None))
    sizes = {scan.path: _size(manifest, scan) for scan in scans}
    per_shard = packing.samples_per_shard or _samples_of(packing.shard_mb, manifest, scans, source_grid, grid, sizes)
    plan = {
        split: plan_shards(
            [s for s in scans if s.split == split], packing.seed, per_shard, packing.samples_per_shard is None
        )
        for split in SPLITS
    }
    about = {"pack": VERSION, "level": _LEVEL, "preprocess": recipe["fingerprint"]}
    layout = {split: [[sample_key(s, n) for s, n in shard] for shard in p] for split, p in plan.items()}
    facts = [[s.variables, s.days_from_baseline, dict(s.phenotypes), s.group, sizes[s.path]] for s in scans]
    begun = fingerprint_of([INDEX_VERSION, about, to_plain(grid), layout, facts])
    if start(output, begun):
        return dict(json.loads((output / "index.json").read_text())["splits"]), left_out

    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS if plan[split]}
    todo = [(split, i) for split in splits for i in range(len(plan[split]))]
    done = {where: finished_shard(output, shard_name(*where)) for where in todo}
    missing = [(scan, n) for where in todo if done[where] is None for scan, n in plan[where[0]][where[1]]]
    work = partial(_encode_scan, str(manifest.root), source_grid, grid)
    samples = iter(run_all(work, missing, workers, "pack"))
    for split, i in todo:
        entry = done[split, i] or write_shard(output, shard_name(split, i), _take(samples, len(plan[split][i])))
        splits[split].append(entry)
    next(samples, None)  # lets the progress bar and the workers end
    header = {
        "kind": "volume",
        "recipe": about,
        "grid": to_plain(grid),
        "variables": levels_of(scans),
        "licenses": dict(sorted(Counter(scan.license for scan in scans).items())),
        "statistics": _statistics(output, splits.get("train", [])),
    }
    write_index(output, header, splits, begun)
    return splits, left_out


def choose(scans: Sequence[Scan], packing: Packing) -> tuple[list[Scan], dict[str, int]]:
    """The scans that may be packed, and a count of the others by reason."""
    left_out: Counter[str] = Counter()
    chosen = []
    for scan in scans:
        flags = set((scan.flag or "").split(",")) - {""} - (set(packing.allowed_flags) - {"skull"})
        if packing.allow_faces:
            flags -= {"skull"}
        commercial = scan.license == "open" and scan.phenotypes.get("commercial_use", "yes") == "yes"
        if packing.commercial and not commercial:
            flags.add("license")
        left_out.update(flags)
        if not flags:
            chosen.append(scan)
    return chosen, dict(sorted(left_out.items()))


def crop_grid(grid: Grid, shape: tuple[int, int, int] | None) -> Grid:
    """``grid`` cropped or padded around its center to ``shape``; an odd difference pads one more at the end.

    240x240x155 -> 160x192x160 takes 40 and 24 voxels off each side and adds 2 below and 3 above (as published).
    """
    if shape is None or shape == grid.shape:
        return grid
    matrix = grid.matrix
    first = np.array([-pad_before(n, m) for n, m in zip(grid.shape, shape, strict=True)])
    matrix[:3, 3] += matrix[:3, :3] @ first
    return Grid(shape, tuple(tuple(float(x) for x in row) for row in matrix))


def pad_before(have: int, want: int) -> int:
    """Voxels added before the first (negative: cropped)."""
    return (want - have) // 2 if want >= have else -((have - want) // 2)


def crop_volume(volume: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """[X, Y, Z] cropped or zero-padded as ``crop_grid`` does."""
    result = np.zeros(shape, volume.dtype)
    source, target = [], []
    for have, want in zip(volume.shape, shape, strict=True):
        before = pad_before(have, want)
        count = min(have, want)
        source.append(slice(max(0, -before), max(0, -before) + count))
        target.append(slice(max(0, before), max(0, before) + count))
    result[tuple(target)] = volume[tuple(source)]
    return result


def sample_key(scan: Scan, visit: int) -> str:
    """sub-<hash>_ses-<nn>[_run-<k>]_<modality>."""
    run = "" if scan.run == 1 else f"_run-{scan.run}"
    return f"sub-{scan.subject}_ses-{visit:02d}{run}_{scan.modality}"


def _samples_of(
    shard_mb: float, manifest: Manifest, scans: Sequence[Scan], source: Grid, grid: Grid, sizes: dict[str, int]
) -> int:
    """Samples in a shard of ``shard_mb`` MiB, judged by packing the scan in the middle of all sizes."""
    if not shard_mb > 0:
        raise G3nError(f"shard size {shard_mb} MiB is impossible; give a positive number")
    median = sorted(scans, key=lambda s: (sizes[s.path], s.path))[len(scans) // 2]
    encoded = _encode_scan(str(manifest.root), source, grid, (median, 1))
    return max(1, int(shard_mb * 2**20 / sum(map(len, encoded.members.values()))))


def plan_shards(scans: Sequence[Scan], seed: int, per_shard: int, at_least_16: bool) -> list[list[tuple[Scan, int]]]:
    """The scans of each shard of one split, each with its visit's number (from 1).

    Subjects stay whole and come in an order that the seed decides. With ``at_least_16`` there are that many shards if
    there are as many subjects: fewer could not feed eight workers.
    """
    if not scans:
        return []
    by_subject: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        by_subject[scan.subject].append(scan)
    count = math.ceil(len(scans) / per_shard)
    if at_least_16:
        count = max(count, MIN_SHARDS)
    shards: list[list[tuple[Scan, int]]] = [[] for _ in range(min(count, len(by_subject)))]
    for subject in sorted(by_subject, key=lambda name: xxhash.xxh3_64_hexdigest(f"{seed}:{name}")):
        min(shards, key=len).extend(_numbered(by_subject[subject]))
    return shards


def _numbered(scans: Sequence[Scan]) -> list[tuple[Scan, int]]:
    """One subject's scans in time order with their visit's number."""
    days: dict[str, float] = {}
    for scan in scans:
        day = math.inf if scan.days_from_baseline is None else scan.days_from_baseline
        days[scan.session] = min(day, days.get(scan.session, math.inf))
    order = sorted(days, key=lambda session: (days[session], session))
    rows = [(scan, order.index(scan.session) + 1) for scan in scans]
    return sorted(rows, key=lambda row: (row[1], MODALITIES.index(row[0].modality), row[0].run))


def quantize(volume: np.ndarray) -> tuple[np.ndarray, float, float]:
    """int16, scale and largest error of a non-negative volume: stored * scale = raw, 0 only where it was 0.

    Whole numbers up to 32767 are stored as they are. Else the 99.9th percentile of the foreground is stored as 4095:
    steps far below any scanner's noise, and outliers fit. The error is over voxels within the range of int16.
    """
    if volume.max() <= 32767 and np.array_equal(volume, np.rint(volume)):
        return volume.astype(np.int16), 1.0, 0.0
    inside = volume > 0
    scale = float(np.percentile(volume[inside], 99.9)) / _LEVEL
    stored = np.where(inside, np.clip(np.rint(volume / scale), 1, 32767), 0).astype(np.int16)
    return stored, scale, float(np.abs(stored * scale - volume).max())


def levels_of(scans: Sequence[Scan]) -> dict[str, list[Any]]:
    """Levels of each class variable and [min, max] of each number; a variable nobody has is left out."""
    table: dict[str, list[Any]] = {}
    for name in ("modality", "age_years", "sex", "diagnosis", "cohort", "field_strength_t"):
        values = {scan.variables[name] for scan in scans} - {None}
        if values and name in _CLASSES:
            table[name] = sorted(values, key=MODALITIES.index if name == "modality" else str)
        elif values:
            table[name] = [min(values), max(values)]
    return table


def _encode_scan(root: str, source: Grid, grid: Grid, numbered: tuple[Scan, int]) -> EncodedSample:
    scan, visit = numbered
    path = Path(root) / scan.path
    volume, affine = read_volume(path)
    if volume.shape != source.shape or not np.allclose(affine, source.matrix, atol=1e-3):
        raise G3nError(f"'{path}' is not on the grid of recipe.json; run preprocess again")
    if volume.min() < 0:
        raise G3nError(f"'{path}' has negative voxels; run preprocess again")
    stored, scale, error = quantize(volume)
    brain = stored[stored != 0].astype(np.float64)  # of the whole brain, before cropping
    if brain.std() == 0:
        raise G3nError(f"'{path}' has one value in all of the brain; leave out this scan")
    stored = crop_volume(stored, grid.shape)
    cropped = 1 - np.count_nonzero(stored) / len(brain)
    if cropped > _MAX_CROPPED:
        raise G3nError(
            f"'{path}' loses {cropped:.1%} of its brain outside {grid.shape}; is it on the atlas? give --shape"
        )
    meta: dict[str, Any] = {
        "shape": list(stored.shape),
        "scale": scale,
        "max_error": error,
        "cropped": round(cropped, 6),
        "brain_mean": float(brain.mean()),
        "brain_std": float(brain.std()),
        "affine": grid.matrix.tolist(),
        "days_from_baseline": scan.days_from_baseline,
        "variables": scan.variables,
    }
    if scan.phenotypes:
        meta["phenotypes"] = dict(scan.phenotypes)
    if scan.group:
        meta["group"] = scan.group
    return encode_sample(PackedSample(sample_key(scan, visit), scan.subject, scan.modality, 1, stored, meta))


def _statistics(output: Path, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the train split alone: scans and mean and std of brain voxels (raw intensities) of each modality."""
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for shard in shards:
        with open(output / shard["name"], "rb") as file:
            for sample in shard["samples"]:
                offset, size = sample["members"]["json"]
                file.seek(offset)
                meta = json.loads(file.read(size))
                rows[sample["modality"]].append((meta["brain_mean"] * meta["scale"], meta["brain_std"] * meta["scale"]))
    statistics = {}
    for modality, found in sorted(rows.items()):
        mean = math.fsum(m for m, _ in found) / len(found)
        square = math.fsum(m * m + s * s for m, s in found) / len(found)
        std = math.sqrt(max(0.0, square - mean * mean))
        statistics[modality] = {"scans": len(found), "mean": mean, "std": std}
    return statistics


def _listed(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in left_out.items()) or "the manifest is empty"


def _take(samples: Iterator[EncodedSample], count: int) -> Iterator[EncodedSample]:
    for _ in range(count):
        yield next(samples)


def _refuse_names(scans: Sequence[Scan]) -> None:
    for scan in scans:
        for name in (scan.subject, scan.group):
            if name is not None and not re.fullmatch(r"[0-9a-f]{16}", name):
                raise G3nError(
                    f"subject '{name}' is not a hash, so it may name someone; give the manifest.tsv that preprocess wrote"
                )


def _size(manifest: Manifest, scan: Scan) -> int:
    path = manifest.root / scan.path
    try:
        info = path.stat()
    except OSError as error:
        raise G3nError(f"'{path}' cannot be read ({error.strerror}); run preprocess again") from error
    return info.st_size
