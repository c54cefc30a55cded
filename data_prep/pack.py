"""From preprocessed volumes to shards. Nothing that names a person passes: labels become keyed hashes, files bare arrays."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.manifest import MODALITIES, SPLITS, Manifest, Scan, read_manifest
from data_prep.progress import run_all
from data_prep.shards import (
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
from g3n.config import G3nError, build, to_plain
from g3n.nifti import Grid, read_volume

VERSION = 1
MAX_SAMPLES = 256
MIN_SHARDS = 16
_LEVEL = 4095  # stored value of the 99.9th percentile
_CLASSES = ("modality", "sex", "diagnosis", "cohort")
_NUMBERS = ("age_years", "field_strength_t")


def pack_all(
    manifest_path: Path,
    output: Path,
    samples_per_shard: int | None = None,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Write shards and index.json; the index's splits. The same volumes, key and arguments give the same bytes.

    Raises G3nError for volumes that were not preprocessed together, a damaged volume, a label that shows in a variable,
    or an output folder that holds anything else.
    """
    manifest = read_manifest(manifest_path)
    recipe, grid = _read_recipe(manifest_path)
    _refuse_names(manifest.scans)
    plan = {
        split: plan_shards([s for s in manifest.scans if s.split == split], seed, samples_per_shard) for split in SPLITS
    }
    about = {"pack": VERSION, "level": _LEVEL, "preprocess": recipe["fingerprint"]}
    stamps = [[s.subject, s.session, s.modality, *_stamp(manifest, s)] for s in manifest.scans]
    layout = {split: [[f"{s.subject}-{n}-{s.modality}" for s, n in shard] for shard in p] for split, p in plan.items()}
    variables = [[s.variables, s.days_from_baseline] for s in manifest.scans]
    begun = fingerprint_of([about, to_plain(grid), layout, stamps, variables])
    if start(output, begun):
        return dict(json.loads((output / "index.json").read_text())["splits"])

    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS if plan[split]}
    todo = [(split, i) for split in splits for i in range(len(plan[split]))]
    done = {where: finished_shard(output, shard_name(*where)) for where in todo}
    missing = [(scan, n) for where in todo if done[where] is None for scan, n in plan[where[0]][where[1]]]
    work = partial(_encode_scan, str(manifest.root), grid)
    samples = iter(run_all(work, missing, workers, "pack"))
    for split, i in todo:
        entry = done[split, i] or write_shard(output, shard_name(split, i), _take(samples, len(plan[split][i])))
        splits[split].append(entry)
    next(samples, None)  # lets the progress bar and the workers end
    header = {"kind": "volume", "recipe": about, "grid": to_plain(grid), "variables": levels_of(manifest.scans)}
    write_index(output, header, splits, begun)
    return splits


def plan_shards(scans: Sequence[Scan], seed: int, samples_per_shard: int | None) -> list[list[tuple[Scan, int]]]:
    """The scans of each shard of one split, each with its visit's number (from 1).

    Subjects (keyed hashes already) stay whole and come in an order that the seed decides. Without ``samples_per_shard`` there are at least 16 shards if there are as many subjects.
    """
    if not scans:
        return []
    by_subject: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        by_subject[scan.subject].append(scan)
    largest = samples_per_shard or MAX_SAMPLES
    count = math.ceil(len(scans) / largest)
    if samples_per_shard is None:
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
    return sorted(rows, key=lambda row: (row[1], MODALITIES.index(row[0].modality)))


def quantize(volume: np.ndarray) -> tuple[np.ndarray, float]:
    """int16 and scale of a non-negative volume: stored * scale = raw, 0 only where it was 0.

    The 99.9th percentile of the foreground is stored as 4095: steps far below any scanner's noise, and outliers fit.
    """
    inside = volume > 0
    scale = float(np.percentile(volume[inside], 99.9)) / _LEVEL
    stored = np.where(inside, np.clip(np.rint(volume / scale), 1, 32767), 0)
    return stored.astype(np.int16), scale


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


def _encode_scan(root: str, grid: Grid, numbered: tuple[Scan, int]) -> EncodedSample:
    scan, visit = numbered
    path = Path(root) / scan.path
    volume, affine = read_volume(path)
    if volume.shape != grid.shape or not np.allclose(affine, grid.matrix, atol=1e-3):
        raise G3nError(f"'{path}' is not on the grid of recipe.json; run preprocess again")
    if volume.min() < 0:
        raise G3nError(f"'{path}' has negative voxels; run preprocess again")
    stored, scale = quantize(volume)
    brain = stored[stored != 0].astype(np.float64)
    if brain.std() == 0:
        raise G3nError(f"'{path}' has one value in all of the brain; leave out this scan")
    meta = {
        "shape": list(stored.shape),
        "scale": scale,
        "brain_mean": float(brain.mean()),
        "brain_std": float(brain.std()),
        "affine": grid.matrix.tolist(),
        "days_from_baseline": scan.days_from_baseline,
        "variables": scan.variables,
    }
    key = f"sub-{scan.subject}_ses-{visit:02d}_{scan.modality}"
    return encode_sample(PackedSample(key, scan.subject, scan.modality, 1, stored, meta))


def _take(samples: Iterator[EncodedSample], count: int) -> Iterator[EncodedSample]:
    for _ in range(count):
        yield next(samples)


def _read_recipe(manifest_path: Path) -> tuple[dict[str, Any], Grid]:
    path = manifest_path.with_name("recipe.json")
    if not path.is_file():
        raise G3nError(f"'{manifest_path.parent}' has no recipe.json; give the manifest.tsv that preprocess wrote")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        return {"fingerprint": str(recipe["fingerprint"])}, build(Grid, recipe["grid"], "grid")
    except (ValueError, KeyError, TypeError) as error:
        raise G3nError(f"'{path}' is damaged; run preprocess again") from error


def _refuse_names(scans: Sequence[Scan]) -> None:
    for scan in scans:
        if not re.fullmatch(r"[0-9a-f]{16}", scan.subject):
            raise G3nError(
                f"subject '{scan.subject}' is not a hash, so it may name someone; give the manifest.tsv that preprocess wrote"
            )


def _stamp(manifest: Manifest, scan: Scan) -> list[int]:
    path = manifest.root / scan.path
    try:
        info = path.stat()
    except OSError as error:
        raise G3nError(f"'{path}' cannot be read ({error.strerror}); run preprocess again") from error
    return [info.st_size]
