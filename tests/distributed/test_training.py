"""Training on real DeepSpeed ranks: what a run promises about world size, ZeRO stage, resuming and being stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.encode import encode
from g3n.engine import lock
from tests import nano
from tests.launch import ROOT, command, environment, launch, losses

TASKS = ("mae", "decoder", "dit", "forecast")
STAGES = (1, 2, 3)


class Chain:
    """A root folder with nano shards and configs, and the runs made in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.output = ""
        nano.shards(root / "shards")
        self.configs = nano.configs(root)

    def job(self, task: str, stage: int, name: str, *overrides: str) -> dict[str, Any]:
        settings = [f"name={name}", f"trainer.zero_stage={stage}", *overrides]
        return {"config": str(self.configs[task]), "overrides": settings}

    def run(self, ranks: int, jobs: list[dict[str, Any]]) -> None:
        path = self.root / "jobs.json"
        # DeepSpeed's stage 3 replaces F.linear for the rest of the process, which changes the last digit: it comes last.
        jobs = sorted(jobs, key=lambda job: job["overrides"][1])
        path.write_text(json.dumps(jobs))
        done = launch(ranks, "tests/distributed/worker.py", str(path))
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        self.output += done.stdout + done.stderr

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def stopped_at_10(self, name: str) -> str:
        """A copy of a run as it was after its checkpoint of step 10."""
        copy = f"{name}-resumed"
        shutil.copytree(self.folder(name), self.folder(copy))
        shutil.rmtree(self.folder(copy) / "ckpt" / "step_00000020")
        (self.folder(copy) / "latest").write_text("step_00000010")
        return copy


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """All tasks at all stages on 2 ranks, straight and resumed in fresh processes, and once more on 1 rank."""
    chain = Chain(tmp_path_factory.mktemp("chain"))
    first, second = TASKS[:2], TASKS[2:]
    fault = {"kind": "nan", "rank": 1, "calls": [9]}  # 8 samples a step, 2 a micro-batch, 2 ranks: in step 5
    spoiled = [{**chain.job("mae", s, f"nan-once-{s}"), "fault": fault} for s in STAGES]
    slow = {
        **chain.job("mae", 1, "slow", "trainer.log_every=5"),
        "fault": {"kind": "slow", "rank": 1, "calls": list(range(8, 50))},
    }
    straight = [chain.job(t, s, t if s == 1 else f"{t}-{s}") for t in first for s in STAGES]
    chain.run(2, [*straight, *spoiled, slow])
    encode(str(chain.folder("decoder")), str(chain.root / "shards"), chain.root / "latents", "cpu", 4)
    again = [(t, s, chain.stopped_at_10(t if s == 1 else f"{t}-{s}")) for t in first for s in STAGES]
    straight = [chain.job(t, s, t if s == 1 else f"{t}-{s}") for t in second for s in STAGES]
    chain.run(2, straight + [chain.job(t, s, name) for t, s, name in again])
    again = [(t, s, chain.stopped_at_10(t if s == 1 else f"{t}-{s}")) for t in second for s in STAGES]
    bf16 = [chain.job("dit", s, f"dit-bf16-{s}", "trainer.precision=bf16") for s in STAGES]
    chain.run(2, [chain.job(t, s, name) for t, s, name in again] + bf16)
    recompute = chain.job("mae", 1, "mae-recompute", "trainer.recompute=true")
    chain.run(1, [chain.job(t, 1, f"{t}-alone") for t in TASKS] + [recompute])
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


def test_the_users_line_runs_on_two_ranks_and_another_world_size_is_refused(chain: Chain) -> None:
    line = ["g3n/train.py", "--config", str(chain.configs["mae"]), "name=line", "trainer.steps=3"]
    done = launch(2, *line)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(losses(chain.folder("line"))) == [1, 2, 3]
    alone = launch(1, *line)
    assert alone.returncode == 2
    assert "world size 2, this run has 1" in alone.stderr
    assert alone.stderr.count("error:") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_writes_a_checkpoint_and_exits_zero_and_the_same_line_goes_on(
    chain: Chain, number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    line = ["g3n/train.py", "--config", str(chain.configs["mae"]), f"name={name}", "trainer.steps=4000"]
    run = chain.folder(name)
    with subprocess.Popen(
        command(1, *line), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or len(losses(run)) < 5:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline, "no step within two minutes"
            time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    last = int((run / "latest").read_text().removeprefix("step_"))
    assert 5 <= last < 4000
    # Another length is another schedule, so going on with it is refused and nothing is touched.
    refused = launch(1, *line[:-1], "trainer.steps=5000")
    assert refused.returncode == 2
    assert "trainer.steps = 4000, this run has 5000" in refused.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_makes_every_rank_skip_the_step(chain: Chain, stage: int) -> None:
    name = f"nan-once-{stage}"
    run = chain.folder(name)
    undisturbed = "mae" if stage == 1 else f"mae-{stage}"
    found, expected = losses(run), losses(chain.folder(undisturbed))
    assert list(found) == list(range(1, 21))
    assert [found[i] for i in range(1, 5)] == [expected[i] for i in range(1, 5)]
    assert all(0 < loss < 2 for loss in found.values())  # no weight became NaN
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {r["step"]: r["train/lr"] for r in rows if "train/lr" in r}
    steady = [json.loads(line) for line in (chain.folder(undisturbed) / "metrics.jsonl").read_text().splitlines()]
    assert rates == {r["step"]: r["train/lr"] for r in steady if "train/lr" in r}
    assert rows[-1].get("train/skipped_steps", rows[-2].get("train/skipped_steps")) == 1
    assert [r["train/samples"] for r in rows if "train/samples" in r][-1] == 21 * 8
    said = r"loss is not finite at step 5 \(rank 1: sub-\S+, sub-\S+\): the step is skipped \(1 in a row\)"
    assert len(re.findall(said, chain.output)) == len(STAGES)


def test_a_slow_rank_is_named(chain: Chain) -> None:
    """Rank 1 takes 0.2 s more a micro-batch from step 5 on; a line comes every 5 steps."""
    rows = [json.loads(line) for line in (chain.folder("slow") / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"]: r.get("speed/slow_rank") for r in rows if "train/loss" in r and r["step"] >= 10} == {
        10: 1,
        15: 1,
        20: 1,
    }
    assert re.search(r"rank 1 is slow: data and forward took it \d\.\d\d s since the last line", chain.output)


def test_a_stuck_rank_ends_every_process_and_all_leave_their_stacks(chain: Chain) -> None:
    path = chain.root / "jobs.json"
    job = chain.job("mae", 1, "stuck", "trainer.stuck_seconds=8")
    path.write_text(json.dumps([{**job, "fault": {"kind": "stuck", "rank": 1, "calls": [9]}}]))
    done = launch(2, "tests/distributed/worker.py", str(path), timeout=150)
    assert done.returncode != 0
    text = done.stdout + done.stderr
    for rank in (0, 1):
        assert re.search(rf"error: \[rank {rank}\] no progress for \d+ s at step 5; stacks are in", text)
    stacks = [(chain.folder("stuck") / f"stuck-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "sleep_for_ever" in stacks[1]
    assert "sleep_for_ever" not in stacks[0]
    assert "distributed" in stacks[0]  # it waits for the other one


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_and_names_rank_and_samples(chain: Chain, ranks: int) -> None:
    line = ["g3n/train.py", "--config", str(chain.configs["mae"]), f"name=nan-{ranks}", "optim.lr=1e18"]
    done = launch(ranks, *line, "trainer.clip_norm=1e30", "optim.warmup_steps=0")
    assert done.returncode == 2
    text = done.stdout + done.stderr
    assert "not finite at step" in text
    assert "4 times in a row; the last good checkpoint is" in text
    assert f"rank {ranks - 1}: sub-0" in text


def test_two_jobs_in_one_folder_are_refused(chain: Chain) -> None:
    line = ["g3n/train.py", "--config", str(chain.configs["mae"]), "name=shared", "trainer.steps=2"]
    with ExitStack() as here:
        lock.hold(chain.folder("shared"), here)
        done = launch(1, *line)
    assert done.returncode == 2
    assert f"another job trains in '{chain.folder('shared')}' (process {os.getpid()} on " in done.stderr
    assert [p.name for p in chain.folder("shared").iterdir()] == [".lock"]
    assert launch(1, *line).returncode == 0  # it is free again


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
