"""Features of scans on disk: one Parquet file, a row a scan, readable by pandas, polars, DuckDB or R without g3n."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def read_features(path: Path) -> Features:
    """Raises G3nError where the file is missing, over 64 GiB or no Parquet file of ours."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.stat().st_size > MAX_BYTES:
            raise G3nError(f"features '{path}' are larger than {MAX_BYTES >> 30} GiB; split them into several files")
        arrow = parquet.read_table(path)
        about = json.loads((arrow.schema.metadata or {})[b"g3n"])
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        kinds = {name: _matrix(arrow.column(name)) for name in about.pop("kinds")}
    except (OSError, KeyError, ValueError, TypeError, AttributeError, pa.ArrowInvalid) as error:
        raise G3nError(f"features '{path}' are no {FORMAT} file ({error}); write one with g3n embed") from error
    return Features(arrow.drop_columns(list(kinds)).to_pandas(), kinds, about)


def _matrix(column: Any) -> np.ndarray:
    whole = column.combine_chunks()
    return np.asarray(whole.flatten().to_numpy(zero_copy_only=False), np.float32).reshape(
        len(whole), column.type.list_size
    )
