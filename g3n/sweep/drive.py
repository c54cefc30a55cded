"""The driver of a sweep: starts trials, watches what they measure, ends the poor ones, starts again what was killed.

Everything it knows is on disk before it matters: a trial is recorded with its values before it starts, and what a trial has reached is read from
its run folder. So a driver may be killed at any time, and the next one goes on with the same trials.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import Trial, TrialState
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from g3n.config import G3nError, did_you_mean, to_plain, write_yaml
from g3n.engine import checkpoint, lock
from g3n.engine.trainer import Config
from g3n.meters import progress_bar
from g3n.sweep import process, results, study
from g3n.sweep.plan import Plan, SweepConfig, make_plan, record
from g3n.sweep.process import Launch, Process, Tail
from g3n.sweep.study import DEATHS, FINISHED, PRUNED_AT, REASON
from g3n.sweep.track import StudyTracker

_POLL_SECONDS = 0.2
_HOPELESS = 3  # failed trials with no good one among them
_RETRY = ("is taken, perhaps by another training", "another job trains in")  # mistakes that are nobody's


@dataclass
class Running:
    """A trial whose training is under way."""

    number: int
    config: Config
    process: Process
    tail: Tail
    gpus: list[str]
    trial: Trial
    step: int = 0
    value: float = math.nan  # of the metric at ``value_step``
    value_step: int = 0
    pruned: bool = False
    stopping: bool = False


@dataclass
class Driver:
    plan: Plan
    uid: str
    launch: Launch
    tracker: StudyTracker
    console: Console
    study: optuna.Study
    running: dict[int, Running] = field(default_factory=dict)
    waiting: deque[int] = field(default_factory=deque)  # recorded as running, without a process
    signals: list[int] = field(default_factory=list)
    recorded: int = 0  # trials in the study
    finished: int = 0  # of these

    @property
    def sweep(self) -> SweepConfig:
        return self.plan.sweep

    def adopt(self) -> None:
        """Take over what an earlier driver left: trainings that go on, and trials that have none."""
        for frozen in self.study.get_trials(deepcopy=False):
            self.recorded += 1
            if frozen.state != TrialState.RUNNING:
                self.finished += 1
                self.tracker.finished(frozen, self.plan)
                continue
            left = Process(self.plan.trial_folder(frozen.number))
            if (elsewhere := left.elsewhere()) is not None:
                raise G3nError(f"'{left.run}' trains on another host ({elsewhere}); end it there, or go on there")
            alive = left.alive()
            run = self._watch(frozen.number, left, left.gpus())
            if alive:
                self._say(frozen.number, "still trains: gone on with")
                continue
            del self.running[frozen.number]
            self._read(run)
            if not self._settle(run):  # it is no fault of the trial's
                self.waiting.append(frozen.number)

    def fill(self) -> None:
        """Start trials while there is room."""
        gpus = [name for name in process.visible_gpus() if not any(name in run.gpus for run in self.running.values())]
        while len(self.running) < self.sweep.parallel and len(gpus) >= self.sweep.gpus and not self.signals:
            if self.waiting:
                number = self.waiting.popleft()
            elif self.recorded < self.plan.trials:
                number = study.add_trial(self.study, self.sweep)
                self.recorded += 1
            else:
                return
            mine, gpus = gpus[: self.sweep.gpus], gpus[self.sweep.gpus :]
            self._begin(number, mine)

    def look(self) -> None:
        """What running trials have measured and which have ended."""
        for run in list(self.running.values()):
            over = not run.process.alive()  # before reading: what was written before the end is read
            self._read(run)
            if over:
                del self.running[run.number]
                self._ended(run)
            elif (run.pruned or self.signals) and not run.stopping:
                run.stopping = True
                run.process.stop()

    def _begin(self, number: int, gpus: list[str]) -> None:
        run, frozen = self.plan.trial_folder(number), study.frozen(self.study, number)
        try:
            config = self.plan.config(number, frozen.params)
        except G3nError as error:  # inside of the space, where not every combination was checked
            self._tell(number, TrialState.FAIL, reason=str(error))
            return
        run.mkdir(parents=True, exist_ok=True)
        tree = to_plain(config)
        tree["tracking"] = self.tracker.of_trial(config.tracking, number)
        checkpoint.write_atomically(run / "trial.yaml", write_yaml(tree))
        self.tracker.wait_briefly()
        words = process.command(run / "trial.yaml", self.sweep.world, bool(gpus))
        environment = process.environment(gpus, self.sweep.world * self.sweep.parallel)
        (run / "process").unlink(missing_ok=True)
        child = self.launch(run, words, environment, run / "train.log")
        self._watch(number, Process(run, child), gpus)
        values = "  ".join(f"{key}={results.short(value)}" for key, value in frozen.params.items())
        self._say(number, f"{'goes on' if checkpoint.finished_steps(run) else 'starts'}: {values}")

    def _watch(self, number: int, child: Process, gpus: list[str]) -> Running:
        frozen = study.frozen(self.study, number)
        config = self.plan.config(number, frozen.params)
        trial = Trial(self.study, frozen._trial_id)
        run = Running(number, config, child, Tail(child.run / "metrics.jsonl"), gpus, trial)
        run.pruned = PRUNED_AT in frozen.user_attrs
        if run.pruned:
            trial.should_prune()  # a driver killed as it decided so may not have recorded the rung, which others are compared at
        self.running[number] = run
        return run

    def _read(self, run: Running) -> None:
        """Report validation figures; a pruned trial's later ones are not looked at, as if it had ended there at once."""
        for row in run.tail.rows():
            run.step = int(row["step"])
            figures = [name for name in row if name.startswith("val/")]
            if figures and self.sweep.metric not in row:
                raise G3nError(
                    f"metric '{self.sweep.metric}' is not measured{did_you_mean(self.sweep.metric, figures)}"
                )
            if not figures or run.pruned:
                continue
            run.value, run.value_step = float(row[self.sweep.metric]), run.step
            frozen = study.frozen(self.study, run.number)
            if run.step not in frozen.intermediate_values:
                run.trial.report(run.value, run.step)
            if run.step < run.config.trainer.steps and run.step >= (frozen.last_step or 0):
                run.pruned = study.should_prune(self.study, run.number)

    def _settle(self, run: Running) -> bool:
        """Record the end of a trial that needs no more training."""
        steps, saved = run.config.trainer.steps, checkpoint.finished_steps(run.process.run)
        if run.pruned:
            self._tell(run.number, TrialState.PRUNED)
        elif not saved or saved[-1] != checkpoint.step_folder(run.process.run, steps):
            return False
        elif run.value_step == steps and math.isfinite(run.value):
            self._tell(run.number, TrialState.COMPLETE, run.value)
        else:
            reason = f"{self.sweep.metric} is {run.value} at step {run.value_step}"
            self._tell(run.number, TrialState.FAIL, reason=reason)
        return True

    def _ended(self, run: Running) -> None:
        if self._settle(run):
            return
        number, code = run.number, run.process.code()
        if self.signals:
            self.waiting.append(number)
            return
        reason = process.last_error(run.process.run / "train.log")
        if code == 2 and reason and not any(words in reason for words in _RETRY):
            self._tell(number, TrialState.FAIL, reason=reason)
            return
        deaths = int(study.frozen(self.study, number).user_attrs.get(DEATHS, 0)) + 1
        run.trial.set_user_attr(DEATHS, deaths)
        how = f"with {code}" if code is not None else "without a word"
        if deaths > self.sweep.retries:
            self._tell(number, TrialState.FAIL, reason=f"ended {how} at step {run.step}, {deaths} times; see train.log")
            return
        self._say(number, f"ended {how} at step {run.step}: again, {deaths} of {self.sweep.retries}")
        self.waiting.appendleft(number)

    def _tell(self, number: int, state: TrialState, value: float | None = None, reason: str = "") -> None:
        if reason:
            Trial(self.study, study.frozen(self.study, number)._trial_id).set_user_attr(REASON, reason)
        self.study.tell(number, value, state)
        self.finished += 1
        frozen = study.frozen(self.study, number)
        self.tracker.finished(frozen, self.plan)
        results.write_table(self.study, self.sweep)
        shown = (
            reason or f"{self.sweep.metric} {frozen.value:.6g} at step {frozen.last_step}"
            if frozen.value is not None
            else reason
        )
        self._say(number, f"{state.name.lower()}  {shown}")
        trials = self.study.get_trials(deepcopy=False)
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        if len(failed) >= min(_HOPELESS, self.plan.trials) and not any(trial.state in FINISHED[:2] for trial in trials):
            raise G3nError(
                f"the first {len(failed)} trials of '{self.sweep.folder}' failed; the last: {failed[-1].user_attrs[REASON]}"
            )

    def _say(self, number: int, text: str) -> None:
        self.console.print(f"trial_{number:04d}  {text}", markup=False, highlight=False, soft_wrap=True)

    def stop_all(self) -> None:
        """Ask every training for its checkpoint and wait; another Ctrl-C ends them at once."""
        while any(run.process.alive() for run in self.running.values()):
            for run in self.running.values():
                if not run.stopping:
                    run.stopping = True
                    run.process.stop()
                elif len(self.signals) > 1:
                    run.process.kill()
            time.sleep(_POLL_SECONDS)


def run_sweep(sweep: SweepConfig, words: str = "", launch: Launch = process.launch) -> int:
    """Carry a sweep out, or go on with it. Returns 0, or 130 after Ctrl-C and 0 after SIGTERM with every trial's checkpoint written.

    ``words`` is the command that goes on. Raises G3nError before anything starts for what is wrong with the plan, and where every trial fails.
    """
    plan = make_plan(sweep)
    process.check_gpus(sweep.gpus)
    with ExitStack() as until_the_end:
        lock.hold(sweep.folder, until_the_end)
        uid = record(plan)
        opened = study.open_study(plan)
        tracker = StudyTracker(plan, uid)
        progress = until_the_end.enter_context(progress_bar(disable=not sys.stderr.isatty()))
        console = progress.console if sys.stderr.isatty() else Console(stderr=True)
        driver = Driver(plan, uid, launch, tracker, console, opened)
        previous = {
            number: signal.signal(number, lambda n, _: driver.signals.append(n))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            _loop(driver, progress)
        except BaseException:
            driver.stop_all()
            raise
        finally:
            files = results.write_all(opened, sweep, plan) if driver.finished else []
            tracker.close(files, driver.finished >= plan.trials)
            for number, handler in previous.items():
                signal.signal(number, handler)
    if driver.finished < plan.trials:
        left = plan.trials - driver.finished
        print(
            f"stopped with {driver.finished} of {plan.trials} trials finished, {left} to go; '{words}' goes on",
            file=sys.stderr,
        )
        return 130 if driver.signals[0] == signal.SIGINT else 0
    show(driver)
    return 0


def _loop(driver: Driver, progress: Any) -> None:
    bar = progress.add_task(driver.sweep.name, total=driver.plan.trials)
    bars: dict[int, Any] = {}
    driver.adopt()
    while True:
        driver.look()
        driver.fill()
        for number in [n for n in bars if n not in driver.running]:
            progress.remove_task(bars.pop(number))
        for number, run in driver.running.items():
            if number not in bars:
                bars[number] = progress.add_task("", total=run.config.trainer.steps)
            shown = f"trial_{number:04d}" + (f" {run.value:.4g}" if math.isfinite(run.value) else "")
            progress.update(bars[number], completed=run.step, description=shown)
        progress.update(bar, completed=driver.finished)
        if not driver.running and (driver.signals or (not driver.waiting and driver.finished >= driver.plan.trials)):
            return
        time.sleep(_POLL_SECONDS)


def show(driver: Driver) -> None:
    """The table of trials, the best first, and where the files are."""
    sweep, best = driver.sweep, study.best(driver.study)
    rows = study.rows(driver.study, sweep.folder)
    sign = 1 if sweep.direction == "minimize" else -1
    rows.sort(
        key=lambda row: (row["state"] != "complete", sign * row["value"] if row["value"] is not None else math.inf)
    )
    table = Table(title=f"sweep {sweep.name}", title_justify="left", box=box.SIMPLE)
    for name in ("trial", "state", sweep.metric, *sweep.space, "step"):
        table.add_column(name, overflow="fold")
    for row in rows:
        cells = [row["trial"], row["state"], row["value"], *(row.get(key) for key in sweep.space), row["step"]]
        table.add_row(*(escape(results.short(cell)) for cell in cells))
    Console().print(table)
    if best is not None:
        print(
            f"best: trial {best.number}, {sweep.metric} {best.value:.6g}; train it by --config {sweep.folder / 'best.yaml'}"
        )
    print(f"table {sweep.folder / 'study.csv'}, picture {sweep.folder / 'sweep.png'}")


def describe(sweep: SweepConfig) -> None:
    """Check a sweep and print what it would do."""
    plan = make_plan(sweep)
    table = Table("key", "values", "config", title=f"sweep {sweep.name}: {plan.trials} trials", title_justify="left")
    known = checkpoint.flat(plan.base)
    for key, dimension in sweep.space.items():
        table.add_row(key, escape(str(dimension)), escape(results.short(known.get(key))))
    Console().print(table)
    where = f"{sweep.gpus} GPU(s)" if sweep.gpus else f"{sweep.cpu_ranks} rank(s) of the CPU"
    pruner = (
        sweep.pruner.kind
        if sweep.pruner.kind == "none"
        else f"{sweep.pruner.kind} from step {sweep.pruner.min_steps} on"
    )
    print(f"{sweep.direction} {sweep.metric}; sampler {sweep.sampler.kind}, seed {sweep.sampler.seed}; pruner {pruner}")
    print(f"each trial on {where}, {sweep.parallel} at once; data {plan.data_fingerprint}; inputs are right")
