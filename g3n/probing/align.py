"""Which scans all encoders share, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from g3n.config import G3nError, did_you_mean
from g3n.features import Features
from g3n.probing.fits import MAX_WIDTH
from g3n.probing.folds import GROUP_COLUMNS, components
from g3n.probing.tasks import Task

AGE, SEX = ("age_years", "age"), "sex"  # columns of the baseline
BASELINES = ("age + sex", "age", "sex")  # its names, by what is known


@dataclass(frozen=True)
class Encoder:
    """One kind of features of one file, [N, d], for the rows of the common table."""

    name: str
    kind: str
    array: np.ndarray


@dataclass(frozen=True)
class Scans:
    """What all encoders share: ``table`` a row a scan, ``group_N`` whom each is grouped with, and notes on what was left out."""

    table: pd.DataFrame
    group_N: np.ndarray
    encoders: tuple[Encoder, ...]
    notes: tuple[str, ...]


def align(sources: Mapping[str, Features], kinds: Sequence[str] = ()) -> Scans:
    """Scans that all files have; of ``kinds`` those that a file has, without any the mean. A file of one kind gives that one.

    Raises G3nError for no scan, a kind that no file has, and files that tell different things of a scan.
    """
    known = sorted({kind for features in sources.values() for kind in features.arrays})
    for kind in kinds:
        if kind not in known:
            raise G3nError(f"'{kind}' is no kind of features of {' or '.join(sources)}{did_you_mean(kind, known)}")
    first_name, first = next(iter(sources.items()))
    keys = first.table["key"].astype(str)
    common = set(keys).intersection(*(set(f.table["key"].astype(str)) for f in sources.values()))
    if not common:
        raise G3nError(
            f"features of {' and '.join(sources)} have no scan in common; are they of the same cohort and recipe?"
        )
    rows = np.flatnonzero(keys.isin(common))
    table = first.table.iloc[rows].reset_index(drop=True).assign(key=keys.iloc[rows].to_numpy())
    encoders, notes = [], []
    for name, features in sources.items():
        place = pd.Series(np.arange(len(features)), index=features.table["key"].astype(str))
        own = place.loc[table["key"]].to_numpy()
        _compare(table, features.table.iloc[own].reset_index(drop=True), first_name, name)
        if len(features) > len(common):
            notes.append(f"{len(features) - len(common)} scans of {name} are not in all files and left out")
        used = _kinds(name, list(features.arrays), kinds)
        encoders += [Encoder(name, kind, features.array(kind)[own]) for kind in used]
        wide = [kind for kind in used if features.array(kind).shape[1] > MAX_WIDTH]
        notes += [f"{name} {kind}: {MAX_WIDTH} principal axes of its columns are probed" for kind in wide]
    if "subject" not in table:
        notes.append("no column 'subject': each scan counts as a person of its own")
        table = table.assign(subject=table["key"])
    group = components(table, [c for c in GROUP_COLUMNS if c in table])
    return Scans(table, group, tuple(encoders), tuple(notes))


def _kinds(name: str, there: list[str], asked: Sequence[str]) -> list[str]:
    default = "mean" if "mean" in there or len(there) > 1 else there[0]
    used = [kind for kind in asked or [default] if kind in there] or (there if len(there) == 1 else [])
    if not used:
        raise G3nError(
            f"{name} has no features {' or '.join(asked or [default])}; give --kind, known: {', '.join(there)}"
        )
    return used


def _compare(one: pd.DataFrame, other: pd.DataFrame, one_name: str, other_name: str) -> None:
    for column in set(one) & set(other) - {"key"}:
        a, b = one[column], other[column]
        differ = int((~((a == b) | (a.isna() & b.isna()))).sum())
        if differ:
            raise G3nError(
                f"{one_name} and {other_name} differ in '{column}' of {differ} of {len(one)} scans; they are of different recipes"
            )


def baseline(scans: Scans, task: Task) -> Encoder | None:
    """Age and sex of all rows, the mean where unknown; None where one of them is the target or none is there."""
    age = next((c for c in AGE if c in scans.table), None)
    if task.target in (age, SEX):
        return None
    columns = {}
    if age is not None:
        columns["age"] = pd.to_numeric(scans.table[age], errors="coerce").to_numpy(np.float64)
    if SEX in scans.table:
        first = scans.table[SEX].astype(str).str.lower().str[:1]  # F, f, female
        columns["sex"] = first.map({"f": 0.0, "m": 1.0}).to_numpy(np.float64)
    known = {name: values for name, values in columns.items() if np.isfinite(values).any()}
    if not known:
        return None
    filled = [np.where(np.isfinite(values), values, np.nanmean(values)) for values in known.values()]
    return Encoder(" + ".join(known), "", np.stack(filled, axis=1).astype(np.float32))
