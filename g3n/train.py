"""Train a stage: ``deepspeed g3n/train.py --config configs/mae.yaml [key=value ...]``.

On one GPU or a laptop ``python g3n/train.py --config configs/tiny/mae.yaml`` does the same alone. Running the same line again
goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the launcher puts g3n/ itself on the path

import torch
from rich.console import Console

from g3n import flops, memory_plan, ops
from g3n.config import G3nError, build, did_you_mean, read_yaml, write_yaml
from g3n.engine.deepspeed import deepspeed_config
from g3n.engine.launchers import announced_world
from g3n.engine.trainer import Config, check, train
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.sources import open_shards
from g3n.tasks import TASKS


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The typed configuration of a YAML file with ``key=value`` overrides. Raises G3nError."""
    raw = read_yaml(path, overrides)
    task = raw.get("task")
    if task not in TASKS:
        raise G3nError(f"config key 'task' is {task!r}{did_you_mean(str(task), list(TASKS))}")
    return build(Config, raw, sections={"model": TASKS[task].Config})


def check_environment() -> None:
    """Raise G3nError where G3N_KERNELS or G3N_ATTENTION ask for what is not there."""
    try:
        ops.explain()
        ops.attention_requested()
    except (RuntimeError, ValueError) as error:
        raise G3nError(str(error)) from error


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed g3n/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="one of configs/*.yaml, or yours")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example optim.lr=1e-4 trainer.steps=100")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|STEP_FOLDER",
        help="auto (default): go on from the newest intact checkpoint; never: refuse a folder that has one",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check config and inputs, predict memory and arithmetic, train nothing"
    )
    parser.add_argument(
        "--gpus", metavar="16x80", help="with --dry-run: so many GPUs of so many GiB, instead of this machine's"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # given by DeepSpeed's launcher
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done or stopped by SIGTERM with a checkpoint, 130 by Ctrl-C with one, 2 after a user's mistake."""
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        config = load_config(args.config, args.overrides)
        if args.print_config:
            print(write_yaml(config), end="")
            return 0
        gpus = planned_gpus(args.gpus)
        check(config, gpus.count)
        check_environment()
        index = open_shards(config.data)
        task: Any = TASKS[config.task](config.model, index)
        if args.dry_run:
            describe(config, task, index, gpus)
            return 0
    except G3nError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake; one line says it
            print(f"error: {error}", file=sys.stderr)
        return 2
    from g3n.engine import distributed

    try:
        ranks = distributed.start()
        return train(config, task, index, ranks, args.resume)
    except G3nError as error:
        who = f"[rank {os.environ['RANK']}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"error: {who}{error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop()


def planned_gpus(text: str | None) -> memory_plan.GPUs:
    """``--gpus``, or the ranks that a launcher announced with this machine's GPU. Raises G3nError."""
    if text is not None:
        return memory_plan.GPUs.parse(text)
    gib = torch.cuda.get_device_properties(0).total_memory / memory_plan.GIB if torch.cuda.is_available() else None
    return memory_plan.GPUs(announced_world(), gib)


def describe(config: Config, task: Any, index: ShardIndex, gpus: memory_plan.GPUs) -> None:
    """Print what a run will do and need, from one sample of its data."""
    settings = config.trainer
    module = task.build()
    split = next(name for name, shards in index.splits.items() if any(shard.samples for shard in shards))
    batch = next(eval_batches(index, config.data, task.kind, split, 1, 0, 1, config.seed, task.history))
    tree = deepspeed_config(settings, config.optim, gpus.count, config.deepspeed)
    planner = memory_plan.Planner(task, module, batch, gpus, int(tree["zero_optimization"]["reduce_bucket_size"]))
    samples = sum(len(shard.samples) for shard in index.splits["train"])
    seen = settings.steps * settings.global_batch
    work = flops.flops_a_sample(flops.twin(task, module), batch)
    hours = seen * work / (0.4 * 989.5e12) / 3600
    print(f"task {config.task}, run '{config.folder}': inputs are right")
    print(f"{planner.parameters / 1e6:.2f} M trained parameters, {work / 1e9:.3g} GFLOP a sample, forward and backward")
    print(
        f"{settings.steps} steps of {settings.global_batch} = {seen / max(samples, 1):.3g} times the {samples} {task.unit} "
        f"of the training shards; {hours:.3g} hours of an H100 at an assumed 40 % of its peak"
    )
    console = Console()
    for table in memory_plan.tables(planner, settings):
        console.print(table)
    if gpus.gib is not None and (largest := planner.largest_micro_batch(settings)):
        print(f"trainer.micro_batch up to {largest} fits; trainer.global_batch stays, so the losses do too")


if __name__ == "__main__":
    sys.exit(main())
