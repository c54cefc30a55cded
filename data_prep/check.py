"""Looking for what would spoil a training before any time is spent on it: every scan of every manifest is read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import xxhash

from data_prep.formats import orientation_known, read_image
from data_prep.manifest import Scan, parse_manifest
from data_prep.progress import run_all
from data_prep.quality import MIN_EXTENT_MM, extent_mm
from data_prep.recipe import read_recipe
from data_prep.session import reason_of
from g3n.nifti import Grid

_AGE_YEARS = (0.0, 110.0)
_AGE_TOLERANCE_YEARS = 1.1  # tables give whole years
_SPACING_MM = (0.2, 8.0)


@dataclass(frozen=True)
class Problem:
    """One row of the table. ``fatal``: packing or training would go wrong with it."""

    fatal: bool
    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Facts:
    """What reading a scan tells. ``voxels`` is a hash of shape and values, ``error`` why it could not be read."""

    error: str | None = None
    voxels: str = ""
    oriented: bool = True
    axes: str = ""
    spacing_mm: tuple[float, ...] = ()
    extent_mm: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()
    affine: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Listed:
    """A scan, the manifest it stands in, and its facts; ``grid`` where preprocess wrote it."""

    scan: Scan
    manifest: str
    grid: Grid | None
    facts: Facts

    @property
    def where(self) -> str:
        return f"{self.manifest}: {self.scan.path}"

    @property
    def person(self) -> str:
        """Who this is in every manifest: labels without a group are unique in their cohort only."""
        return self.scan.group or f"{self.scan.cohort}:{self.scan.subject}"


def check_all(manifests: Sequence[Path], workers: int | None = None) -> list[Problem]:
    """All problems of ``manifests`` (of scan or preprocess), fatal ones first. Reads every voxel.

    Raises G3nError for a manifest that cannot be read at all.
    """
    problems: list[Problem] = []
    listed: list[Listed] = []
    for path in manifests:
        manifest, bad_rows = parse_manifest(path)
        problems += [Problem(True, "manifest", str(path), line) for line in bad_rows]
        if not manifest.scans:
            problems.append(Problem(True, "manifest", str(path), "has no scans"))
        grid = read_recipe(path)[1] if path.with_name("recipe.json").is_file() else None
        work = partial(look_at, str(manifest.root))
        facts = run_all(work, manifest.scans, workers, f"check {path.parent.name}")
        listed += [Listed(s, str(path), grid, f) for s, f in zip(manifest.scans, facts, strict=True)]
    tests: tuple[Callable[[Sequence[Listed]], list[Problem]], ...] = (
        _files, _duplicates, _splits, _people, _values, _missing,
    )  # fmt: skip
    for test in tests:
        problems += test(listed)
    return sorted(problems, key=lambda p: not p.fatal)


def look_at(root: str, scan: Scan) -> Facts:
    """Read one scan as preprocess would."""
    path = Path(root) / scan.path
    try:
        volume, affine = read_image(path)
    except Exception as error:  # whatever a file does to a reader is a finding
        return Facts(error=reason_of(error))
    digest = xxhash.xxh3_64(str(volume.shape))
    digest.update(np.ascontiguousarray(volume).data)
    return Facts(
        voxels=digest.hexdigest(),
        oriented=orientation_known(path),
        axes="".join(str(c) for c in nib.orientations.aff2axcodes(affine)),
        spacing_mm=tuple(float(s) for s in np.linalg.norm(affine[:3, :3], axis=0)),
        extent_mm=tuple(extent_mm(volume.shape, affine)),
        shape=volume.shape,
        affine=tuple(tuple(float(x) for x in row) for row in affine),
    )


def _files(listed: Sequence[Listed]) -> list[Problem]:
    """What each file says of itself: readable, oriented, spaced."""
    found = []
    for item in listed:
        facts, scan = item.facts, item.scan
        if facts.error:
            found.append(Problem(True, "unreadable", item.where, facts.error))
            continue
        if item.grid is not None:
            found += _off_grid(item, item.grid)
        elif scan.spacing_mm is None:
            smallest, largest = min(facts.spacing_mm), max(facts.spacing_mm)
            if min(facts.extent_mm) < MIN_EXTENT_MM:
                what = f"spans {' x '.join(f'{mm:g}' for mm in facts.extent_mm)} mm: its spacing is probably lost"
                hint = "give the true one in the manifest's spacing_mm column, or leave it out"
                found.append(Problem(True, "spacing", item.where, f"{what}; {hint}"))
            elif smallest < _SPACING_MM[0] or largest > _SPACING_MM[1]:
                what = f"spacing {' x '.join(f'{mm:.3g}' for mm in facts.spacing_mm)} mm is unusual"
                found.append(Problem(False, "spacing", item.where, what))
        if not facts.oriented and scan.axes is None:
            what = "its header does not say which way the axes run; left and right may be swapped: look at it"
            found.append(Problem(False, "orientation", item.where, what))
        if scan.flag:
            found.append(
                Problem(False, "flagged", item.where, f"preprocess flagged it: {scan.flag}; pack leaves it out")
            )
    return found


def _off_grid(item: Listed, grid: Grid) -> list[Problem]:
    facts = item.facts
    if facts.axes != "LPS":
        return [
            Problem(True, "orientation", item.where, f"its axes run {facts.axes}, expected LPS; preprocess it again")
        ]
    if facts.shape != grid.shape or not np.allclose(facts.affine, grid.matrix, atol=1e-3):
        return [Problem(True, "grid", item.where, "it is not on the grid of recipe.json; preprocess it again")]
    return []


def _duplicates(listed: Sequence[Listed]) -> list[Problem]:
    """The same voxels under two names: one person twice, or one visit copied over another."""
    first: dict[str, Listed] = {}
    found = []
    for item in listed:
        if item.facts.error:
            continue
        other = first.setdefault(item.facts.voxels, item)
        if other is item:
            continue
        same = "another person's" if other.person != item.person else "the same person's"
        found.append(Problem(True, "duplicate", item.where, f"has the voxels of {same} {other.where}; keep one"))
    return found


def _splits(listed: Sequence[Listed]) -> list[Problem]:
    first: dict[str, Listed] = {}
    found: dict[str, Problem] = {}
    for item in listed:
        other = first.setdefault(item.person, item)
        if other.scan.split != item.scan.split:
            what = (
                f"person '{item.person}' is in {item.scan.split} here and in {other.scan.split} of {other.manifest}; "
                f"keep each person in one split"
            )
            found.setdefault(item.person, Problem(True, "split", item.where, what))
    return list(found.values())


def _people(listed: Sequence[Listed]) -> list[Problem]:
    """What cannot both be true of one subject: two sexes, an age that does not go with the days."""
    by_subject: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    for item in listed:
        by_subject[item.manifest, item.scan.subject].append(item)
    found = []
    for (manifest, subject), items in by_subject.items():
        sexes = sorted({i.scan.sex for i in items} - {None}, key=str)
        if len(sexes) > 1:
            found.append(Problem(True, "sex", manifest, f"subject '{subject}' is both {' and '.join(map(str, sexes))}"))
        visits = {
            (i.scan.days_from_baseline, i.scan.age_years)
            for i in items
            if i.scan.days_from_baseline is not None and i.scan.age_years is not None
        }
        if len(visits) > 1:
            days, ages = (np.array(column) for column in zip(*sorted(visits), strict=True))
            born = ages - days / 365.25
            if born.max() - born.min() > 2 * _AGE_TOLERANCE_YEARS:
                what = f"subject '{subject}': ages {_listed(ages)} do not go with days {_listed(days)}"
                found.append(Problem(True, "age", manifest, what))
    return found


def _values(listed: Sequence[Listed]) -> list[Problem]:
    found = []
    low, high = _AGE_YEARS
    for item in listed:
        age, days, tesla = item.scan.age_years, item.scan.days_from_baseline, item.scan.field_strength_t
        if age is not None and not low <= age <= high:
            found.append(Problem(True, "age", item.where, f"age {age:g} years; expected {low:g} to {high:g}, or n/a"))
        if days is not None and days < -1:
            found.append(Problem(True, "days", item.where, f"{days:g} days from baseline; expected 0 or more, or n/a"))
        if tesla is not None and not 0.02 <= tesla <= 11.7:
            found.append(
                Problem(True, "field", item.where, f"field strength {tesla:g} T; expected 0.02 to 11.7, or n/a")
            )
    return found


def _missing(listed: Sequence[Listed]) -> list[Problem]:
    """Variables nobody can be conditioned on, counted a manifest."""
    found = []
    by_manifest: dict[str, list[Scan]] = defaultdict(list)
    for item in listed:
        by_manifest[item.manifest].append(item.scan)
    for manifest, scans in by_manifest.items():
        for name in ("age_years", "sex", "diagnosis", "cohort", "field_strength_t", "days_from_baseline"):
            count = sum(getattr(scan, name) is None for scan in scans)
            if count:
                found.append(Problem(False, "missing", manifest, f"{name} of {count} of {len(scans)} scans"))
    return found


def _listed(numbers: Any) -> str:
    return ", ".join(f"{x:g}" for x in numbers)
