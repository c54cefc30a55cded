"""What a checkpoint costs: how long training stands still, how long the writing takes, how long a run needs to come back.

``python -m benchmarks.checkpoint`` measures the published MAE in this process; ``--config configs/tiny/mae.yaml`` another one. For comparison it
also times DeepSpeed's own ``save_checkpoint`` of the same engine, which training has to wait for. Needs 16 bytes a parameter of host memory beside the
training itself, and twice that on the disk of ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_rows
from g3n.config import build, read_yaml
from g3n.engine import checkpoint, distributed, ema
from g3n.engine.deepspeed import OptimConfig, initialize
from g3n.engine.pieces import optimizer_steps
from g3n.engine.saver import Saver
from g3n.engine.trainer import TrainerConfig
from g3n.models.mae import MAE, MAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/mae.yaml", help="configuration of an MAE run")
    parser.add_argument("--steps", type=int, default=3, help="steps timed without and with a save each")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default a temporary folder")
    parser.add_argument("--output", type=Path, help="folder of checkpoint.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    raw = read_yaml(args.config)
    ranks = distributed.start()
    gpu = ranks.device.type == "cuda"
    precision = "bf16" if gpu else "fp32"  # a CPU without bf16 arithmetic would measure nothing but that
    trainer = build(TrainerConfig, {**raw["trainer"], "global_batch": 1, "micro_batch": 1, "precision": precision})
    net, optim = build(MAEConfig, raw["model"]["net"]), build(OptimConfig, raw["optim"])
    engine = initialize(MAE(net), trainer, optim, ranks, {})
    folder = args.folder or Path(tempfile.mkdtemp(prefix="checkpoint-"))
    average = ema.start_average(engine)
    saver = Saver(folder, engine, ranks, keep_last=1, keep_every=None)
    step = _Step(engine, net, gpu, saver)
    step()  # the optimizer makes its state
    plain = statistics.median(step() for _ in range(args.steps))
    rows: list[dict[str, Any]] = []
    for number in range(1, args.steps + 1):
        texts = {"cursors.json": json.dumps({"cursors": [0], "samples": 0}), "state.json": "{}"}
        begin = time.perf_counter()
        saver.start(number, average, texts)
        started = time.perf_counter() - begin
        with_save = step()
        while saver.step is not None:
            saver.join(0.01)
            saver.advance(saver.busy, saver.error is not None)
        written = time.perf_counter() - begin
        if saver.error:
            raise SystemExit(f"error: the checkpoint was not written: {saver.error}")
        rows.append({"stall_s": started + step.waited, "step_with_save_s": with_save, "written_after_s": written})
    final = checkpoint.step_folder(folder, args.steps)
    size = sum(p.stat().st_size for p in final.iterdir())
    verify = _seconds(lambda: checkpoint.damaged(final))
    load = _seconds(lambda: checkpoint.load(final, engine, optimizer_steps(engine)))
    theirs = _seconds(lambda: engine.save_checkpoint(str(folder / "theirs"), tag="engine", save_latest=False))
    row = {name: round(statistics.median(r[name] for r in rows), 4) for name in rows[0]}
    row |= {"first_stall_s": round(rows[0]["stall_s"], 4), "step_s": round(plain, 3), "gib": round(size / 2**30, 3)}
    row |= {"parameters": sum(p.numel() for p in engine.module.parameters()), "precision": precision}
    row |= {"verify_s": round(verify, 3), "load_s": round(load, 3), "deepspeed_save_s": round(theirs, 3)}
    row["stall_share_of_deepspeed"] = round(row["stall_s"] / theirs, 4)
    for name, value in row.items():
        print(f"{name:26} {value}")
    if args.folder is None:
        shutil.rmtree(folder)
    print(write_rows("checkpoint", [row], args.output))
    distributed.stop()


class _Step:
    """One training step on one volume; ``waited`` is what it waited for copies before the update."""

    def __init__(self, engine: Any, net: MAEConfig, gpu: bool, saver: Saver) -> None:
        self.engine, self.gpu, self.saver, self.waited = engine, gpu, saver, 0.0
        generator = torch.Generator().manual_seed(0)
        volume = torch.randint(0, 1000, (1, *net.volume_shape), dtype=torch.int16, generator=generator)
        order = torch.randperm(engine.module.encoder.positions.shape[1], generator=generator)
        visible = order[: int(0.3 * len(order))].sort().values[None]
        inputs = (volume, torch.tensor([500.0]), torch.tensor([0.01]), visible)
        self.inputs = [x.to("cuda" if gpu else "cpu") for x in inputs]

    def __call__(self) -> float:
        begin = time.perf_counter()
        self.engine.backward(self.engine(*self.inputs).float().square().mean())
        if self.gpu:
            torch.cuda.synchronize()
        before = time.perf_counter()
        self.saver.before_update()
        if self.gpu:
            torch.cuda.synchronize()
        self.waited = time.perf_counter() - before
        self.engine.step()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _seconds(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
