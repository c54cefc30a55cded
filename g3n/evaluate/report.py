"""Tables and JSON files of an evaluation."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from g3n.config import G3nError
from g3n.evaluate.intervals import LEVEL, Interval, mean
from g3n.stream.samples import subject_of

_LOG_WIDTH = 140  # of a table that goes to a file


def write_json(path: Path, tree: Any) -> None:
    """Atomic; not-a-number becomes null, an ``Interval`` an object with its fields."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(_finite(tree), indent=1) + "\n")
    part.replace(path)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float | Mapping[str, Any]]]:
    """The figures of a tree of metrics by path: numbers, and objects with ``value``, ``low`` and ``high`` whole; no words."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            ends = [value.get(end, "") for end in ("value", "low", "high")]
            if all(end is None or isinstance(end, (int, float)) for end in ends):
                yield path, value
            else:
                yield from leaves(value, f"{path}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield path, value


def claim(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """Make ``folder`` the place of what ``recipe`` gives; True where an earlier call with the same recipe has begun there.

    Raises G3nError where it holds anything else.
    """
    plan = folder / "recipe.json"
    if plan.is_file() and json.loads(plan.read_text()) == json.loads(json.dumps(_finite(recipe))):
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise G3nError(f"'{folder}' holds something else; give a new folder")
    write_json(plan, recipe)
    return False


def _finite(value: Any) -> Any:
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; the columns are the first row's keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def means(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    """The mean of each column."""
    return {c: float(np.mean([row[c] for row in rows])) for c in columns}


def means_by(rows: Sequence[Mapping[str, Any]], group: str, columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means of each column for each value of ``group``, with the count ``n``."""
    values = sorted({str(row[group]) for row in rows})
    parts = {v: [row for row in rows if str(row[group]) == v] for v in values}
    return {v: {"n": len(part), **means(part, columns)} for v, part in parts.items()}


def print_means(title: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """A table with one line a group."""
    table = Table(title=title, title_justify="left")
    columns = list(next(iter(groups.values())))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in groups.items():
        table.add_row(name, *(f"{row[c]:d}" if isinstance(row[c], int) else f"{row[c]:.3f}" for c in columns))
    Console().print(table)


def intervals(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Interval]:
    """The mean of each column with its bootstrap interval over subjects; rows hold the sample's ``key``."""
    subjects = [subject_of(row["key"]) for row in rows]
    return {c: mean([row[c] for row in rows], subjects) for c in columns}


def intervals_by(
    rows: Sequence[Mapping[str, Any]], group: str, columns: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """``intervals`` for each value of ``group``."""
    values = sorted({str(row[group]) for row in rows})
    return {v: intervals([row for row in rows if str(row[group]) == v], columns) for v in values}


def print_intervals(title: str, groups: Mapping[str, Mapping[str, Interval]]) -> None:
    """A table with one line a group, and how many rows of how many subjects each rests on."""
    table = Table(title=f"{title}, {LEVEL:.0%} intervals", title_justify="left", box=box.SIMPLE)
    columns = list(next(iter(groups.values())))
    table.add_column("")
    table.add_column("n (subjects)", justify="right")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right", overflow="fold")
    for name, row in groups.items():
        first = row[columns[0]]
        table.add_row(
            name, f"{first.n} ({first.subjects})", *(escape(str(row[c]).replace(" [", "\n[")) for c in columns)
        )
    console = Console()
    console.print(table) if console.is_terminal else Console(width=_LOG_WIDTH).print(table)
