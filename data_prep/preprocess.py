"""From raw scans to the atlas grid: one file a scan, one bad scan never stops the rest."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.brain import need_tools
from data_prep.manifest import Scan, read_manifest, write_manifest
from data_prep.progress import run_all
from data_prep.recipe import KEYS, Recipe
from data_prep.session import Done, process_session, reason_of
from data_prep.shards import write_text
from g3n.config import G3nError
from g3n.names import hash_label, read_key
from g3n.nifti import write_volume


@dataclass(frozen=True)
class Outcome:
    """What became of one scan: ``align`` is what was used, ``reason`` why it failed (None: its volume is there)."""

    align: str
    reason: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Visit:
    """The scans of one session, as they come and as they will be called."""

    raw: tuple[Scan, ...]
    named: tuple[Scan, ...]


def preprocess_all(
    manifest_path: Path, output: Path, recipe: Recipe, workers: int | None = None, key_file: Path | None = None
) -> list[Outcome]:
    """Preprocess each scan of a manifest; their outcomes in its order. What an earlier call wrote is kept.

    Subjects become keyed hashes and sessions visit numbers, so nothing below ``output`` names anyone: the key and
    subjects.tsv, which does, lie beside the manifest. Writes <output>/sub-*/ses-*/anat/*.nii.gz with a sidecar each,
    manifest.tsv, recipe.json and failures.tsv. Raises G3nError for a bad manifest, a missing optional package, an output
    folder made by another recipe, or a label that shows in a variable.
    """
    need_tools(recipe.strip, recipe.bias, recipe.align, recipe.strip_command)
    manifest = read_manifest(manifest_path)
    refuse_labels(manifest.scans)
    about = recipe.describe()
    _open_output(output, manifest.root, about)
    key_path = key_file or manifest_path.parent / "subjects.key"
    key = read_key(key_path, output)
    named = pseudonymize(manifest.scans, key)
    _write_private(key_path.with_suffix(".tsv"), manifest.scans, named)
    visits = _visits(manifest.scans, named)
    work = partial(_preprocess_visit, str(manifest.root), str(output), recipe, about, key)
    by_scan: dict[tuple[str, str, str, int], Outcome] = {}
    crashed = partial(_crashed, recipe.align)
    for visit, outcomes in zip(visits, run_all(work, visits, workers, "preprocess", crashed), strict=True):
        by_scan.update({scan.key: outcome for scan, outcome in zip(visit.raw, outcomes, strict=True)})
    outcomes = [by_scan[scan.key] for scan in manifest.scans]
    done, failures = [], ["subject\tsession\tmodality\trun\treason"]
    for scan, outcome in zip(named, outcomes, strict=True):
        if outcome.reason is None:
            done.append(replace(scan, flag=",".join(outcome.flags) or None))
        else:
            failures.append(f"{scan.subject}\t{scan.session}\t{scan.modality}\t{scan.run}\t{outcome.reason}")
    write_text(output / "failures.tsv", "\n".join(failures) + "\n")
    write_manifest(output / "manifest.tsv", Path(), done, {"recipe": about["fingerprint"]})
    return outcomes


def volume_path(scan: Scan) -> str:
    """Where a scan's volume lies below the output folder."""
    run = "" if scan.run == 1 else f"_run-{scan.run}"
    stem = f"sub-{scan.subject}_ses-{scan.session}{run}_{scan.modality}"
    return f"sub-{scan.subject}/ses-{scan.session}/anat/{stem}.nii.gz"


def pseudonymize(scans: Sequence[Scan], key: bytes) -> list[Scan]:
    """The scans as the output knows them: hashed subject and group, visit number for session, no path but the new one."""
    hashes = {s: hash_label(s, key) for s in sorted({scan.subject for scan in scans})}
    if len(set(hashes.values())) < len(hashes):
        raise G3nError("two subjects have one hash; use another key file")
    first_day: dict[str, dict[str, float]] = defaultdict(dict)
    for scan in scans:
        day = math.inf if scan.days_from_baseline is None else scan.days_from_baseline
        days = first_day[scan.subject]
        days[scan.session] = min(day, days.get(scan.session, math.inf))
    number = {
        (subject, session): i
        for subject, days in first_day.items()
        for i, session in enumerate(sorted(days, key=lambda s: (days[s], s)), 1)
    }
    named = []
    for scan in scans:
        new = replace(
            scan,
            subject=hashes[scan.subject],
            session=f"{number[scan.subject, scan.session]:02d}",
            group=None if scan.group is None else hash_label(scan.group, key),
            axes=None,
            spacing_mm=None,
            mask=None,
        )
        named.append(replace(new, path=volume_path(new)))
    return named


def refuse_labels(scans: Sequence[Scan]) -> None:
    """A subject's label must not travel inside a variable. Labels under 4 characters are too common to look for."""
    labels = {scan.subject.lower() for scan in scans if len(scan.subject) >= 4}
    seen: set[tuple[str, str]] = set()
    for scan in scans:
        texts = {"diagnosis": scan.diagnosis, "cohort": scan.cohort, **scan.phenotypes}
        seen |= {(name, value) for name, value in texts.items() if isinstance(value, str)}
    for name, value in sorted(seen):
        if found := labels & set(re.split(r"[^a-z0-9]+", value.lower())):
            raise G3nError(f"{name} '{value}' contains the subject label '{min(found)}'; rename it in the manifest")


def _write_private(path: Path, raw: Sequence[Scan], named: Sequence[Scan]) -> None:
    """Who is who, beside the key: for looking up a flagged or failed scan, never to be passed on."""
    lines = ["subject\tsession\tpath\thashed_subject\tvisit"]
    lines += [f"{r.subject}\t{r.session}\t{r.path}\t{n.subject}\t{n.session}" for r, n in zip(raw, named, strict=True)]
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(part, path)


def _visits(raw: Sequence[Scan], named: Sequence[Scan]) -> list[Visit]:
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, scan in enumerate(raw):
        groups[scan.subject, scan.session].append(i)
    return [Visit(tuple(raw[i] for i in g), tuple(named[i] for i in g)) for g in groups.values()]


def _open_output(output: Path, root: Path, about: dict[str, Any]) -> None:
    mark = output / "recipe.json"
    if output.resolve() == root.resolve():
        raise G3nError(f"output '{output}' is the folder of the raw scans; give another one")
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
            same = found["fingerprint"] == about["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise G3nError(f"'{mark}' is damaged; give an empty folder") from error
        if not same:
            keys = [k for k in KEYS if found.get(k) != about[k]]
            raise G3nError(f"'{output}' was made by another recipe ({', '.join(keys)} differ); give an empty folder")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise G3nError(f"'{output}' is not an empty folder; give a new one")
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(about, indent=1) + "\n")


def _crashed(align: str, visit: Visit) -> list[Outcome]:
    """Of a session that killed its process twice."""
    return [Outcome(align, "its process died twice (out of memory?); try fewer --workers")] * len(visit.raw)


def _preprocess_visit(
    root: str, output: str, recipe: Recipe, about: dict[str, Any], key: bytes, visit: Visit
) -> list[Outcome]:
    """All scans of a session again, unless every one is done: their transforms depend on each other."""
    made = [{"recipe": about["fingerprint"], "source": _stamp(Path(root), scan, key)} for scan in visit.raw]
    targets = [Path(output) / scan.path for scan in visit.named]
    found = [_done(target, m) for target, m in zip(targets, made, strict=True)]
    if all(outcome is not None for outcome in found):
        return [outcome for outcome in found if outcome is not None]
    results = process_session(Path(root), list(visit.raw), recipe)
    outcomes = []
    for scan, target, m, result, before in zip(visit.raw, targets, made, results, found, strict=True):
        if before is not None and isinstance(result, Done):
            outcomes.append(before)
            continue
        for stale in (_sidecar(target), target):
            stale.unlink(missing_ok=True)
        if isinstance(result, str):
            outcomes.append(Outcome(recipe.align, _without_names(result, Path(root), scan)))
            continue
        try:
            write_volume(target, result.volume, recipe.grid.matrix)
            tree = {**m, "versions": about["versions"], **result.about, "bytes": target.stat().st_size}
            write_text(_sidecar(target), json.dumps(tree, indent=1) + "\n")
            outcomes.append(Outcome(result.about["align"], None, tuple(result.about["flags"])))
        except OSError as error:
            outcomes.append(Outcome(recipe.align, _without_names(reason_of(error), Path(root), scan)))
    return outcomes


def _without_names(reason: str, root: Path, scan: Scan) -> str:
    """failures.tsv lies among the derivatives: it says what is wrong, subjects.tsv beside the key says with which file."""
    paths = [path for path in (scan.path, scan.mask) if path]
    for text in (*(str(root / path) for path in paths), *paths, *(Path(path).name for path in paths), str(root)):
        reason = reason.replace(f"'{text}'", "the file").replace(text, "the file")
    reason = re.sub(r"(?<![\w.])/[^\s'\":,;]+", "a path", reason)
    for label in (scan.subject, scan.session):
        if len(label) >= 4:
            reason = re.sub(re.escape(label), "...", reason, flags=re.IGNORECASE)
    return reason


def _sidecar(target: Path) -> Path:
    return target.with_name(target.name.removesuffix(".nii.gz") + ".json")


def _stamp(root: Path, scan: Scan, key: bytes) -> str | None:
    """Size and time of the source and its plan, as a keyed hash (a date must not show); None where it cannot be read."""
    try:
        info = (root / scan.path).stat()
    except OSError:
        return None
    return hash_label(f"{info.st_size} {info.st_mtime_ns} {scan.axes} {scan.spacing_mm} {scan.space} {scan.mask}", key)


def _done(target: Path, made: dict[str, Any]) -> Outcome | None:
    """The outcome where an earlier call finished this scan by the same recipe, else None."""
    try:
        found = json.loads(_sidecar(target).read_text(encoding="utf-8"))
        same = made["source"] is not None and all(found[key] == made[key] for key in ("recipe", "source"))
        if same and found["bytes"] == target.stat().st_size:
            return Outcome(str(found["align"]), None, tuple(found["flags"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
