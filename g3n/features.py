"""Features of scans on disk: one Parquet file, a row a scan, readable by pandas, polars, DuckDB or R without g3n."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from g3n.config import G3nError, did_you_mean

FORMAT = "g3n-features-1"
MAX_BYTES = 1 << 36
ROWS_AT_ONCE = 4096  # of a row group


@dataclass(frozen=True)
class Features:
    """``table`` has a row a scan: ``key`` (unique text), ``subject`` and whatever is known of it (session, split, variables);
    ``arrays`` maps a kind of features (mean, cls, latent, ...) to float32 [n, d]; ``about`` says what made them."""

    table: pd.DataFrame
    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.table)

    def array(self, kind: str) -> np.ndarray:
        """float32 [n, d]. Raises G3nError where there is no such kind."""
        if kind not in self.arrays:
            raise G3nError(f"features '{kind}' are not there{did_you_mean(kind, list(self.arrays))}")
        return self.arrays[kind]


def write_features(path: Path, features: Features) -> None:
    """Atomic. Raises ValueError where arrays and table do not fit each other, keys repeat or a name is used twice."""
    import pyarrow as pa
    from pyarrow import parquet

    n = len(features.table)
    shapes = {kind: array.shape for kind, array in features.arrays.items()}
    if any(len(shape) != 2 or shape[0] != n for shape in shapes.values()):
        raise ValueError(f"features have shapes {shapes}; expected [{n}, d] for a table of {n} rows")
    if features.table["key"].duplicated().any() or set(shapes) & set(features.table.columns):
        raise ValueError("keys must be unique and no kind of features may bear the name of a column")
    arrow = pa.Table.from_pandas(features.table, preserve_index=False).replace_schema_metadata(None)
    for kind, array in features.arrays.items():
        flat = pa.array(np.ascontiguousarray(array, np.float32).reshape(-1))
        arrow = arrow.append_column(kind, pa.FixedSizeListArray.from_arrays(flat, array.shape[1]))
    about = {"format": FORMAT, "kinds": list(features.arrays), **features.about}
    arrow = arrow.replace_schema_metadata({"g3n": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    parquet.write_table(arrow, part, compression="zstd", row_group_size=ROWS_AT_ONCE)
    part.replace(path)


def join_features(paths: Sequence[Path], output: Path, about: Mapping[str, Any]) -> int:
    """One file of several, in their order, without holding more than one of them (and all tables); the number of rows. Atomic.

    A column that one file lacks is null there; one with words in any file is text. Files without rows may lack arrays. Raises ValueError where
    keys repeat or arrays differ in kinds or widths, G3nError as ``read_features`` does.
    """
    import pyarrow as pa
    from pyarrow import parquet

    tables: list[pd.DataFrame] = []
    widths: dict[str, int] = {}
    for path in paths:
        tables.append(read_features(path, []).table)
        widths.update(read_about(path)[2] if len(tables[-1]) else {})
    filled = [table.dropna(axis="columns", how="all") for table in tables if len(table)]
    columns = list(dict.fromkeys(column for table in tables for column in table.columns))
    whole = pd.concat(filled, ignore_index=True).reindex(columns=columns) if filled else tables[0]
    if whole["key"].duplicated().any():
        raise ValueError("keys must be unique")
    for column in whole.columns:
        if whole[column].map(lambda value: isinstance(value, str)).any():
            whole[column] = whole[column].map(lambda value: None if pd.isna(value) else str(value))
    arrow = pa.Table.from_pandas(whole, preserve_index=False).replace_schema_metadata(None)
    fields = [*arrow.schema, *(pa.field(kind, pa.list_(pa.float32(), width)) for kind, width in widths.items())]
    told = json.dumps({"format": FORMAT, "kinds": list(widths), **about})
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.part")
    first = 0
    with parquet.ParquetWriter(part, pa.schema(fields, {"g3n": told}), compression="zstd") as writer:
        for path, table in zip(paths, tables, strict=True):
            if len(table):
                arrays = read_features(path).arrays
                rows = arrow.slice(first, len(table))
                for kind, width in widths.items():
                    flat = pa.array(arrays[kind].reshape(-1))
                    rows = rows.append_column(kind, pa.FixedSizeListArray.from_arrays(flat, width))
                writer.write_table(rows.replace_schema_metadata({"g3n": told}), row_group_size=ROWS_AT_ONCE)
            first += len(table)
    part.replace(output)
    return first


def read_about(path: Path) -> tuple[dict[str, Any], int, dict[str, int]]:
    """``about`` of a file, its number of rows and the width of each kind, without reading them. Raises G3nError as ``read_features`` does."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.read_metadata(path)
        about = json.loads(found.metadata[b"g3n"])
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        schema = found.schema.to_arrow_schema()
        return about, found.num_rows, {kind: schema.field(kind).type.list_size for kind in about.pop("kinds")}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowInvalid) as error:
        raise _no_features(path, error) from error


def read_features(path: Path, kinds: Sequence[str] | None = None) -> Features:
    """All kinds, or those named. Raises G3nError where the file is missing, over 64 GiB or no Parquet file of ours, or lacks a kind."""
    import pyarrow as pa
    from pyarrow import parquet

    about, _, widths = read_about(path)
    for kind in kinds or ():
        if kind not in widths:
            raise G3nError(f"features '{kind}' are not in '{path}'{did_you_mean(kind, list(widths))}")
    wanted = list(widths) if kinds is None else list(kinds)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise G3nError(f"features '{path}' are larger than {MAX_BYTES >> 30} GiB; split them into several files")
        columns = [name for name in parquet.read_schema(path).names if name in wanted or name not in widths]
        arrow = parquet.read_table(path, columns=columns)
        arrays = {name: _matrix(arrow.column(name)) for name in wanted}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowInvalid) as error:
        raise _no_features(path, error) from error
    return Features(arrow.drop_columns(wanted).to_pandas(), arrays, about)


def _no_features(path: Path, error: Exception) -> G3nError:
    reason = " ".join(str(error).split())[:200]
    return G3nError(f"features '{path}' are no {FORMAT} file ({reason}); write one with g3n embed")


def _matrix(column: Any) -> np.ndarray:
    whole = column.combine_chunks()
    return np.asarray(whole.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(
        len(whole), column.type.list_size
    )
