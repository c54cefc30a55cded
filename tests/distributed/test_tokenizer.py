"""Options of the tokenizer and its baseline on real DeepSpeed ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g3n.config import read_yaml, write_yaml
from tests import nano, ranks
from tests.launch import losses

STEPS = ("trainer.steps=20", "trainer.eval_every=20", "trainer.save_every=10")
LATE = ("model.adversarial_weight=0.1", "model.adversarial_start=6")


class Runs:
    def __init__(self, root: Path) -> None:
        self.root = root
        nano.shards(root / "shards")
        self.configs = nano.configs(root)
        tree = read_yaml(self.configs["decoder"])
        net = {"latent_channels": 2, "channels": [8, 8, 16], "norm_groups": 8}
        self.configs["autoencoder"] = root / "autoencoder.yaml"
        self.configs["autoencoder"].write_text(write_yaml({**tree, "task": "autoencoder", "model": {"net": net}}))
        ranks.run(2, ["--config", str(self.configs["mae"])])

    def run(self, world: int, task: str, name: str, *overrides: str, expect: int = 0) -> str:
        words = ["--config", str(self.configs[task]), f"name={name}", *STEPS, *overrides]
        return ranks.run(world, words, expect=expect).output

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def logged(self, name: str, what: str) -> dict[int, float]:
        rows = [json.loads(line) for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines()]
        return {row["step"]: row[what] for row in rows if what in row}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("tokenizer"))


def largest_difference(a: dict[int, float], b: dict[int, float]) -> float:
    assert list(a) == list(b)
    return max(abs(a[i] - b[i]) / abs(a[i]) for i in a)


def test_the_discriminator_begins_at_its_step_and_goes_on_after_a_resume(runs: Runs) -> None:
    runs.run(1, "decoder", "plain")
    runs.run(2, "decoder", "late", *LATE)
    plain, late = runs.logged("plain", "train/voxel"), runs.logged("late", "train/voxel")
    assert [late[i] for i in range(1, 7)] == pytest.approx([plain[i] for i in range(1, 7)], rel=1e-4)
    verdict, hinge = runs.logged("late", "train/adversarial"), runs.logged("late", "train/discriminator")
    assert [verdict[i] == 0 and hinge[i] == 2 for i in range(1, 21)] == [True] * 6 + [False] * 14
    assert hinge[20] < hinge[7]
    resumed = nano.stopped_at_10(runs.folder("late"))
    runs.run(2, "decoder", resumed, *LATE)
    again = losses(runs.folder(resumed))
    assert [again[i] for i in range(11, 21)] == [losses(runs.folder("late"))[i] for i in range(11, 21)]
    ends = [load_file(runs.folder(n) / "ckpt/step_00000020/ema.safetensors") for n in ("late", resumed)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def test_stage_3_is_refused_with_a_discriminator(runs: Runs) -> None:
    said = runs.run(2, "decoder", "three", *LATE, "trainer.zero_stage=3", expect=2)
    assert "model.adversarial_weight needs whole weights on each rank; set trainer.zero_stage 1 or 2" in said


def test_a_fixed_projection_and_all_that_needs_no_whole_weights_at_any_stage(runs: Runs) -> None:
    options = ("model.ssim_weight=0.1", "model.gradient_weight=0.1", "model.frequency_weight=0.1")
    fixed = ("model.projection=pca", "model.projection_trained=false", "model.latent_noise=0.3")
    for world, stage in ((1, 1), (2, 3)):
        runs.run(world, "decoder", f"fixed-{stage}", *fixed, *options, f"trainer.zero_stage={stage}")
    assert largest_difference(losses(runs.folder("fixed-1")), losses(runs.folder("fixed-3"))) < 1e-3
    steps = [runs.folder("fixed-3") / f"ckpt/step_000000{n}/model.safetensors" for n in (10, 20)]
    first, last = (load_file(step) for step in steps)
    rows = first["projection.weight"]
    assert torch.equal(rows, last["projection.weight"])
    assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
    assert not torch.equal(first["decoder.stem.weight"], last["decoder.stem.weight"])


def test_the_baseline_learns_the_same_on_any_ranks(runs: Runs) -> None:
    for world in (1, 2):
        runs.run(world, "autoencoder", f"autoencoder-{world}")
    one, two = (losses(runs.folder(f"autoencoder-{world}")) for world in (1, 2))
    assert largest_difference(one, two) < 1e-3
    assert one[20] < 0.8 * one[1]
