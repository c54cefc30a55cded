"""The record of a study, and what Optuna decides from it. Decisions are functions of the record, so that a driver that was killed
decides the same again."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from g3n.sweep.plan import Plan, SweepConfig

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
PRUNED_AT, DEATHS, REASON = "pruned_at", "deaths", "reason"  # attributes of a trial


def open_study(plan: Plan) -> optuna.Study:
    """``study.db`` in the study's folder, made or gone on with."""
    quiet()
    path = plan.sweep.folder.resolve() / "study.db"
    return optuna.create_study(
        storage=f"sqlite:///{path}", study_name=plan.sweep.name, direction=plan.sweep.direction, load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner_of(plan),
    )  # fmt: skip


def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.ERROR)


def pruner_of(plan: Plan) -> BasePruner:
    settings = plan.sweep.pruner
    if settings.kind == "asha":
        return SuccessiveHalvingPruner(min_resource=settings.min_steps, reduction_factor=settings.factor)
    if settings.kind == "hyperband":
        most = int(plan.base["trainer"]["steps"])
        return HyperbandPruner(min_resource=settings.min_steps, max_resource=most, reduction_factor=settings.factor)
    return NopPruner()


def propose(sweep: SweepConfig, history: Sequence[FrozenTrial], number: int) -> dict[str, Any]:
    """Values of trial ``number``, a function of these arguments alone: the seed is the study's and the number's.

    ``tpe`` (Bergstra 2011) looks at the finished trials of ``history``, so with several trials at once the order in which they finish
    counts; ``random`` and ``grid`` do not look.
    """
    space = sweep.space
    if sweep.sampler.kind == "grid":
        grid = itertools.product(*(dimension.points() or () for dimension in space.values()))
        return dict(zip(space, next(itertools.islice(grid, number, None)), strict=True))
    seed = int(np.random.SeedSequence((sweep.sampler.seed, number)).generate_state(1)[0])
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if sweep.sampler.kind == "tpe":
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=sweep.sampler.startup)
    quiet()
    study = optuna.create_study(direction=sweep.direction, sampler=sampler)
    study.add_trials([trial for trial in history if trial.state in FINISHED])
    trial = study.ask({key: dimension.distribution() for key, dimension in space.items()})
    return dict(trial.params)


def add_trial(study: optuna.Study, sweep: SweepConfig) -> int:
    """Propose the next trial and record it as running, in one transaction; its number."""
    history = study.get_trials(deepcopy=False)
    chosen = propose(sweep, history, len(history))
    distributions = {key: dimension.distribution() for key, dimension in sweep.space.items()}
    study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, params=chosen, distributions=distributions))
    return len(history)


def frozen(study: optuna.Study, number: int) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[number]


def should_prune(study: optuna.Study, number: int) -> bool:
    """Whether the pruner ends a trial at its last report. The decision is recorded before the rung it rests on: a driver that is killed in
    between would not come to it again."""
    copy = optuna.create_study(study_name=study.study_name, direction=study.direction, pruner=study.pruner)
    copy.add_trials(study.get_trials(deepcopy=False))
    told = copy.pruner.prune(copy, copy.get_trials(deepcopy=False)[number])
    trial = optuna.trial.Trial(study, frozen(study, number)._trial_id)
    if told:
        trial.set_user_attr(PRUNED_AT, frozen(study, number).last_step)
    trial.should_prune()
    return told


def best(study: optuna.Study) -> FrozenTrial | None:
    """The finished trial of the best value, the first of equals."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    return min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)


def rows(study: optuna.Study, folder: Path) -> list[dict[str, Any]]:
    """A row a trial for study.csv."""
    found = []
    for trial in study.get_trials(deepcopy=False):
        ended = trial.datetime_complete
        seconds = (ended - trial.datetime_start).total_seconds() if ended and trial.datetime_start else math.nan
        row = {"trial": trial.number, "state": trial.state.name.lower(), "value": trial.value, **trial.params}
        row |= {"step": trial.last_step, "deaths": trial.user_attrs.get(DEATHS, 0), "seconds": round(seconds, 1)}
        row |= {"reason": trial.user_attrs.get(REASON, ""), "run": str(folder / f"trial_{trial.number:04d}")}
        found.append(row)
    return found
