"""Anyone's features and targets: Parquet or npz, and a CSV or TSV of what is known of each scan."""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from g3n.config import G3nError, did_you_mean
from g3n.features import MAX_BYTES, Features, read_features
from g3n.probing.folds import GROUP_COLUMNS
from g3n.probing.tasks import NOT_TARGETS, Task

MAX_TABLE_BYTES = 1 << 30
MOST_CODES = 10  # whole numbers with at most so many values are classes
MOST_LEVELS = 20  # more words than these are names or free text
_MISSING = ["", "n/a", "N/A", "NA", "nan", "NaN", "null", "NULL", "None"]
_KNOWN = (
    "key",
    "session",
    "modality",
    "cohort",
    "split",
    "site",
    *GROUP_COLUMNS,
)  # columns that are no targets by themselves
_DAMAGED = (
    OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, NotImplementedError, RuntimeError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Targets:
    """``table`` has the ids as text in its column ``id``; ``tasks`` are one a column, ``why`` says how each was understood."""

    table: pd.DataFrame
    tasks: dict[str, Task]
    why: dict[str, str]


def read_any(path: Path, id_column: str) -> Features:
    """Features of ours, of any Parquet (a column of ids, and a list column ``features`` or all numeric columns), or of an npz with
    ``features`` [n, d] and ``ids`` [n]. Kind ``features`` for the last two. Raises G3nError for a file that is missing, too large,
    not one of these, has repeated ids, or values that are not finite."""
    if not path.is_file():
        raise G3nError(f"features '{path}' do not exist")
    if path.suffix == ".npz":
        ids, array = _read_npz(path)
    elif _is_ours(path):
        return read_features(path)
    else:
        ids, array = _read_parquet(path, id_column)
    return Features(pd.DataFrame({"key": ids}), {"features": checked(path, ids, array)}, {})


def checked(path: Path, ids: Sequence[str], array: np.ndarray) -> np.ndarray:
    """float32 [n, d]. Raises G3nError for other shapes, repeated ids, no numbers, or numbers that are not finite."""
    if array.ndim != 2 or len(array) != len(ids) or not array.size or array.dtype.kind not in "fiu":
        raise G3nError(
            f"features '{path}' are {array.dtype} {list(array.shape)} for {len(ids)} ids; expected numbers [{len(ids)}, d]"
        )
    if len(set(ids)) < len(ids):
        raise G3nError(f"features '{path}' have {len(ids) - len(set(ids))} ids more than once; give each scan one row")
    array = np.asarray(array, np.float32)
    bad = int((~np.isfinite(array)).any(axis=1).sum())
    if bad:
        raise G3nError(
            f"features '{path}' have {bad} of {len(array)} rows with NaN or infinite values; leave these out"
        )
    return array


def _is_ours(path: Path) -> bool:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        about = (parquet.read_schema(path).metadata or {}).get(b"g3n")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise G3nError(f"features '{path}' are no Parquet file ({_line(error)}); expected .parquet or .npz") from error
    return about is not None


def _read_parquet(path: Path, id_column: str) -> tuple[list[str], np.ndarray]:
    import pyarrow as pa
    from pyarrow import parquet

    if path.stat().st_size > MAX_BYTES:
        raise G3nError(f"features '{path}' are larger than {MAX_BYTES >> 30} GiB; split them into several files")
    try:
        table = parquet.read_table(path)
        name = next((n for n in (id_column, "ids", "id", "key") if n in table.column_names), None)
        if name is None:
            known = did_you_mean(id_column, table.column_names)
            raise G3nError(f"features '{path}' have no column of ids '{id_column}'{known}")
        ids = [str(i) for i in table.column(name).to_pylist()]
        if "features" in table.column_names:
            return ids, np.asarray(table.column("features").to_pylist(), np.float32)
        frame = table.drop_columns([name]).to_pandas().select_dtypes("number")
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException) as error:
        raise G3nError(f"features '{path}' cannot be read ({_line(error)}); expected ids and numbers") from error
    if not len(frame.columns):
        raise G3nError(f"features '{path}' have no numeric column besides '{name}'")
    return ids, frame.to_numpy(np.float32)


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            missing = [name for name in ("features", "ids") if f"{name}.npy" not in archive.namelist()]
            if not missing:
                _check_sizes(archive)
        if size > MAX_BYTES:
            raise G3nError(f"features '{path}' are larger than {MAX_BYTES >> 30} GiB; split them into several files")
        if missing:
            words = " and ".join(missing)
            raise G3nError(f"features '{path}' lack the array {words}; expected features [n, d], ids [n]")
        with np.load(path, allow_pickle=False) as arrays:
            ids, array = arrays["ids"], arrays["features"]
    except _DAMAGED as error:
        why = _line(error)
        raise G3nError(
            f"features '{path}' are no npz of plain arrays ({why}); expected features [n, d], ids [n]"
        ) from error
    if ids.ndim != 1 or ids.dtype.kind not in "USiu":
        raise G3nError(f"ids of '{path}' are {ids.dtype} {list(ids.shape)}; expected text or whole numbers [n]")
    return [i.decode("utf-8", "replace") if isinstance(i, bytes) else str(i) for i in ids.tolist()], array


def _check_sizes(archive: zipfile.ZipFile) -> None:
    """Raises ValueError where a header announces more than is there: numpy makes room before it reads."""
    for name in ("features.npy", "ids.npy"):
        with archive.open(name) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            rest = archive.getinfo(name).file_size - file.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != rest:
            raise ValueError(f"{name} is {dtype} {list(shape)} in {rest} bytes")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_targets(path: Path, id_column: str, folds: int) -> Targets:
    """A CSV, or TSV by its suffix. Raises G3nError for a file that cannot be read, no such column, or repeated ids."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise G3nError(f"targets '{path}' are larger than {MAX_TABLE_BYTES >> 30} GiB")
        comma = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line with more cells than the header
            table = pd.read_csv(
                path,
                sep=comma,
                dtype=str,
                index_col=False,
                encoding="utf-8-sig",
                keep_default_na=False,
                na_values=_MISSING,
            )
    except (OSError, UnicodeDecodeError, ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise G3nError(
            f"targets '{path}' cannot be read ({_line(error)}); expected CSV or TSV with a header line"
        ) from error
    table.columns = [str(name).strip() for name in table.columns]
    if id_column not in table.columns:
        raise G3nError(f"targets '{path}' have no column '{id_column}'{did_you_mean(id_column, list(table.columns))}")
    table = table[table[id_column].notna()].rename(columns={id_column: "id"})
    repeated = int(table["id"].duplicated().sum())
    if repeated:
        raise G3nError(f"targets '{path}' have {repeated} ids more than once in '{id_column}'; give each one row")
    tasks, why = {}, {}
    for name in table.columns:
        if name == "id":
            continue
        column = table[name].str.strip()
        numbers = pd.to_numeric(column, errors="coerce")
        if bool((numbers.notna() == column.notna()).all()):
            table[name] = numbers
        if name in _KNOWN or name in NOT_TARGETS:
            continue
        task, why[name] = understood(name, table[name], folds)
        if task is not None:
            tasks[name] = task
    return Targets(table, tasks, why)


def understood(name: str, column: pd.Series, folds: int) -> tuple[Task | None, str]:
    """A task of a column of targets, and how it was understood."""
    known = column.dropna()
    if pd.api.types.is_numeric_dtype(column):
        values = np.unique(known.to_numpy(np.float64))
        whole = bool((values == np.round(values)).all())
        if whole and 2 <= len(values) <= MOST_CODES:
            classes: dict[str, tuple[Any, ...]] = {f"{v:g}": (float(v), float(v)) for v in values}
            return Task(name, classes=classes), f"classes: {len(values)} whole numbers"
        return Task(name), "number"
    counts = known.value_counts()
    if len(counts) > MOST_LEVELS:
        return None, f"{len(counts)} different words, taken for names or text (at most {MOST_LEVELS} are classes)"
    kept = sorted(str(level) for level in counts.index[counts >= folds])
    rare = sorted(str(level) for level in counts.index[counts < folds])
    left = f"; left out as rarer than {folds}: {', '.join(rare)}" if rare else ""
    if len(kept) < 2:
        return None, f"fewer than two words with {folds} scans each"
    return Task(name, classes=tuple(kept)), f"classes: {len(kept)} words{left}"


def joined(features: Features, targets: Targets, path: Path) -> Features:
    """Features of scans that the targets name, by ``key`` or (where none agrees) by ``subject``; columns of the targets replace
    those of the features. Raises G3nError where no id agrees."""
    for name in ("key", "subject"):
        if name not in features.table:
            continue
        ids = features.table[name].astype(str)
        rows = np.flatnonzero(ids.isin(targets.table["id"]))
        if len(rows):
            known = targets.table.set_index("id").loc[list(ids.iloc[rows])].reset_index(drop=True)
            known = known.drop(columns=[c for c in ("key",) if c in known])
            own = features.table.iloc[rows].reset_index(drop=True)
            table = pd.concat([own.drop(columns=[c for c in known if c in own]), known], axis=1)
            return Features(table, {kind: a[rows] for kind, a in features.arrays.items()}, features.about)
    example = targets.table["id"].iloc[0] if len(targets.table) else "none"
    raise G3nError(
        f"no id of the targets (such as '{example}') is among those of '{path}' (such as '{features.table['key'].iloc[0]}')"
    )
