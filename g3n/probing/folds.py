"""Who is trained on and who is tested: repeated folds in which no person, family or duplicate is on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from g3n.config import G3nError

GROUP_COLUMNS = ("subject", "group", "family", "duplicate")  # scans that agree in any of these stay together


@dataclass(frozen=True)
class Folds:
    """``fold_RN`` int64: fold of each scan in each repeat. ``judged_RN`` bool: the one scan of each subject that is tested."""

    fold_RN: np.ndarray
    judged_RN: np.ndarray

    @property
    def repeats(self) -> int:
        return len(self.fold_RN)

    @property
    def count(self) -> int:
        return int(self.fold_RN.max()) + 1


def components(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Number of the connected component of each row int64 [N]: rows are linked where they share a value of any column."""
    n = len(table)
    links, start = [], n
    for name in columns:
        codes, levels = pd.factorize(table[name])
        known = np.flatnonzero(codes >= 0)
        links.append(np.stack([known, codes[known] + start]))
        start += len(levels)
    rows, columns_ = np.concatenate(links, axis=1) if links else np.zeros((2, 0), np.int64)
    graph = coo_array((np.ones(len(rows), np.int8), (rows, columns_)), shape=(start, start))
    _, labels = connected_components(graph, directed=False)
    return np.unique(labels[:n], return_inverse=True)[1].astype(np.int64)


def plan_folds(
    group_N: np.ndarray,
    subject_N: np.ndarray,
    stratum_N: np.ndarray,
    count: int,
    repeats: int,
    seed: int,
    whole_N: np.ndarray | None = None,
) -> Folds:
    """``repeats`` divisions of the groups into ``count`` folds, and a scan of each subject to test in each, all drawn by ``seed``.

    Groups are dealt in the order of the stratum of one of their tested scans, so that folds are alike in classes. With ``whole_N``
    (a site of each scan) its levels stay whole instead, the largest first into the fold that has the fewest scans.
    Raises ValueError for fewer groups or levels than folds.
    """
    keys, of_row = np.unique(group_N, return_inverse=True)
    if whole_N is not None:
        keys, of_row = np.unique(whole_N, return_inverse=True)
    if len(keys) < count:
        raise ValueError(f"{len(keys)} groups for {count} folds")
    _, of_subject = np.unique(subject_N, return_inverse=True)
    fold, judged = [], []
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        order = rng.permutation(len(group_N))
        _, first = np.unique(of_subject[order], return_index=True)
        chosen = np.zeros(len(group_N), bool)
        chosen[order[first]] = True
        judged.append(chosen)
        of_key = _whole(of_row, count, rng) if whole_N is not None else _dealt(of_row, stratum_N, chosen, count, rng)
        fold.append(of_key[of_row])
    return Folds(np.stack(fold), np.stack(judged))


def _dealt(
    of_row: np.ndarray, stratum_N: np.ndarray, chosen: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    rows = rng.permutation(np.flatnonzero(chosen))
    groups, first = np.unique(of_row[rows], return_index=True)
    strata = stratum_N[rows[first]]
    order = np.lexsort((rng.permutation(len(groups)), strata))
    found = np.empty(len(groups), np.int64)
    found[order] = (np.arange(len(groups)) + rng.integers(count)) % count
    return found


def _whole(of_row: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    sizes = np.bincount(of_row)
    found, filled = np.empty(len(sizes), np.int64), np.zeros(count)
    for key in np.lexsort((rng.permutation(len(sizes)), -sizes)):
        lightest = np.flatnonzero(filled == filled.min())
        found[key] = rng.choice(lightest)
        filled[found[key]] += sizes[key]
    return found


def write_folds(path: Path, keys: Sequence[str], folds: Folds) -> None:
    """CSV, a row a scan: ``key``, then ``fold_<r>`` and ``tested_<r>`` (1 where the scan is its subject's) of each repeat. Atomic."""
    columns: dict[str, object] = {"key": list(keys)}
    for r in range(folds.repeats):
        columns |= {f"fold_{r}": folds.fold_RN[r], f"tested_{r}": folds.judged_RN[r].astype(int)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    pd.DataFrame(columns).to_csv(part, index=False)
    part.replace(path)


def read_folds(path: Path, keys: Sequence[str], group_N: np.ndarray) -> Folds:
    """Folds of exactly these scans, as ``write_folds`` left them. Raises G3nError where the file lacks a scan or splits a group."""
    try:
        table = pd.read_csv(path, dtype={"key": str}).set_index("key")
        repeats = sum(name.startswith("fold_") for name in table.columns)
        missing = len(set(keys) - set(table.index))
        if missing or not table.index.is_unique or not repeats:
            raise G3nError(
                f"folds '{path}' lack {missing} of the {len(keys)} scans; leave out --splits to draw new ones"
            )
        rows = table.loc[list(keys)]
        fold = np.stack([rows[f"fold_{r}"].to_numpy(np.int64) for r in range(repeats)])
        judged = np.stack([rows[f"tested_{r}"].to_numpy(np.int64) == 1 for r in range(repeats)])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise G3nError(f"folds '{path}' cannot be read ({error}); expected key, fold_0, tested_0, ...") from error
    for row in fold:
        if row.min() < 0 or len(np.unique(np.stack([row, group_N]), axis=1).T) != len(np.unique(group_N)):
            raise G3nError(f"folds '{path}' have a person or family in two folds; leave out --splits to draw new ones")
    return Folds(fold, judged)
