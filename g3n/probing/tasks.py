"""The table of probing tasks (configs/probes.yaml), and which scans of a table of features each rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from g3n.config import G3nError, build, did_you_mean, read_yaml
from g3n.probing.folds import GROUP_COLUMNS
from g3n.probing.scores import CLASS_METRICS, NUMBER_METRICS

NOT_TARGETS = ("key", "split", "site", *GROUP_COLUMNS)
Values = tuple[Any, ...]  # two numbers are a range, both ends included; words are levels


@dataclass(frozen=True)
class Task:
    """``target`` is a column of the table: a number to regress, or with ``classes`` (name -> levels or range, or a list of levels)
    classes to tell apart, of which the last of two is the positive one. ``modalities`` are probed one by one."""

    target: str
    cohorts: tuple[str, ...] = ()  # all
    modalities: tuple[str, ...] = ()  # all together
    classes: tuple[str, ...] | dict[str, Values] = ()
    where: dict[str, Values] = field(default_factory=dict)
    metric: Literal["auroc", "balanced_accuracy", "auprc", "mae", "r", "r2"] | None = None  # of the figure
    leave_out: Literal["site", "cohort"] | None = None  # also test on sites that no training scan comes from
    shuffled: bool = False  # labels dealt anew among people: a null, which no probe may find
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) == 1:
            raise ValueError("one class; give two or more, or none to regress a number")
        known = CLASS_METRICS if self.classes else NUMBER_METRICS
        if self.metric is not None and self.metric not in known:
            raise ValueError(f"metric '{self.metric}' does not fit the target; expected one of {', '.join(known)}")
        for name, values in [*self.where.items(), *self.levels.items()]:
            if not values or (not all(isinstance(v, str) for v in values) and not _is_range(values)):
                raise ValueError(f"'{name}' is {list(values)}; expected words, or two numbers from low to high")

    @property
    def levels(self) -> dict[str, Values]:
        return self.classes if isinstance(self.classes, dict) else {name: (name,) for name in self.classes}

    @property
    def shown(self) -> str:
        return self.metric or ("auroc" if self.classes else "r")


@dataclass(frozen=True)
class Selection:
    """Scans of one task and modality: ``rows`` of the table, ``y_N`` (numbers, or codes of ``names``)."""

    rows: np.ndarray
    y_N: np.ndarray
    names: tuple[str, ...]  # of classes; none for a number

    @property
    def classes(self) -> int:
        return max(len(self.names), 1)


class CannotRun(Exception):
    """Why a task does not run on these scans."""


def read_tasks(path: Path, only: Sequence[str] = ()) -> dict[str, Task]:
    """Tasks by name. Raises G3nError for unknown keys, wrong values, and names in ``only`` that the file lacks."""
    raw = read_yaml(path)
    for key in raw:
        if key != "tasks":
            raise G3nError(f"'{path}' has the key '{key}'; expected tasks alone")
    tasks = raw.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        raise G3nError(f"'{path}' has no tasks; expected tasks: with a mapping a task")
    found = {str(name): build(Task, task, f"tasks.{name}") for name, task in tasks.items()}
    return chosen(found, only)


def chosen(tasks: dict[str, Task], only: Sequence[str]) -> dict[str, Task]:
    """Those named, all where none is. Raises G3nError for a name that is not there."""
    for name in only:
        if name not in tasks:
            raise G3nError(f"task '{name}' is not there{did_you_mean(name, list(tasks))}")
    return {name: task for name, task in tasks.items() if not only or name in only}


def _is_range(values: Values) -> bool:
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return len(values) == len(numbers) == 2 and numbers[0] <= numbers[1]


def matches(column: pd.Series, values: Values) -> np.ndarray:
    """bool [N]; a missing value matches nothing."""
    if _is_range(values):
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        return np.asarray((numbers >= values[0]) & (numbers <= values[1]))
    return np.asarray(column.isin(list(values)))


def select(task: Task, table: pd.DataFrame, modality: str | None, group_N: np.ndarray, folds: int) -> Selection:
    """The scans of a task. Raises CannotRun with why where it cannot run on them."""
    use = np.ones(len(table), bool)
    if task.cohorts:
        use &= matches(_column(table, "cohort"), task.cohorts)
        if not use.any():
            raise CannotRun(f"no scan of {' or '.join(task.cohorts)}")
    if modality is not None:
        use &= matches(_column(table, "modality"), (modality,))
        if not use.any():
            raise CannotRun(f"no {modality} scan of these cohorts")
    for name, values in task.where.items():
        use &= matches(_column(table, name), values)
        if not use.any():
            raise CannotRun(f"no scan where {name} is {_words(values)}")
    if task.target in NOT_TARGETS:
        raise CannotRun(f"refused: '{task.target}' says whose scan it is, which is what the folds are made of")
    column = _column(table, task.target)
    if task.classes:
        y = np.full(len(table), -1)
        for code, values in enumerate(task.levels.values()):
            y[matches(column, values)] = code
        use &= y >= 0
    else:
        y = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        use &= np.isfinite(y)
    rows = np.flatnonzero(use)
    _refuse_leaks(task, table, rows, y[rows])
    if task.shuffled:
        y[rows] = _shuffled(y[rows], group_N[rows])
    _refuse_few(task, y[rows], group_N[rows], folds)
    return Selection(rows, y[rows], tuple(task.levels))


def _shuffled(y: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Every group bears the label that another one's first scan has."""
    _, first, of_row = np.unique(group, return_index=True, return_inverse=True)
    return np.asarray(np.random.default_rng(0).permutation(y[first])[of_row])


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table:
        raise CannotRun(f"the features have no column '{name}'")
    return table[name]


def _words(values: Values) -> str:
    return f"{values[0]:g} to {values[1]:g}" if _is_range(values) else " or ".join(map(str, values))


def _refuse_leaks(task: Task, table: pd.DataFrame, rows: np.ndarray, y: np.ndarray) -> None:
    for name in NOT_TARGETS:
        if name not in table or not len(rows):
            continue
        other = table[name].iloc[rows]
        same_text = bool((table[task.target].iloc[rows].astype(str) == other.astype(str)).all())
        codes = pd.factorize(other)[0]
        pairs = len(set(zip(y.tolist(), codes.tolist(), strict=True)))
        same_parts = bool(task.classes) and pairs == len(set(y.tolist())) == len(set(codes.tolist())) > 1
        if same_text or (same_parts and task.target != "cohort"):
            raise CannotRun(f"refused: '{task.target}' is the column '{name}' under another name")


def _refuse_few(task: Task, y: np.ndarray, group: np.ndarray, folds: int) -> None:
    if not task.classes:
        people = len(np.unique(group))
        if people < 2 * folds:
            raise CannotRun(f"{people} people with '{task.target}'; {folds} folds take {2 * folds}")
        if np.ptp(y) == 0:
            raise CannotRun(f"'{task.target}' is {y[0]:g} in every scan")
        return
    people_of = {name: len(np.unique(group[y == code])) for code, name in enumerate(task.levels)}
    few = [f"{count} of {name}" for name, count in people_of.items() if count < folds]
    if few:
        raise CannotRun(f"too few people: {', '.join(few)}; {folds} folds take {folds} of each class")


def left_out_column(task: Task, table: pd.DataFrame, selection: Selection) -> np.ndarray:
    """Site (or cohort) of each scan as codes [N]. Raises CannotRun where leaving them out one by one says nothing."""
    assert task.leave_out is not None
    if task.target == task.leave_out:
        raise CannotRun(f"refused: '{task.target}' is what is left out")
    column = _column(table, task.leave_out).iloc[selection.rows]
    codes = np.asarray(pd.factorize(column, use_na_sentinel=False)[0])  # scans without a site are one site
    sites = len(np.unique(codes))
    if sites < 3:
        raise CannotRun(f"{sites} {task.leave_out}s; leaving them out takes 3")
    if selection.names and len(set(zip(codes.tolist(), selection.y_N.tolist(), strict=True))) == sites:
        raise CannotRun(f"refused: '{task.target}' is the same within each {task.leave_out}")
    return codes
