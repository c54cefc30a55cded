"""Features on disk are what was written, and nothing else is taken for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from g3n.config import G3nError
from g3n.features import Features, join_features, read_about, read_features, write_features


def made(n: int = 5) -> Features:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "key": [f"sub-{i:016x}_ses-01_T1" for i in range(n)],
            "subject": [f"sub-{i:016x}" for i in range(n)],
            "age_years": [60.5 + i if i else None for i in range(n)],
            "sex": ["F" if i % 2 else None for i in range(n)],
        }
    )
    arrays = {
        "mean": rng.standard_normal((n, 7), np.float32),
        "latent": rng.standard_normal((n, 3)).astype(np.float32),
    }
    return Features(table, arrays, {"encoder": "0123456789abcdef"})


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    first = made(5000)  # more than one row group
    write_features(tmp_path / "features.parquet", first)
    second = read_features(tmp_path / "features.parquet")
    pd.testing.assert_frame_equal(first.table, second.table)
    assert list(second.arrays) == ["mean", "latent"]
    assert second.about == first.about
    for kind in first.arrays:
        assert second.array(kind).dtype == np.float32
        np.testing.assert_array_equal(first.array(kind), second.array(kind))
    alone = read_features(tmp_path / "features.parquet", ["latent"])
    assert list(alone.arrays) == ["latent"]
    pd.testing.assert_frame_equal(alone.table, first.table)
    with pytest.raises(G3nError, match="did you mean 'mean'"):
        read_features(tmp_path / "features.parquet", ["meen"])
    # without g3n
    assert pd.read_parquet(tmp_path / "features.parquet")["mean"][3].tolist() == first.array("mean")[3].tolist()


def test_no_scan_at_all_keeps_the_width(tmp_path: Path) -> None:
    empty = Features(made(1).table.iloc[:0], {"mean": np.zeros((0, 7), np.float32)}, {})
    write_features(tmp_path / "f.parquet", empty)
    assert read_features(tmp_path / "f.parquet").array("mean").shape == (0, 7)


def test_what_does_not_fit_is_not_written(tmp_path: Path) -> None:
    good = made()
    for bad in (
        Features(good.table, {"mean": np.zeros((4, 7), np.float32)}, {}),
        Features(good.table, {"age_years": np.zeros((5, 7), np.float32)}, {}),
        Features(good.table.assign(key="same"), good.arrays, {}),
    ):
        with pytest.raises(ValueError, match=r"expected|unique"):
            write_features(tmp_path / "f.parquet", bad)
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    made().table.to_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no parquet")
    write_features(tmp_path / "f.parquet", made())
    whole = (tmp_path / "f.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name in ("other", "text", "cut", "missing"):
        with pytest.raises(G3nError, match="g3n embed"):
            read_features(tmp_path / f"{name}.parquet")
    with pytest.raises(G3nError, match=r"'meen'.*mean"):
        read_features(tmp_path / "f.parquet").array("meen")


def test_joined_files_are_one_after_the_other(tmp_path: Path) -> None:
    whole = made(9)
    table = whole.table.assign(scanner=[None] * 4 + [3, "GE", None, None, None])
    empty = Features(table.iloc[:0], {}, {})
    pieces = [
        Features(table.iloc[:4].dropna(axis=1, how="all"), {k: a[:4] for k, a in whole.arrays.items()}, {}),
        empty,
        Features(table.iloc[4:5], {k: a[4:5] for k, a in whole.arrays.items()}, {}),
        Features(table.iloc[5:], {k: a[5:] for k, a in whole.arrays.items()}, {}),
    ]
    paths = [tmp_path / f"{i}.parquet" for i in range(4)]
    for path, piece in zip(paths, pieces, strict=True):
        write_features(path, piece)
    assert join_features(paths, tmp_path / "all.parquet", whole.about) == 9
    joined = read_features(tmp_path / "all.parquet")
    assert read_about(tmp_path / "all.parquet") == ({"encoder": "0123456789abcdef"}, 9, {"mean": 7, "latent": 3})
    for kind in whole.arrays:
        np.testing.assert_array_equal(joined.array(kind), whole.array(kind))
    pd.testing.assert_frame_equal(joined.table[list(whole.table.columns)], whole.table)
    assert joined.table["scanner"].tolist()[3:6] == [None, "3", "GE"]
    with pytest.raises(ValueError, match="unique"):
        join_features([paths[0], paths[0]], tmp_path / "all.parquet", {})
    with pytest.raises(G3nError, match="g3n embed"):
        read_about(tmp_path / "none.parquet")
