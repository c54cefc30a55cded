"""The memory that --dry-run predicts, against the bytes alive in a real DeepSpeed engine on gloo ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from g3n import memory_plan
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from g3n.tasks.mae import MAETask
from g3n.train import load_config
from tests import nano, ranks

BUCKET = 1_000_000
WIDE = ["model.net.width=240", "model.net.mlp=960", "model.net.depth=4", "model.net.decoder_width=120", "trainer.steps=3",
        f"deepspeed.zero_optimization.reduce_bucket_size={BUCKET}"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    nano.shards(root / "shards")
    return root


@pytest.mark.parametrize(
    ("world", "stage", "precision", "patch", "micro", "recompute"),
    [(1, 1, "fp32", 8, 2, False), (2, 1, "bf16", 8, 2, False), (2, 2, "fp32", 4, 16, False), (2, 2, "bf16", 4, 16, True),
     (2, 3, "bf16", 8, 2, False), (2, 3, "fp32", 4, 16, False)],
)  # fmt: skip
def test_predicted_bytes_are_those_of_the_engine(
    root: Path, monkeypatch: pytest.MonkeyPatch, world: int, stage: int, precision: str, patch: int, micro: int,
    recompute: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("G3N_KERNELS", "reference")  # as on the CPU
    name = f"live-{world}-{stage}-{precision}-{patch}"
    words = [*WIDE, f"name={name}", f"trainer.zero_stage={stage}", f"trainer.precision={precision}"]
    words += [f"model.net.patch={patch}", f"trainer.micro_batch={micro}", f"trainer.global_batch={2 * micro * world}"]
    words += [f"trainer.recompute={str(recompute).lower()}"]
    path = nano.configs(root)["mae"]
    ranks.run(world, ["--config", str(path), *words], [{"kind": "live bytes"}])
    config = load_config(path, words)
    index = load_index(str(root / "shards"))
    task = MAETask(config.model, index)
    batch = next(eval_batches(index, config.data, "volume", "train", 1, 0, 1, 0))
    planner = memory_plan.Planner(task, task.build(), batch, memory_plan.GPUs(world, None), BUCKET)
    found = int((config.folder / "live-bytes-rank0").read_text())
    plan = planner.plan(config.trainer)
    assert plan.peak + plan.host == pytest.approx(
        found, rel=0.05
    )  # without a GPU the copies for checkpoints lie beside the rest
