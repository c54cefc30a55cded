"""Training on real DeepSpeed ranks: what a run promises about world size, ZeRO stage, resuming and being stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.encode import encode
from tests import nano, ranks
from tests.launch import ROOT, environment, launch, losses

TASKS = ("mae", "decoder", "dit", "forecast")
STAGES = (1, 2, 3)


class Chain:
    """A root folder with nano shards and configs, and the runs made in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        nano.shards(root / "shards")
        self.configs = nano.configs(root)

    def run(self, world: int, task: str, stage: int, name: str, *overrides: str) -> None:
        words = ["--config", str(self.configs[task]), f"name={name}", f"trainer.zero_stage={stage}", *overrides]
        ranks.run(world, words)

    def run_and_resume(self, task: str, stage: int) -> None:
        """A run of 20 steps, and a copy of it that goes on from its checkpoint of step 10 in fresh processes."""
        name = task if stage == 1 else f"{task}-{stage}"
        self.run(2, task, stage, name)
        self.run(2, task, stage, nano.stopped_at_10(self.folder(name)))

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All tasks at all stages on 2 ranks, straight and resumed in fresh processes, and once more on 1 rank."""
    chain = Chain(tmp_path_factory.mktemp("chain"))
    for task in TASKS:
        for stage in STAGES:
            chain.run_and_resume(task, stage)
        if task == "decoder":
            encode(str(chain.folder("decoder")), str(chain.root / "shards"), chain.root / "latents", "cpu", 4)
        chain.run(1, task, 1, f"{task}-alone")
    for stage in STAGES:
        chain.run(2, "dit", stage, f"dit-bf16-{stage}", "trainer.precision=bf16")
    chain.run(1, "mae", 1, "mae-recompute", "trainer.recompute=true")
    return chain


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("task", TASKS)
def test_ten_steps_and_ten_more_after_a_resume_are_twenty_steps(chain: Chain, task: str, stage: int) -> None:
    name = task if stage == 1 else f"{task}-{stage}"
    straight, resumed = losses(chain.folder(name)), losses(chain.folder(f"{name}-resumed"))
    assert list(resumed) == list(range(1, 21))
    assert [resumed[i] for i in range(11, 21)] == [straight[i] for i in range(11, 21)]
    ends = [load_file(chain.folder(n) / "ckpt/step_00000020/ema.safetensors") for n in (name, f"{name}-resumed")]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_and_one_process_give_the_same_losses(chain: Chain, task: str) -> None:
    two, one = losses(chain.folder(task)), losses(chain.folder(f"{task}-alone"))
    assert len(one) == 20
    assert max(abs(two[i] - one[i]) / one[i] for i in one) < 1e-4


@pytest.mark.parametrize("task", TASKS)
def test_zero_stages_agree(chain: Chain, task: str) -> None:
    first = losses(chain.folder(task))
    for stage in (2, 3):
        other = losses(chain.folder(f"{task}-{stage}"))
        assert max(abs(first[i] - other[i]) / first[i] for i in first) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_follows_fp32_and_keeps_statistics_in_full_precision(chain: Chain, stage: int) -> None:
    full, half = losses(chain.folder("dit")), losses(chain.folder(f"dit-bf16-{stage}"))
    assert max(abs(full[i] - half[i]) / full[i] for i in full) < 0.05
    weights = load_file(chain.folder(f"dit-bf16-{stage}") / "ckpt/step_00000020/ema.safetensors")
    statistics = load_file(chain.root / "latents" / "statistics.safetensors")
    assert weights["latent_mean"].dtype == torch.float32
    assert torch.equal(weights["latent_mean"], statistics["mean"])
    master = load_file(chain.folder(f"dit-bf16-{stage}") / "ckpt/step_00000020/model.safetensors")
    assert not torch.equal(master["embed.weight"], master["embed.weight"].bfloat16().float())


def test_training_learns_and_the_average_trails_the_weights(chain: Chain) -> None:
    for task, share in (("mae", 0.75), ("decoder", 0.95)):  # the tokenizer starts from a regression
        curve = losses(chain.folder(task))
        assert curve[20] < share * curve[1]
    step = chain.folder("mae") / "ckpt/step_00000020"
    ema, model = load_file(step / "ema.safetensors"), load_file(step / "model.safetensors")
    assert ema.keys() == model.keys()
    before = load_file(chain.folder("mae") / "ckpt/step_00000010/model.safetensors")
    name = "encoder.embed.weight"
    assert (ema[name] - model[name]).norm() < (before[name] - model[name]).norm()
    assert not torch.equal(ema[name], model[name])


def test_stages_two_and_three_write_the_weights_of_stage_one(chain: Chain) -> None:
    first = load_file(chain.folder("mae") / "ckpt/step_00000020/ema.safetensors")
    for stage in (2, 3):
        other = load_file(chain.folder(f"mae-{stage}") / "ckpt/step_00000020/ema.safetensors")
        assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in other.items()}
        assert max((first[k] - other[k]).abs().max().item() for k in first) < 1e-4


def test_recomputing_activations_changes_no_loss(chain: Chain) -> None:
    plain, recomputed = losses(chain.folder("mae-alone")), losses(chain.folder("mae-recompute"))
    assert max(abs(plain[i] - recomputed[i]) / plain[i] for i in plain) < 1e-6


def test_a_run_leaves_config_environment_pictures_and_validation(chain: Chain) -> None:
    run = chain.folder("mae")
    assert json.loads((run / "env.json").read_text())["world"] == 2
    assert (run / "config.yaml").read_text().startswith("task: mae")
    assert (run / "samples" / "step_00000020_reconstruction.png").stat().st_size > 200
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert 0 < last["val/masked"] < 2


@pytest.mark.parametrize(
    ("task", "figure", "in_training"),
    [("mae", "masked", False), ("decoder", "brain_mse", False), ("decoder", "voxel", True), ("dit", "velocity", True),
     ("forecast", "velocity", True)],
)  # fmt: skip
def test_losses_by_modality_speed_and_each_ranks_system_are_logged(
    chain: Chain, task: str, figure: str, in_training: bool
) -> None:
    rows = [json.loads(line) for line in (chain.folder(task) / "metrics.jsonl").read_text().splitlines()]
    last, validation = [r for r in rows if "train/loss" in r][-1], rows[-1]
    assert last["speed/tflops_per_second"] > 0
    assert "speed/mfu" not in last  # a CPU's peak is not known
    assert last["speed/data_wait_share"] <= last["speed/data_wait_share_max"] < 1
    assert all(last[f"system/rank{rank}/rss_gib"] > 0.1 for rank in (0, 1))
    assert (f"train/{figure}_by_modality/T1" in last) == in_training
    if in_training:  # a line a step, and all volumes are T1
        assert last[f"train/{figure}_by_modality/T1"] == pytest.approx(last[f"train/{figure}"], rel=1e-5)
    assert validation[f"val/{figure}_by_modality/T1"] == pytest.approx(validation[f"val/{figure}"], rel=1e-5)
    of_sexes = [validation[f"val/{figure}_by_sex/{sex}"] for sex in "FM"]
    assert min(of_sexes) < validation[f"val/{figure}"] < max(of_sexes)


def test_the_users_line_runs_on_two_ranks(chain: Chain) -> None:
    done = launch(2, "g3n/train.py", "--config", str(chain.configs["mae"]), "name=line", "trainer.steps=3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(losses(chain.folder("line"))) == [1, 2, 3]


def test_a_meeting_port_that_is_taken_is_named(tmp_path: Path) -> None:
    nano.shards(tmp_path / "shards")
    config = nano.configs(tmp_path)["mae"]
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        line = [sys.executable, "g3n/train.py", "--config", str(config)]
        done = subprocess.run(line, cwd=ROOT, env={**environment(), **alone}, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"error: port {port} is taken, perhaps by another training" in done.stderr
    assert "Traceback" not in done.stderr
