"""Optimizer states in host memory: the same losses, on real DeepSpeed ranks, from the first step and across a resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import nano, ranks
from tests.launch import losses


class Runs:
    """MAE runs of 20 steps on nano volumes; ``plain`` without offload on two ranks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        nano.shards(root / "shards")
        self.config = nano.configs(root)["mae"]

    def run(self, world: int, stage: int, name: str, offload: bool) -> list[float]:
        settings = [f"name={name}", f"trainer.zero_stage={stage}", f"trainer.offload={str(offload).lower()}"]
        ranks.run(world, ["--config", str(self.config), *settings])
        found = losses(self.root / "runs" / name)
        assert list(found) == list(range(1, 21))
        return list(found.values())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("offload"))
    runs.run(2, 1, "plain", offload=False)
    return runs


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 1), (2, 2), (2, 3)])
def test_offload_changes_no_loss_and_may_be_switched_on_at_a_resume(runs: Runs, world: int, stage: int) -> None:
    plain = list(losses(runs.root / "runs" / "plain").values())
    name = f"offload-{world}-{stage}"
    straight = runs.run(world, stage, name, offload=True)
    assert straight == pytest.approx(plain, rel=1e-5)
    resumed = runs.run(world, stage, nano.stopped_at_10(runs.root / "runs" / name), offload=True)
    assert resumed == straight
    if (world, stage) == (2, 1):
        copy = nano.stopped_at_10(runs.root / "runs" / "plain")
        assert runs.run(world, stage, copy, offload=True)[10:] == pytest.approx(plain[10:], rel=1e-5)
