"""What a run does when something breaks: each fault is really injected into one of two ranks (tests/faults.py)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from g3n.engine import lock
from g3n.engine.watchdog import EXIT_CODE
from tests import nano, ranks
from tests.launch import ROOT, command, environment, losses

STAGES = (1, 2, 3)


class Runs:
    """MAE runs on nano volumes: 8 samples a step, 2 a micro-batch, so 2 calls of the loss a step on each of 2 ranks."""

    def __init__(self, root: Path) -> None:
        self.root = root
        nano.shards(root / "shards")
        self.config = nano.configs(root)["mae"]

    def words(self, name: str, *more: str) -> list[str]:
        return ["--config", str(self.config), f"name={name}", *more]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder(name) / "metrics.jsonl").read_text().splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.folder(name) / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """straight-<stage>: undisturbed runs of 20 steps."""
    runs = Runs(tmp_path_factory.mktemp("faults"))
    for stage in STAGES:
        ranks.run(2, runs.words(f"straight-{stage}", f"trainer.zero_stage={stage}"))
    return runs


@pytest.mark.parametrize("rank", [0, 1])
def test_sigkill_at_random_steps_and_the_same_line_again_give_the_same_losses_bit_for_bit(
    runs: Runs, rank: int
) -> None:
    name, words = f"killed-{rank}", ["trainer.save_every=3", "trainer.keep_last=2"]
    calls = random.sample(range(14), 2)
    for call in calls:
        launch = ranks.start(2, runs.words(name, *words), [{"kind": "SIGKILL", "rank": rank, "calls": [call]}])
        codes = launch.wait(60)
        assert codes[rank] == -9, f"killed in call {calls}\n{launch.output[-3000:]}"
        assert codes[1 - rank] == 1, f"killed in call {calls}\n{launch.output[-3000:]}"
        assert f"[rank {1 - rank} on " in launch.text(1 - rank)
        assert "another rank is gone or cannot be reached" in launch.text(1 - rank)
    ranks.run(2, runs.words(name, *words))
    found = losses(runs.folder(name))
    assert list(found.items()) == list(losses(runs.folder("straight-1")).items()), f"killed in calls {calls}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_to_the_launcher_writes_a_checkpoint_and_the_same_line_goes_on(
    runs: Runs, number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    line = ["g3n/train.py", *runs.words(name, "trainer.steps=4000")]
    run = runs.folder(name)
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
    assert 5 <= int((run / "latest").read_text().removeprefix("step_")) < 4000


def test_sigterm_while_four_workers_read_writes_a_checkpoint_and_going_on_changes_no_loss(runs: Runs) -> None:
    words = runs.words("workers", "data.workers=4", "trainer.log_every=1")
    launch = ranks.start(2, words, [{"kind": "slow", "calls": list(range(6, 40))}])
    launch.wait_for(runs.folder("workers") / "metrics.jsonl", 4)
    for pid in launch.pids:  # as a launcher does: everything in the group
        os.killpg(pid, signal.SIGTERM)
    assert launch.wait() == [0, 0], launch.output[-3000:]
    assert "stopped by SIGTERM" in launch.text(0)
    assert len(losses(runs.folder("workers"))) < 20
    ranks.run(2, words)
    assert losses(runs.folder("workers")) == losses(runs.folder("straight-1"))


def test_a_second_sigterm_during_the_save_changes_nothing(runs: Runs) -> None:
    words = runs.words("twice")
    faults = [{"kind": "save slow", "seconds": 0.5}, {"kind": "slow", "calls": list(range(6, 40))}]
    launch = ranks.start(2, words, faults)
    launch.wait_for(runs.folder("twice") / "metrics.jsonl", 4)
    launch.send(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while not list((runs.folder("twice") / "ckpt").glob(".step_*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    launch.send(signal.SIGTERM)
    launch.send(signal.SIGTERM)
    assert launch.wait() == [0, 0], launch.output[-3000:]
    ranks.run(2, words)
    assert losses(runs.folder("twice")) == losses(runs.folder("straight-1"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_makes_every_rank_skip_the_step(runs: Runs, stage: int) -> None:
    name = f"nan-{stage}"
    fault = {"kind": "nan", "rank": 1, "calls": [9]}  # in step 5
    launch = ranks.run(2, runs.words(name, f"trainer.zero_stage={stage}"), [fault])
    found, expected = losses(runs.folder(name)), losses(runs.folder(f"straight-{stage}"))
    assert list(found) == list(range(1, 21))
    assert [found[i] for i in range(1, 5)] == [expected[i] for i in range(1, 5)]
    assert all(0 < loss < 2 for loss in found.values())  # no weight became NaN
    rows, steady = runs.rows(name), runs.rows(f"straight-{stage}")
    rates, usual = ({r["step"]: r["train/lr"] for r in table if "train/lr" in r} for table in (rows, steady))
    assert rates == usual
    assert [r["train/skipped_steps"] for r in rows if "train/skipped_steps" in r][-1] == 1
    assert [r["train/samples"] for r in rows if "train/samples" in r][-1] == 21 * 8
    said = r"loss is not finite at step 5 \(rank 1: sub-\S+, sub-\S+\): the step is skipped \(1 in a row\)"
    assert len(re.findall(said, launch.output)) == 1
    assert [e["kind"] for e in runs.events(name)] == ["skipped"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_stops_every_rank_and_names_rank_and_samples(runs: Runs, world: int) -> None:
    words = runs.words(f"diverged-{world}", "optim.lr=1e18", "trainer.clip_norm=1e30", "optim.warmup_steps=0")
    launch = ranks.run(world, words, expect=2)
    assert "not finite at step" in launch.output
    assert "4 times in a row; the last good checkpoint is" in launch.output
    assert f"rank {world - 1}: sub-0" in launch.output


def test_a_loss_spike_is_named_with_its_samples(runs: Runs) -> None:
    fault = {"kind": "high", "rank": 1, "calls": [61]}  # in step 31
    words = runs.words("spike", "trainer.steps=40")
    launch = ranks.run(2, words, [fault])
    [event] = runs.events("spike")
    assert {k: event[k] for k in ("step", "kind", "rank")} == {"step": 31, "kind": "spike", "rank": 1}
    assert event["zscore"] > 10
    assert len(event["keys"]) == 2
    assert (
        f"at step 31 is a spike (z = {event['zscore']}; largest on rank 1: {', '.join(event['keys'])})" in launch.output
    )
    assert list(losses(runs.folder("spike"))) == list(range(1, 41))


def test_spikes_that_stay_go_back_to_the_last_checkpoint_and_pass_over_the_data(runs: Runs) -> None:
    fault = {"kind": "high", "rank": 0, "calls": list(range(60, 66))}  # steps 31 to 33
    words = runs.words("rollback", "trainer.steps=40", "trainer.spike_rollback=3")
    launch = ranks.run(2, words, [fault])
    kinds = [(e["step"], e["kind"]) for e in runs.events("rollback")]
    assert kinds == [(31, "spike"), (32, "spike"), (33, "spike"), (30, "rollback")]
    assert "back to '" in launch.output
    steps = [r["step"] for r in runs.rows("rollback") if "train/loss" in r]
    assert steps == [*range(1, 34), *range(31, 41)]
    after = losses(runs.folder("rollback"))  # the last of each step
    undisturbed = losses(runs.folder("spike"))
    assert [after[i] for i in range(1, 31)] == [undisturbed[i] for i in range(1, 31)]
    assert after[31] < 1
    assert [r["train/samples"] for r in runs.rows("rollback") if "train/samples" in r][-1] == 43 * 8


def test_out_of_memory_on_one_rank_ends_the_job_with_a_report(runs: Runs) -> None:
    fault = {"kind": "out of memory", "rank": 1, "calls": [9]}
    launch = ranks.start(2, runs.words("memory"), [fault])
    assert launch.wait(60) == [1, 2], launch.output[-3000:]
    assert re.search(
        r"error: \[rank 1\] out of memory at step 5 \(CUDA out of memory.*lower trainer.micro_batch", launch.text(1)
    )
    report = (runs.folder("memory") / "out-of-memory-rank1.txt").read_text()
    assert re.search(r"at step 5, samples sub-\S+, sub-\S+; lower trainer.micro_batch", report)
    assert re.search(r"this process \d+\.\d\d GiB", report)
    assert "another rank is gone" in launch.text(0)


def test_a_slow_rank_is_named_within_twenty_steps(runs: Runs) -> None:
    """Rank 1 takes 0.2 s more a micro-batch from step 5 on; a line comes every 5 steps."""
    fault = {"kind": "slow", "rank": 1, "calls": list(range(8, 50))}
    launch = ranks.run(2, runs.words("slow", "trainer.log_every=5"), [fault])
    named = {r["step"]: r.get("speed/slow_rank") for r in runs.rows("slow") if "train/loss" in r and r["step"] >= 10}
    assert named == {10: 1, 15: 1, 20: 1}
    assert re.search(r"rank 1 is slow: data and forward took it \d\.\d\d s since the last line", launch.output)


def test_a_stuck_rank_ends_every_process_and_all_leave_their_stacks(runs: Runs) -> None:
    fault = {"kind": "stuck", "rank": 1, "calls": [9]}
    launch = ranks.start(2, runs.words("stuck", "trainer.stuck_seconds=4"), [fault])
    assert launch.wait(60) == [EXIT_CODE, EXIT_CODE]
    for rank in (0, 1):
        said = rf"error: \[rank {rank}\] no progress for \d+ s at step 5; stacks are in"
        assert re.search(said, launch.text(rank))
    stacks = [(runs.folder("stuck") / f"stuck-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "sleep_for_ever" in stacks[1]
    assert "sleep_for_ever" not in stacks[0]
    assert "distributed" in stacks[0]  # it waits for the other one


def test_a_rank_that_is_stopped_ends_the_others_and_itself_when_it_wakes(runs: Runs) -> None:
    fault = {"kind": "SIGSTOP", "rank": 1, "calls": [9]}
    launch = ranks.start(2, runs.words("asleep", "trainer.stuck_seconds=4"), [fault])
    deadline = time.monotonic() + 60
    while launch.code(0) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert launch.code(0) == EXIT_CODE
    assert launch.code(1) is None
    launch.send(signal.SIGCONT, 1)
    assert launch.wait(30)[1] in (1, EXIT_CODE)


def test_two_jobs_in_one_folder_are_refused(runs: Runs) -> None:
    words = runs.words("shared", "trainer.steps=2")
    with ExitStack() as here:
        lock.hold(runs.folder("shared"), here)
        second = ranks.run(1, words, expect=2)
    assert f"another job trains in '{runs.folder('shared')}' (process {os.getpid()} on " in second.output
    assert [p.name for p in runs.folder("shared").iterdir()] == [".lock"]
    ranks.run(1, words)  # it is free again


def test_a_thousand_steps_need_no_more_memory_and_files_than_a_hundred(runs: Runs) -> None:
    words = ["trainer.steps=1000", "trainer.save_every=50", "trainer.log_every=10", "trainer.eval_every=250"]
    launch = ranks.start(2, runs.words("soak", *words, "trainer.panels=false"))
    measured: list[tuple[int, int, int]] = []
    path = runs.folder("soak") / "metrics.jsonl"
    while launch.code(0) is None:
        step = runs.rows("soak")[-1]["step"] if path.is_file() and path.stat().st_size else 0
        try:
            pages = int(Path(f"/proc/{launch.pids[0]}/statm").read_text().split()[1])
            measured.append((step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{launch.pids[0]}/fd"))))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.1)
    assert launch.wait(120) == [0, 0], launch.output[-3000:]
    early = [m for m in measured if 100 <= m[0] < 300]
    late = [m for m in measured if m[0] >= 800]
    assert early
    assert late
    grown_mib = (max(m[1] for m in late) - max(m[1] for m in early)) / 2**20
    assert grown_mib < 20, f"{grown_mib:.0f} MiB more after step 800 than before step 300"
    assert max(m[2] for m in late) <= max(m[2] for m in early) + 2
