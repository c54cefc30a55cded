"""A sweep as its YAML file says it, checked against the config it varies before anything starts."""

from __future__ import annotations

import copy
import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from g3n.config import G3nError, build, did_you_mean, read_yaml, to_plain
from g3n.engine.checkpoint import flat, write_atomically
from g3n.engine.trainer import Config, check
from g3n.stream.sources import open_shards
from g3n.sweep.space import Dimension, corners
from g3n.tasks import TASKS
from g3n.tracking import git_sha
from g3n.train import check_environment, load_config

FORMAT = "g3n-sweep-1"
RESERVED = ("task", "name", "runs", "allow_changes", "tracking", "data.shards")
_OPEN = ("deepspeed.", "data.where.", "data.shards.")  # keys that only their reader knows


@dataclass(frozen=True)
class SamplerConfig:
    kind: Literal["tpe", "random", "grid"] = "tpe"
    seed: int = 0
    startup: int = 10  # finished trials before tpe looks at them; drawn at random until then

    def __post_init__(self) -> None:
        if self.seed < 0 or self.startup < 1:
            raise ValueError(f"seed {self.seed} must be >= 0 and startup {self.startup} >= 1")


@dataclass(frozen=True)
class PrunerConfig:
    """asha: Li 2018 (arXiv 1810.05934). hyperband: Li 2017 (arXiv 1603.06560)."""

    kind: Literal["none", "asha", "hyperband"] = "none"
    min_steps: int = 0  # of the first decision
    factor: int = 3  # one in so many goes on

    def __post_init__(self) -> None:
        if self.kind != "none" and (self.min_steps < 1 or self.factor < 2):
            raise ValueError(f"min_steps {self.min_steps} must be >= 1 and factor {self.factor} >= 2")


@dataclass(frozen=True)
class SweepConfig:
    name: str  # runs/<name> holds the study
    config: str  # the YAML that is varied
    space: dict[str, Dimension]
    metric: str  # of metrics.jsonl, such as val/velocity; what it is at the last step counts
    overrides: tuple[str, ...] = ()  # key=value for every trial
    runs: str = "runs"
    direction: Literal["minimize", "maximize"] = "minimize"
    trials: int | None = None  # default: the whole grid
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    gpus: int = 1  # a trial; 0: it runs on the CPU
    cpu_ranks: int = 1  # a trial where gpus is 0
    parallel: int = 1  # trials at once; where GPUs are used, as many as fit at most
    retries: int = 2  # of a trial that was killed; it goes on from its checkpoint

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name '{self.name}' must be the name of a folder")
        if not self.space:
            raise ValueError(
                "space is empty; give keys to vary, for example optim.lr: {type: float, low: 1e-5, high: 1e-3}"
            )
        if not self.metric.startswith("val/"):
            raise ValueError(f"metric '{self.metric}' must be a figure of validation, such as val/velocity")
        if (self.trials is not None and self.trials < 1) or min(self.cpu_ranks, self.parallel) < 1:
            raise ValueError(
                f"trials {self.trials}, cpu_ranks {self.cpu_ranks} and parallel {self.parallel} must be >= 1"
            )
        if self.gpus < 0 or self.retries < 0:
            raise ValueError(f"gpus {self.gpus} and retries {self.retries} must be >= 0")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def world(self) -> int:
        return self.gpus or self.cpu_ranks

    def grid_points(self) -> int | None:
        """Combinations of a grid; None where a dimension is a continuum."""
        points = [dimension.points() for dimension in self.space.values()]
        return None if any(p is None for p in points) else math.prod(len(p or ()) for p in points)


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked. ``base`` is the config every trial starts from, as a plain tree."""

    sweep: SweepConfig
    base: dict[str, Any]
    trials: int
    data_fingerprint: str

    def trial_folder(self, number: int) -> Path:
        return self.sweep.folder / f"trial_{number:04d}"

    def config(self, number: int, chosen: Mapping[str, Any]) -> Config:
        """The config of a trial. Raises G3nError where the values do not go together."""
        return trial_config(self.sweep, self.base, number, chosen)

    def identity(self) -> dict[str, Any]:
        """What makes it this study: another one of this is another study. How it is run may change."""
        sweep = self.sweep
        tree = {name: getattr(sweep, name) for name in ("space", "sampler", "pruner", "metric", "direction")}
        base = {key: value for key, value in self.base.items() if key not in ("name", "runs", "tracking")}
        about = {"format": FORMAT, "world": sweep.world, "on": "gpu" if sweep.gpus else "cpu"}
        whole = {**about, **tree, "config": base, "data_fingerprint": self.data_fingerprint}
        return dict(json.loads(json.dumps(to_plain(whole))))


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Raises G3nError."""
    return build(SweepConfig, read_yaml(path, overrides))


def trial_config(sweep: SweepConfig, base: Mapping[str, Any], number: int, chosen: Mapping[str, Any]) -> Config:
    tree = copy.deepcopy(dict(base))
    for key, choice in chosen.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = sweep.space[key].value(choice)
    tree |= {"name": f"trial_{number:04d}", "runs": str(sweep.folder)}
    config = build(Config, tree, sections={"model": TASKS[tree["task"]].Config})
    check(config, sweep.world)
    return config


def make_plan(sweep: SweepConfig) -> Plan:
    """Check everything that can be checked without training. Raises G3nError for the first thing that is wrong."""
    config = load_config(sweep.config, sweep.overrides)
    check(config, sweep.world)
    base = json.loads(json.dumps(to_plain(config)))
    for key in sweep.space:
        _check_key(key, base)
    trials = _trials(sweep)
    for chosen in corners(sweep.space, sweep.sampler.seed):
        try:
            trial_config(sweep, base, 0, chosen)
        except G3nError as error:
            values = ", ".join(f"{key}={value}" for key, value in chosen.items())
            raise G3nError(f"space allows {values}, but {error}") from None
    if sweep.pruner.kind != "none" and config.trainer.eval_every >= config.trainer.steps:
        raise G3nError(
            f"pruner '{sweep.pruner.kind}' sees nothing before the end: trainer.eval_every {config.trainer.eval_every} is not below "
            f"trainer.steps {config.trainer.steps}; set one of them in overrides"
        )
    check_environment()
    index = open_shards(config.data)
    if not any(shard.samples for shard in index.splits.get("val", ())):
        raise G3nError(f"shards '{index.url}' have no val split, so there is no '{sweep.metric}' to compare trials by")
    TASKS[config.task](config.model, index)  # finds inputs that are missing or do not belong together
    return Plan(sweep, base, trials, index.fingerprint)


def _check_key(key: str, base: Mapping[str, Any]) -> None:
    if key in RESERVED or key.startswith(tuple(f"{word}." for word in RESERVED)):
        raise G3nError(f"space key '{key}' is the same for all trials of a sweep; set it in overrides")
    known = flat(base)
    if key not in known and not key.startswith(_OPEN):
        if any(other.startswith(f"{key}.") for other in known):
            inside = [other for other in known if other.startswith(f"{key}.")]
            raise G3nError(f"space key '{key}' is a section; name a key in it, such as {inside[0]}")
        raise G3nError(f"space key '{key}' is no config key{did_you_mean(key, list(known))}")


def _trials(sweep: SweepConfig) -> int:
    points = sweep.grid_points()
    if sweep.sampler.kind == "grid":
        if points is None:
            endless = next(key for key, dimension in sweep.space.items() if dimension.points() is None)
            raise G3nError(f"a grid has no end along '{endless}'; give it a step, or values")
        if sweep.trials is not None and sweep.trials > points:
            raise G3nError(
                f"trials {sweep.trials} are more than the grid's {points} points; leave trials out for all of them"
            )
        return sweep.trials or points
    if sweep.trials is None:
        raise G3nError(f"trials is missing; sampler '{sweep.sampler.kind}' never ends by itself")
    return sweep.trials


def record(plan: Plan) -> str:
    """Make the study's folder the place of this plan; the study's own random name. Raises G3nError where it holds another study."""
    path, identity = plan.sweep.folder / "plan.json", plan.identity()
    if path.is_file():
        known = json.loads(path.read_text())
        before, now = flat(known["plan"]), flat(identity)
        changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
        if changed:
            lines = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:10])
            raise G3nError(
                f"'{plan.sweep.folder}' holds a study of another plan ({lines}); set it back or give another name=..."
            )
        return str(known["uid"])
    uid = uuid.uuid4().hex
    write_atomically(path, json.dumps({"uid": uid, "git_sha": git_sha(), "plan": identity}, indent=1))
    return uid
