"""One trainer for every task: steps, validation, checkpoints. It knows tasks only by their contract."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from g3n import flops, levels
from g3n.config import G3nError, build, to_plain, write_yaml
from g3n.engine import checkpoint, ema, lock
from g3n.engine.deepspeed import (
    EngineConfig,
    OptimConfig,
    accumulation,
    deepspeed_config,
    grad_norm,
    initialize,
    set_learning_rate,
)
from g3n.engine.distributed import Ranks, exchange, gather_objects, max_over_ranks, sum_over_ranks
from g3n.engine.memory_report import is_out_of_memory, out_of_memory
from g3n.engine.pieces import optimizer_steps
from g3n.engine.saver import Saver
from g3n.engine.schedule import learning_rate
from g3n.engine.spikes import Spikes
from g3n.engine.watchdog import Watchdog
from g3n.meters import Meter, OwnTime, Report, clock, memory, over_ranks, slow_rank
from g3n.stream import cursors
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import StreamConfig, TrainStream, eval_batches
from g3n.stream.samples import Batch
from g3n.system import System
from g3n.tasks.base import Task
from g3n.tracking import Tracker, TrackingConfig, environment

log = logging.getLogger(__name__)
T = TypeVar("T")
_MOST_ROLLBACKS = 3  # without a checkpoint between them


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(EngineConfig):
    """How long, and what is written on the way."""

    steps: int
    ema_decay: float = 0.9999
    log_every: int = 20
    eval_every: int = 1000
    eval_batches: int | None = None  # validation micro-batches a rank; all where null
    save_every: int = 1000
    keep_last: int = 2
    keep_every: int | None = None  # checkpoints of steps it divides are kept for good
    max_skipped: int = 3  # steps in a row that may be skipped because gradients were not finite; one more ends the run
    spike_zscore: float = (
        10  # a loss so far above the last ones (robust z-score) is logged with its samples; 0: none is
    )
    spike_rollback: int = (
        0  # after so many spikes in a row go back to the last checkpoint and pass over the data since; 0: never
    )
    panels: bool = True  # pictures of the first validation batch
    stuck_seconds: float = 1800  # without progress for so long, every rank writes its stacks and ends; 0 waits for ever

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "log_every", "eval_every", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be >= 1")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every {self.keep_every} must be >= 1")
        for name in ("max_skipped", "stuck_seconds", "spike_zscore", "spike_rollback"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must be >= 0")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay {self.ema_decay} must lie in [0, 1)")


@dataclass(frozen=True)
class Config:
    """Everything about a run. ``model`` is the task's own dataclass."""

    task: str
    name: str
    model: Any
    data: StreamConfig
    trainer: TrainerConfig
    optim: OptimConfig
    runs: str = "runs"
    seed: int = 0
    allow_changes: tuple[str, ...] = ()  # keys, or beginnings of keys, that may differ from the checkpoint's
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed on; what g3n sets itself is refused

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name


def check(config: Config, world: int) -> None:
    """Raise G3nError for what would fail later: batches that do not divide, keys that g3n owns."""
    accumulation(config.trainer, world)
    deepspeed_config(config.trainer, config.optim, world, config.deepspeed)


def train(config: Config, task: Task, index: ShardIndex, ranks: Ranks, resume: str) -> int:
    """Train until the last step or a signal. Returns 0, or 130 after Ctrl-C; both leave a checkpoint."""
    check(config, ranks.world)
    with ExitStack() as until_the_end:
        on_main(ranks, lambda: lock.hold(config.folder, until_the_end))
        start = on_main(ranks, lambda: checkpoint.find(config.folder, resume))
        trainer = Trainer(config, task, index, ranks, start)
        until_the_end.callback(trainer.close)
        return trainer.run()


def with_defaults(config: Config) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """For the plain tree of a config that another version wrote: the tree with what came since at its default."""

    def completed(tree: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            whole = to_plain(build(Config, dict(tree), sections={"model": type(config.model)}))
        except G3nError:  # a key that is gone: the difference is named
            return tree
        return dict(json.loads(json.dumps(whole)))

    return completed


def on_main(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and give every rank its result, or its G3nError."""
    result: tuple[Any, str | None] = (None, None)
    if ranks.main:
        try:
            result = (function(), None)
        except G3nError as error:
            result = (None, str(error))
    value, message = gather_objects(result, ranks)[0]
    if message is not None:
        raise G3nError(message)
    return value


class Trainer:
    """The state of a run in this process."""

    def __init__(self, config: Config, task: Task, index: ShardIndex, ranks: Ranks, start: Path | None) -> None:
        self.config, self.task, self.index, self.ranks = config, task, index, ranks
        self.signal = 0  # what this process received
        self.stopping = 0  # what all ranks agreed on after the last step
        self.skipped = self.skipped_in_a_row = 0  # steps of this process that changed nothing
        self.failed_saves, self.save_error = 0, ""
        self.last_keys: list[str] = []
        self.tracker: Tracker | None = None
        self.stream: TrainStream | None = None
        self.console = Console(highlight=False)
        self.spikes = Spikes(config.trainer.spike_zscore)
        self.rollbacks = 0  # since the last checkpoint
        self.tree = json.loads(json.dumps(to_plain(config)))
        self.state: dict[str, Any] = {
            "format": checkpoint.FORMAT,
            "task": task.name,
            "artifact": json.loads(json.dumps(to_plain(task.artifact()))),
        }
        saved = (
            checkpoint.check_state(start, self.state, self.tree, config.allow_changes, with_defaults(config))
            if start
            else {}
        )
        self.step = int(saved.get("step", 0))
        self.last_loss = float(saved.get("loss", math.nan))
        for module in task.frozen().values():
            module.to(ranks.device)
        torch.manual_seed(config.seed)
        model = task.build()
        self.twin = flops.twin(task, model) if ranks.main else None  # before ZeRO takes the weights apart
        layout = {"world": ranks.world, "zero_stage": config.trainer.zero_stage}
        moved = start is not None and saved["layout"] != layout
        plain = copy.deepcopy(model) if moved and ranks.main else None
        self.state["layout"] = layout
        self.engine = initialize(model, config.trainer, config.optim, ranks, config.deepspeed)
        self.cursors: cursors.State = cursors.start(config.data.lanes)
        if start:
            self.average, state = checkpoint.load(start, self.engine, saved["optimizer_steps"])
            self.cursors = cursors.check(state, config.data.lanes)
        else:
            self.average = ema.start_average(self.engine)
        if start and moved:
            self._check_loss(start, plain)
        settings = config.trainer
        self.saver = Saver(config.folder, self.engine, ranks, settings.keep_last, settings.keep_every)
        self.passes = accumulation(settings, ranks.world)
        self.meter = Meter(settings.global_batch)
        self.own_time = OwnTime(ranks.device.type == "cuda")
        self.system = System(ranks.device)
        self.losses = levels.LevelSums(only=["modality"])
        self.tflops_a_sample: float | None = None
        self.peak_tflops: float | None = None
        self.saved_step = self.step if start else -1
        if ranks.main:
            self._open_tracker(saved.get("mlflow_run_id"))
            self._say(f"go on from '{start}'" if start else f"a new run in '{config.folder}'")

    @torch.no_grad()
    def _check_loss(self, start: Path, plain: torch.nn.Module | None) -> None:
        """Collective. Raises G3nError where the engine, now split up otherwise, does not compute what the checkpoint's weights do.

        ``plain`` is the same model outside of DeepSpeed, on rank 0.
        """
        config = self.config
        split = "val" if any(shard.samples for shard in self.index.splits.get("val", ())) else "train"
        batch = next(
            eval_batches(self.index, config.data, self.task.kind, split, 1, 0, 1, config.seed, self.task.history)
        )
        batch = batch.to(self.ranks.device)
        self.engine.eval()
        found = next(iter(self.task.eval_step(self.engine, batch).values())).double().mean().item()
        self.engine.train()
        expected = found
        if plain is not None:
            dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
            plain.load_state_dict(load_file(start / "model.safetensors"), strict=False)
            plain.to(self.ranks.device)
            for parameter in plain.parameters():
                parameter.data = parameter.data.to(dtype)
            expected = next(iter(self.task.eval_step(plain.eval(), batch).values())).double().mean().item()
        expected = gather_objects(expected, self.ranks)[0]
        tolerance = 2e-2 if config.trainer.precision == "bf16" else 1e-3
        if not abs(found - expected) <= tolerance * abs(expected):
            raise G3nError(
                f"weights of '{start}' give a loss of {found:.6g} here and {expected:.6g} in plain torch; they were not "
                f"carried over rightly. Resume with the world size and ZeRO stage that wrote them ({start / 'state.json'})"
            )
        ranks = f"{self.ranks.world} rank{'s' if self.ranks.world > 1 else ''}"
        self._say(
            f"weights carried over to {ranks}, ZeRO-{config.trainer.zero_stage}: loss {found:.4f} as in plain torch"
        )

    def _open_tracker(self, run_id: str | None) -> None:
        run = self.config.folder
        run.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(run / "config.yaml", write_yaml(self.config))
        env = {**environment(), "world": self.ranks.world, "device": str(self.ranks.device)}
        checkpoint.write_atomically(run / "env.json", json.dumps(env, indent=1))
        params = checkpoint.flat(self.tree)
        self.tracker = Tracker(run, self.config.tracking, params, self.step, run_id)

    def run(self) -> int:
        settings = self.config.trainer
        if self.step >= settings.steps:
            self._say(f"already at step {self.step} of {settings.steps}: nothing to do")
            return 0
        stops = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM warns by SIGUSR1 before it requeues
        previous = {s: signal.signal(s, self._on_signal) for s in stops}
        self.watchdog = Watchdog(self.config.folder, self.ranks.rank, settings.stuck_seconds)
        try:
            self.stream = self._open_stream()
            with self._bar() as bar:
                bar_id = bar.add_task(self.config.name, total=settings.steps, completed=self.step)
                while self.step < settings.steps and not self.stopping:
                    moved = self._train_step()
                    bar.update(bar_id, completed=self.step)
                    last = self.step == settings.steps
                    if moved and (last or self.step % settings.eval_every == 0):
                        self._validate()
                    if (moved and (last or self.step % settings.save_every == 0)) or self.stopping:
                        self._save()
                self._finish_save()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            keys, doing = self.last_keys, self.watchdog.doing
            raise out_of_memory(self.config.folder, self.ranks.rank, doing, keys, error) from None
        finally:
            self.watchdog.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.saved_step != self.step:
            good = checkpoint.finished_steps(self.config.folder)
            raise G3nError(
                f"the checkpoint of step {self.step} was not written ({self.save_error}); the last good one is "
                f"{good[-1].name if good else 'none'}. Make room or give another folder (runs=...), then run it again"
            )
        if self.stopping:
            self._say(f"stopped by {signal.Signals(self.stopping).name} at step {self.step}; run it again to go on")
        else:
            self._say(f"finished: {checkpoint.step_folder(self.config.folder, self.step)}")
        return 130 if self.stopping == signal.SIGINT else 0

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        if self.tracker is not None:
            self.tracker.close(finished=self.step >= self.config.trainer.steps)

    def _open_stream(self) -> TrainStream:
        data, ranks = self.config.data, self.ranks
        micro, state = self.config.trainer.micro_batch, self.cursors
        return TrainStream(
            self.index, data, self.task.kind, micro, ranks.rank, ranks.world, self.config.seed, state=state,
            history=self.task.history,
        )  # fmt: skip

    def _on_signal(self, number: int, _frame: Any) -> None:
        self.signal = number

    def _train_step(self) -> bool:
        """One optimizer step; False where it was skipped and nothing moved but the stream."""
        settings, optim = self.config.trainer, self.config.optim
        rate = learning_rate(self.step, settings.steps, optim.lr, optim.warmup_steps, optim.min_lr_ratio)
        set_learning_rate(self.engine, rate)
        for module in self.engine.module.modules():
            if hasattr(module, "train_step"):
                module.train_step = self.step
        sums: dict[str, Tensor] = {}
        losses: list[tuple[Tensor, list[str]]] = []
        of_samples: list[tuple[dict[str, Tensor], Batch]] = []
        for number in range(self.passes):
            self.watchdog.beat(f"step {self.step + 1}")
            batch = self._next_batch()
            with self.own_time.forward():
                loss, logs = self.task.loss(self.engine, batch.to(self.ranks.device))
            losses.append((loss.detach(), batch.keys))
            self.engine.backward(loss)
            if number == self.passes - 1:
                self.saver.before_update()
            self.engine.step()
            for name, value in {"loss": loss.detach(), **logs}.items():
                mean = value.float().mean() / self.passes
                sums[name] = sums.get(name, torch.zeros((), device=self.ranks.device)) + mean
            of_samples.append(({name: value for name, value in logs.items() if value.ndim}, batch))
            self.cursors = cursors.merge(self.cursors, batch.lanes, batch.positions, len(batch) * self.ranks.world)
        norm = grad_norm(self.engine)
        moved = self.engine.was_step_applied() and math.isfinite(norm)
        if moved:
            self.skipped_in_a_row = 0
            ema.update_average(self.average, self.engine, settings.ema_decay, self.step)
            self.step += 1
            for figures, batch in of_samples:
                self.losses.add(figures, batch.variables, batch.weights)
        else:
            self._skip_step(losses)
        self.meter.stepped()
        flags = torch.tensor([self.signal, self.saver.busy, self.saver.error is not None], dtype=torch.float64)
        own_loss = sums["loss"].double().view(1)
        everyone = exchange(torch.cat([flags.to(own_loss.device), own_loss]), self.ranks)
        self.stopping = int(max(row[0] for row in everyone))
        self._go_on_saving(any(row[1] for row in everyone), any(row[2] for row in everyone))
        due = self.step % settings.log_every == 0 or self.step == settings.steps or self.stopping
        if due and moved:
            self._log_step(sums, rate, norm)
        if moved:
            self._look_for_spike([row[3] for row in everyone], losses)
        return moved

    def _look_for_spike(self, losses_W: list[float], losses: list[tuple[Tensor, list[str]]]) -> None:
        """Collective where there is one, which every rank sees alike. Raises G3nError where going back does not help."""
        loss = statistics.fmean(losses_W)
        z = self.spikes.judge(loss)
        if z is None:
            return
        mine = max(losses, key=lambda entry: float(entry[0]))
        keys = gather_objects((float(mine[0]), mine[1]), self.ranks)
        worst = max(range(self.ranks.world), key=lambda rank: float(keys[rank][0]))
        where = f"rank {worst}: {', '.join(keys[worst][1])}"
        if self.ranks.main and self.tracker is not None:
            log.warning("loss %.4g at step %d is a spike (z = %.1f; largest on %s)", loss, self.step, z, where)
            self.tracker.event(self.step, "spike", loss=loss, zscore=round(z, 1), rank=worst, keys=keys[worst][1])
        if 0 < self.config.trainer.spike_rollback <= self.spikes.in_a_row:
            self._roll_back()

    def _roll_back(self) -> None:
        """Collective. Weights, average and moments of the last checkpoint; the stream goes on, so what came since is passed over."""
        self._finish_save()
        start = on_main(self.ranks, lambda: checkpoint.find(self.config.folder, "auto"))
        if start is None or self.rollbacks >= _MOST_ROLLBACKS:
            raise G3nError(
                f"the loss stays high at step {self.step} and going back {'has no checkpoint' if start is None else 'did not help'}"
                f"; look at the samples in '{self.config.folder / 'events.jsonl'}', lower optim.lr or trainer.save_every"
            )
        saved = json.loads((start / "state.json").read_text())
        self.average, _ = checkpoint.load(start, self.engine, saved["optimizer_steps"])
        self.step, self.rollbacks, self.saved_step = int(saved["step"]), self.rollbacks + 1, int(saved["step"])
        self.spikes.forget()
        if self.ranks.main and self.tracker is not None:
            log.warning("back to '%s'; the samples since then are passed over", start)
            self.tracker.event(self.step, "rollback", checkpoint=start.name)

    def _skip_step(self, losses: list[tuple[Tensor, list[str]]]) -> None:
        """Collective. DeepSpeed has dropped the gradients on every rank: weights, average, step and rate stand still.

        The norm is that of all ranks' gradients, so all of them are here. Raises G3nError after too many in a row.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        bad = [key for loss, keys in losses if not bool(torch.isfinite(loss)) for key in keys]
        everyone = gather_objects((bad, [key for _, keys in losses for key in keys]), self.ranks)
        where = 0 if any(bad for bad, _ in everyone) else 1  # no loss shows it: the gradients of any may be at fault
        names = "; ".join(f"rank {r}: {', '.join(keys[where])}" for r, keys in enumerate(everyone) if keys[where])
        what = f"{'loss is' if where == 0 else 'gradients are'} not finite at step {self.step + 1} ({names})"
        if self.skipped_in_a_row > self.config.trainer.max_skipped:
            last = checkpoint.finished_steps(self.config.folder)
            raise G3nError(
                f"{what}, {self.skipped_in_a_row} times in a row; the last good checkpoint is "
                f"{last[-1].name if last else 'none'}. Look at these samples, lower optim.lr, or use trainer.precision=fp32"
            )
        if self.ranks.main:
            log.warning("%s: the step is skipped (%d in a row)", what, self.skipped_in_a_row)
            if self.tracker is not None:
                self.tracker.metrics(self.step, {"train/skipped_steps": self.skipped})
                self.tracker.event(self.step, "skipped", reason=what)

    def _next_batch(self) -> Batch:
        assert self.stream is not None
        begin = time.perf_counter()
        batch = next(self.stream)
        waited = time.perf_counter() - begin
        self.meter.waited(waited)
        self.own_time.waited(waited)
        self.last_keys = batch.keys
        if self.twin is not None:
            self._count_flops(self.twin, batch)
        return batch

    def _count_flops(self, twin: flops.Twin, batch: Batch) -> None:
        """Once, on rank 0."""
        self.twin = None
        precision = self.config.trainer.precision
        device = torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else "cpu"
        self.peak_tflops = flops.peak_tflops(device, precision)
        peak = f"{self.peak_tflops:g} TFLOP/s" if self.peak_tflops else "not known, so there is no MFU"
        try:
            self.tflops_a_sample = flops.flops_a_sample(twin, batch) / 1e12
            self._say(f"{1e3 * self.tflops_a_sample:.3g} GFLOP a sample; peak of '{device}' in {precision}: {peak}")
        except Exception as error:  # an operator without shapes for the meta device: a meter never stops a run
            log.warning("FLOPs are not counted (%s: %s)", type(error).__name__, " ".join(str(error).split())[:200])
        self.meter.pause()

    def _log_step(self, sums: Mapping[str, Tensor], rate: float, norm: float) -> None:
        totals = sum_over_ranks(torch.stack(list(sums.values()))) / self.ranks.world
        means = dict(zip(sums, totals.tolist(), strict=True))
        self.last_loss = means["loss"]
        assert self.stream is not None
        meter, unit, world = self.meter, self.task.unit, self.ranks.world
        own_seconds, share = self.own_time.take(), meter.data_wait_share
        report = Report(own_seconds, share, self.stream.damaged, self.system.read(), self.losses.take())
        reports: list[Report] = gather_objects(report, self.ranks)
        if self.tracker is None:
            return
        values = {f"train/{name}": value for name, value in means.items()}
        values |= {"train/lr": rate, "train/grad_norm": norm, "train/samples": self.cursors["samples"]}
        values |= {f"speed/{unit}_per_second": meter.samples_a_second}
        values |= {f"speed/step_ms_p{p}": 1e3 * meter.step_seconds_at(p / 100) for p in (50, 95)}
        values |= {"train/skipped_steps": self.skipped, "speed/memory_gib": memory(reports), **over_ranks(reports)}
        work = ""
        if self.tflops_a_sample is not None:
            tflops = values["speed/tflops_per_second"] = self.tflops_a_sample * meter.samples_a_second
            work = f"  {tflops:.3g} TFLOP/s" if tflops >= 1 else f"  {1e3 * tflops:.3g} GFLOP/s"
            if self.peak_tflops is not None:
                mfu = values["speed/mfu"] = tflops / (self.peak_tflops * world)
                work = f"  MFU {mfu:.0%}"
        if (slow := slow_rank([report.own_seconds for report in reports])) is not None:
            values["speed/slow_rank"] = slow
            log.warning(
                "rank %d is slow: data and forward took it %.2f s since the last line, the others %.2f s",
                slow, reports[slow].own_seconds, min(report.own_seconds for report in reports),
            )  # fmt: skip
        self.tracker.metrics(self.step, values)
        left = clock(meter.step_seconds * (self.config.trainer.steps - self.step))
        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        self._say(
            f"step {self.step}/{self.config.trainer.steps}  loss {means['loss']:.4f}  lr {rate:.1e}  grad {norm:.2f}  "
            f"{meter.samples_a_second:.1f} {unit}/s{work}  data {values['speed/data_wait_share']:.0%}  "
            f"{values['speed/memory_gib']:.1f} GiB{skipped}  left {left}"
        )

    @torch.no_grad()
    def _validate(self) -> None:
        settings, ranks = self.config.trainer, self.ranks
        if not any(shard.samples for shard in self.index.splits.get("val", ())):
            return
        totals: dict[str, Tensor] = {}
        weight = torch.zeros((), dtype=torch.float64, device=ranks.device)
        pictures: dict[str, Any] = {}
        by_level = levels.LevelSums()
        self.engine.eval()
        micro = settings.micro_batch
        batches = eval_batches(
            self.index, self.config.data, self.task.kind, "val", micro, ranks.rank, ranks.world, self.config.seed,
            self.task.history,
        )  # fmt: skip
        for i, host_batch in enumerate(batches):
            if settings.eval_batches is not None and i >= settings.eval_batches:
                break
            self.watchdog.beat(f"validation after step {self.step}")
            batch = host_batch.to(ranks.device)
            figures = self.task.eval_step(self.engine, batch)
            by_level.add(figures, batch.variables, host_batch.weights)
            for name, values in figures.items():
                part = (values.double() * batch.weights).sum()
                totals[name] = totals.get(name, torch.zeros_like(weight)) + part
            weight += batch.weights.sum()
            if i == 0 and settings.panels:  # on every rank: under ZeRO-3 a forward is collective
                pictures = self.task.panels(self.engine, batch)
        self.engine.train()
        if totals:
            *sums, count = sum_over_ranks(torch.stack([*totals.values(), weight])).tolist()
            means = {f"val/{name}": value / count for name, value in zip(totals, sums, strict=True)}
            detail = levels.means(gather_objects(by_level.take(), ranks))
            if self.tracker is not None:
                self.tracker.metrics(self.step, {**means, **{f"val/{name}": mean for name, mean in detail.items()}})
                for name, gray in pictures.items():
                    self.tracker.picture(self.step, name, gray)
            self._say(f"step {self.step}  " + "  ".join(f"{k} {v:.4f}" for k, v in means.items()))
        self.meter.pause()

    def _save(self) -> None:
        """Collective. Begin to write a checkpoint; the steps that follow go on with it."""
        if self.saved_step == self.step:
            return
        self._finish_save()
        self.cursors["cursors"] = max_over_ranks(self.cursors["cursors"], self.ranks.device)
        state = {
            **self.state,
            "step": self.step,
            "samples": self.cursors["samples"],
            "loss": self.last_loss,
            "optimizer_steps": optimizer_steps(self.engine),
            "config": self.tree,
            "mlflow_run_id": self.tracker.run_id if self.tracker else None,
        }
        texts = {
            "config.yaml": write_yaml(self.config),
            "cursors.json": json.dumps(self.cursors),
            "state.json": json.dumps(state, indent=1),
        }
        self.saver.start(self.step, self.average, texts)
        self.saved_step = self.step
        self.meter.pause()

    def _finish_save(self) -> None:
        """Collective. Wait for the save under way, if there is one."""
        while self.saver.step is not None:
            self.watchdog.beat(f"writing the checkpoint of step {self.saver.step}")
            self.saver.join(1.0)
            flags = torch.tensor([self.saver.busy, self.saver.error is not None], dtype=torch.float64)
            everyone = exchange(flags, self.ranks)
            self._go_on_saving(any(row[0] for row in everyone), any(row[1] for row in everyone))

    def _go_on_saving(self, busy: bool, failed: bool) -> None:
        """Collective, with what all ranks know of each other."""
        step = self.saver.step
        if step is None or not self.saver.advance(busy, failed):
            return
        if not failed:
            self.rollbacks = 0
            self._say(f"saved '{checkpoint.step_folder(self.config.folder, step)}'")
            return
        errors = gather_objects(self.saver.error, self.ranks)
        self.save_error = "; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error)
        self.saved_step = -1
        self.failed_saves += 1
        if self.ranks.main and self.tracker is not None:
            log.error("the checkpoint of step %d was not written (%s); training goes on", step, self.save_error)
            self.tracker.metrics(self.step, {"train/failed_saves": self.failed_saves})
            self.tracker.event(self.step, "save failed", reason=self.save_error)

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        visible = self.ranks.main and sys.stdout.isatty()
        return Progress(*columns, TimeRemainingColumn(), console=self.console, disable=not visible)

    def _say(self, text: str) -> None:
        if self.ranks.main:
            self.console.print(f"[{self.config.name}] {text}", markup=False, soft_wrap=True)
