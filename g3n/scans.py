"""Scans to encode, one after the other on an encoder's grid: of volume shards, or NIfTI files with a table of variables."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xxhash

from g3n.config import G3nError
from g3n.encoders.contract import WHOLE_BRAIN
from g3n.names import bids_entities, hash_label, modality_of
from g3n.nifti import Grid, to_grid
from g3n.outputs import read_scan
from g3n.stream.decode import Damage, Volume, read_volume_sample
from g3n.stream.index import Sample, Shard, ShardIndex, load_index

FILES_A_PART = 256
MAX_TABLE_BYTES = 1 << 28
_SESSION = re.compile(r"_ses-(\d{2,})_")
_OURS = {"age": "age_years", "gender": "sex", "group": "diagnosis", "dx": "diagnosis"}  # of BIDS tables
_NAMING = re.compile(
    r"(^|_)(id|ids|name|date|acq_time|dob|birth\w*|path|file|filename|source|mask)(_|$)", re.IGNORECASE
)
_NO_SCANS = ("derivatives", "sourcedata", "code")  # of a BIDS folder
_NO_NAMES = ("modality", "split", "group", "sex", "diagnosis", "cohort")  # whatever their values; group is hashed
_OF_THE_SCAN = ("path", "subject", "session", "participant_id", "session_id")


class LeftOut(Exception):
    """A scan that cannot be encoded; the message says why."""


@dataclass(frozen=True)
class Loaded:
    """A scan on the grid: int16 or float32 [X, Y, Z], background exactly 0, mean and standard deviation of the brain, and its row of the table."""

    volume: np.ndarray
    mean: float
    std: float
    row: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """What is finished together. ``reads`` give one scan each or raise LeftOut (that scan alone) or G3nError (storage, all)."""

    name: str
    keys: tuple[str, ...]
    reads: tuple[Callable[[], Loaded], ...]


@dataclass(frozen=True)
class Source:
    """``about`` identifies the scans and the grid they come on; ``names`` are the rows (key, subject, path) that only the owner keeps."""

    about: Mapping[str, Any]
    grid: Grid
    parts: tuple[Part, ...]
    names: tuple[tuple[str, str, str], ...] = ()


def shard_scans(url: str, grid: Grid | None) -> Source:
    """Every volume of every split, on ``grid`` or the shards' own; a part a shard. Columns: key, subject, group, session, split,
    days_from_baseline, all variables and phenotypes. Raises G3nError for shards of latents, or none."""
    index = load_index(url)
    if index.kind != "volume":
        raise G3nError(
            f"shards '{url}' hold {index.kind}s, expected volumes; give the folder that data_prep pack wrote"
        )
    grid = grid or index.grid
    parts = [
        Part(
            shard.name.removesuffix(".tar"),
            tuple(sample.key for sample in shard.samples),
            tuple(_reader(index, grid, split, shard, sample) for sample in shard.samples),
        )
        for split, shards in index.splits.items()
        for shard in shards
    ]
    full = tuple(part for part in parts if part.keys)
    if not full:
        raise G3nError(f"shards '{url}' hold no volumes")
    about = {"shards": index.fingerprint, "recipe": index.raw.get("recipe"), "grid_mm": _told(grid)}
    return Source(about, grid, full)


def training_scans(source: Source) -> list[Callable[[], Loaded]]:
    """Of shards, the scans of the train split, in their order."""
    return [read for part in source.parts if part.name.startswith("train-") for read in part.reads]


def _told(grid: Grid) -> list[Any]:
    return [*grid.shape, *(round(mm, 4) for mm in grid.spacing_mm)]


def _reader(index: ShardIndex, grid: Grid, split: str, shard: Shard, sample: Sample) -> Callable[[], Loaded]:
    return lambda: _of_shard(index, grid, split, shard, sample)


def _of_shard(index: ShardIndex, grid: Grid, split: str, shard: Shard, sample: Sample) -> Loaded:
    try:
        volume = read_volume_sample(index, shard, sample)
    except Damage as error:
        raise LeftOut(str(error)) from error
    row = _row(sample, split, volume, index.variables)
    if same_grid(grid, index.grid):
        return Loaded(volume.voxels, volume.brain_mean, volume.brain_std, row)
    moved = to_grid(volume.voxels, index.grid.matrix, grid)
    brain = moved[moved != 0]
    if brain.size == 0 or float(brain.std()) == 0:
        raise LeftOut(f"sample '{sample.key}' has no brain on the encoder's grid")
    return Loaded(moved, float(brain.mean()), float(brain.std()), row)


def same_grid(a: Grid, b: Grid) -> bool:
    return a.shape == b.shape and bool(np.allclose(a.matrix, b.matrix, atol=1e-4))


def _row(sample: Sample, split: str, volume: Volume, variables: Mapping[str, Any]) -> dict[str, Any]:
    session = _SESSION.search(sample.key)
    known = {name: volume.variables.get(name) for name in variables}
    return {
        "key": sample.key,
        "subject": f"sub-{sample.subject}",
        "group": f"sub-{volume.group or sample.subject}",
        "session": session[1] if session else None,
        "split": split,
        "days_from_baseline": volume.days_from_baseline,
        **known,
        **volume.variables,
        "modality": sample.modality,
        **{name: value for name, value in volume.phenotypes.items() if name not in known},
    }


def image_scans(images: Path, grid: Grid | None, table: Path | None, key: bytes | None, center: bool = False) -> Source:
    """NIfTI files of any orientation and spacing, as ``g3n forecast`` reads them, on ``grid`` or the whole atlas box at 1 mm.

    ``images`` is a folder (with its ``participants.tsv``, and what ``sessions.tsv`` say of each visit, where they are there) or a table
    with a column ``path``, such as the manifest.tsv of data_prep preprocess. ``table`` has variables by ``path`` (below the folder), ``participant_id`` or ``subject``. With
    ``key`` names are hashed: subjects as data_prep does, scans by their path; visits become 01, 02, ... in the order of their labels, and
    columns that may name somebody (ids, dates, words that are nobody else's) are left out. None keeps all names.
    Scans must look like the encoder's: skull-stripped, if its were; the column ``foreground_ml`` tells. Raises G3nError for no images or tables that do not fit.
    """
    files = _listed(images) if images.is_dir() else _from_table(images)
    root = images if images.is_dir() else _root(images)
    if images.is_dir():
        own = images / "participants.tsv"
        columns = _variables(table or own, files, table is None) if table or own.is_file() else None
        columns = _of_visits(images, files, columns) if table is None else columns
    else:
        columns = files.drop(columns=[c for c in _OF_THE_SCAN if c in files])
        if table is not None:
            raise G3nError(f"'{images}' is a table of variables already; leave out --variables")
    if columns is not None:
        columns = columns if key is None else _unnamed(columns, files)
    grid = grid or WHOLE_BRAIN
    rows, names = _rows(files, columns, key)
    reads = [_file_reader(root / path, grid, row, center) for path, row in zip(files["path"], rows, strict=True)]
    parts = [
        Part(
            f"files-{first // FILES_A_PART:05d}",
            tuple(row["key"] for row in rows[first : first + FILES_A_PART]),
            tuple(reads[first : first + FILES_A_PART]),
        )
        for first in range(0, len(reads), FILES_A_PART)
    ]
    told = {"files": _stamp(root, files["path"]), "rows": _hash(rows), "center": center, "grid_mm": _told(grid)}
    return Source(told, grid, tuple(parts), tuple(names))


def _listed(folder: Path) -> pd.DataFrame:
    """path, subject, session, modality of the NIfTI below a folder; subject is the BIDS label, or the file's own name.

    Of files with BIDS names those that are no T1, T1c, T2 or FLAIR (masks, labels, functional images) are passed over.
    """
    found = sorted(p for p in _below(folder) if p.parts[0] not in _NO_SCANS and not _is_other(p.name))
    if not found:
        raise G3nError(f"folder '{folder}' has no .nii or .nii.gz; give another, or a table with a column 'path'")
    rows = []
    for path in found:
        names = bids_entities(path.name)
        subject = names.get("sub") or str(path).removesuffix(".gz").removesuffix(".nii")
        rows.append((str(path), subject, names.get("ses", ""), modality_of(path.name)))
    return pd.DataFrame(rows, columns=["path", "subject", "session", "modality"])


def _below(folder: Path) -> Iterator[Path]:
    """NIfTI files below a folder, also through links to folders (each folder once), relative to it."""
    seen: set[str] = set()
    for where, inner, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        yield from (Path(where, name).relative_to(folder) for name in files if name.endswith((".nii", ".nii.gz")))


def _is_other(name: str) -> bool:
    return "sub" in bids_entities(name) and modality_of(name) is None


def _from_table(path: Path) -> pd.DataFrame:
    files = _read_table(path)
    if "path" not in files or files["path"].isna().any() or files["path"].duplicated().any() or not len(files):
        raise G3nError(f"'{path}' needs a column 'path' with a different file in each row")
    names = [bids_entities(Path(p).name) for p in files["path"]]
    label = pd.Series([n.get("sub") for n in names], dtype=object)
    for column in ("participant_id", "subject"):
        label = files[column].where(files[column].notna(), label) if column in files else label
    files["subject"] = label.where(label.notna(), files["path"]).astype(str).str.removeprefix("sub-")
    for column, values in (
        ("session", [n.get("ses", "") for n in names]),
        ("modality", [modality_of(Path(p).name) for p in files["path"]]),
    ):
        if column not in files:
            files[column] = values
    return files


def _root(table: Path) -> Path:
    """The folder that paths of a table are below: what the .json beside a manifest says, else the table's own."""
    beside = table.with_suffix(".json")
    try:
        root = json.loads(beside.read_text()).get("root", ".") if beside.is_file() else "."
        return table.parent / str(root)
    except (ValueError, AttributeError, OSError) as error:
        raise G3nError(f"'{beside}' cannot be read; expected the JSON that data_prep writes, or none") from error


def _read_table(path: Path) -> pd.DataFrame:
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ValueError(f"it is larger than {MAX_TABLE_BYTES >> 20} MiB")
        words = dict.fromkeys((*_OF_THE_SCAN, "group"), str)  # so that 01 stays 01
        sep = "," if path.suffix == ".csv" else "\t"
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line with too many cells
            table = pd.read_csv(
                path, sep=sep, dtype=words, na_values=["n/a"], encoding="utf-8-sig", index_col=False, low_memory=False
            )
    except (OSError, ValueError, OverflowError, RecursionError, pd.errors.ParserWarning) as error:
        reason = " ".join(str(error).split())[:200]
        raise G3nError(f"table '{path}' cannot be read ({reason}); expected a .tsv or .csv with a header") from error
    if not all(isinstance(name, str) and name for name in table.columns):
        raise G3nError(f"table '{path}' has a column without a name")
    return table


def _variables(table: Path, files: pd.DataFrame, participants: bool) -> pd.DataFrame:
    """The table's columns, a row a file."""
    given = _read_table(table)
    by = next((name for name in ("path", "participant_id", "subject") if name in given), None)
    if by is None:
        raise G3nError(f"'{table}' has no column path, participant_id or subject to find the scans by")
    keys = given[by].astype(str) if by == "path" else given[by].astype(str).str.removeprefix("sub-")
    if keys.duplicated().any():
        raise G3nError(f"'{table}' has {by} '{keys[keys.duplicated()].iloc[0]}' in two rows")
    wanted = files["path" if by == "path" else "subject"]
    if not wanted.isin(keys).any():
        raise G3nError(f"none of the {by} in '{table}' is that of a scan, such as '{wanted.iloc[0]}'")
    columns = given.set_index(keys).reindex(wanted).reset_index(drop=True)
    columns = columns.drop(columns=[c for c in _OF_THE_SCAN if c in columns])
    if participants:
        columns = columns.rename(
            columns={old: new for old, new in _OURS.items() if old in columns and new not in columns}
        )
    return columns


def _of_visits(root: Path, files: pd.DataFrame, columns: pd.DataFrame | None) -> pd.DataFrame | None:
    """``columns`` with what sub-X/sub-X_sessions.tsv, or else a sessions.tsv of all subjects, say of each visit: that comes first."""
    tables = []
    whole = root / "sessions.tsv"
    paths = [(s, root / f"sub-{s}" / f"sub-{s}_sessions.tsv") for s in files["subject"].unique()]
    for owner, path in [(None, whole), *paths]:
        if not path.is_file():
            continue
        table = _read_table(path)
        name = next((n for n in ("participant_id", "subject") if n in table), None)
        if "session_id" not in table or (owner is None and name is None):
            needed = "session_id" if owner else "session_id and participant_id"
            raise G3nError(f"'{path}' needs {needed}, so that its rows can be told apart")
        table["session"] = table["session_id"].astype(str).str.removeprefix("ses-")
        table["subject"] = owner or table[name].astype(str).str.removeprefix("sub-")
        tables.append(table)
    if not tables:
        return columns
    visits = (
        pd.concat(tables, ignore_index=True).groupby(["subject", "session"], sort=False).last()
    )  # a subject's own file is last
    visits = visits.drop(columns=[c for c in _OF_THE_SCAN if c in visits])
    visits = visits.rename(columns={old: new for old, new in _OURS.items() if old in visits and new not in visits})
    found = visits.reindex(pd.MultiIndex.from_frame(files[["subject", "session"]])).reset_index(drop=True)
    return found if columns is None else found.combine_first(columns.reset_index(drop=True))


def _unnamed(columns: pd.DataFrame, files: pd.DataFrame) -> pd.DataFrame:
    """Without columns that may name somebody."""
    others = [c for c in columns if c not in _NO_NAMES]
    words = [c for c in others if not pd.api.types.is_numeric_dtype(columns[c])]
    most = files["subject"].nunique() / 2
    named = [c for c in others if _NAMING.search(str(c)) or (c in words and columns[c].nunique() > most)]
    return columns.drop(columns=named)


def _rows(
    files: pd.DataFrame, columns: pd.DataFrame | None, key: bytes | None
) -> tuple[list[dict[str, Any]], list[tuple[str, str, str]]]:
    visits: dict[str, list[str]] = {}
    for subject, session in zip(files["subject"], files["session"].fillna(""), strict=True):
        visits.setdefault(subject, []).append(session)
    order = {subject: sorted(set(labels)) for subject, labels in visits.items()}
    told = [{} for _ in range(len(files))] if columns is None else columns.to_dict("records")
    rows: list[dict[str, Any]] = []
    names: list[tuple[str, str, str]] = []
    for i, (path, subject, session) in enumerate(
        zip(files["path"], files["subject"], files["session"].fillna(""), strict=True)
    ):
        modality = told[i].pop("modality", files["modality"].iloc[i])
        group = told[i].pop("group", None)
        number = f"{order[subject].index(session) + 1:02d}"
        hidden = f"sub-{subject if key is None else hash_label(subject, key)}"
        row: dict[str, Any] = {
            "key": path if key is None else f"{hidden}_{hash_label(path, key)}",
            "subject": hidden,
            "group": hidden if _missing(group) else f"sub-{group if key is None else hash_label(group, key)}",
            "session": number if key is not None or not session else session,
            "split": None if _missing(told[i].get("split")) else told[i]["split"],
            "modality": None if _missing(modality) else modality,
        }
        row |= {str(name): None if _missing(v) else v for name, v in told[i].items() if name not in row}
        rows.append(row)
        names.append((str(row["key"]), subject, path))
    return rows, names


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or value == ""


def _file_reader(path: Path, grid: Grid, row: dict[str, Any], center: bool) -> Callable[[], Loaded]:
    def read() -> Loaded:
        try:
            scan = read_scan(path, grid, center)
        except G3nError as error:
            raise LeftOut(str(error)) from error
        foreground_ml = np.count_nonzero(scan.volume) * float(np.prod(grid.spacing_mm)) / 1000
        return Loaded(scan.volume, scan.mean, scan.std, {**row, "foreground_ml": round(foreground_ml, 1)})

    return read


def _stamp(root: Path, paths: Iterable[str]) -> str:
    """One hash of names, sizes and times of files: tells whether any changed, and no name."""
    stats = [(path, (root / path).stat() if (root / path).is_file() else None) for path in paths]
    return _hash([[path, s.st_size, s.st_mtime_ns] if s else [path] for path, s in stats])


def _hash(tree: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(tree, sort_keys=True, default=str).encode())
