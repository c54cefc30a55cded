"""Several hosts: two network namespaces joined by a cable. What a run promises when it spans them, and when one is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import nano
from tests.launch import ROOT, environment, losses

ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS = 120  # a checkpoint every 40
Line = Callable[[int], list[str]]  # what to type on host 0 or 1


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True)


class Hosts:
    """Two hosts with one cable, sharing a disk. ``root`` holds shards, configs, runs and what was printed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = [f"g3n-{os.getpid()}-{i}" for i in (0, 1)]
        nano.shards(root / "shards")
        self.config = nano.configs(root)["mae"]

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "cable",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            self.names[1],
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
        self.cable("up")

    def cable(self, state: str) -> None:
        for name in self.names:
            ip("-n", name, "link", "set", "cable", state)

    def kill(self, host: int) -> None:
        """End every process of a host, as a power cut does."""
        for pid in ip("netns", "pids", self.names[host]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        for i, name in enumerate(self.names):
            self.kill(i)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def train(self, run: str, *overrides: str) -> list[str]:
        settings = ["trainer.save_every=40", "trainer.eval_every=120", f"trainer.steps={STEPS}", f"name={run}"]
        return ["g3n/train.py", "--config", str(self.config), *settings, *overrides]

    def start(self, host: int, line: list[str], checkout: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        words = [sys.executable, *line] if line[0].endswith(".py") else line
        known = {"GLOO_SOCKET_IFNAME": "cable", "G3N_TIMEOUT_SECONDS": "60", "HOME": str(self.root), **env}
        with open(self.root / f"host{host}.txt", "w") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *words],
                cwd=checkout,
                env={**environment(), **known},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def said(self, host: int) -> str:
        return (self.root / f"host{host}.txt").read_text()

    def finish(self, processes: list[subprocess.Popen[str]], seconds: float = 90) -> list[int]:
        """Exit codes, after at most so many seconds."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(timeout=max(0.1, end - time.monotonic())) for p in processes]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running\n{self.said(0)[-3000:]}\n{self.said(1)[-3000:]}")

    def launch(self, line: Line, **env: str) -> list[int]:
        return self.finish([self.start(host, line(host), **env) for host in (0, 1)])

    def wait_for_step(self, run: str, step: int, processes: list[subprocess.Popen[str]]) -> None:
        end = time.monotonic() + 90
        while max(self.losses(run), default=0) < step:
            assert all(p.poll() is None for p in processes), self.said(0)[-3000:] + self.said(1)[-3000:]
            assert time.monotonic() < end, f"no step {step}"
            time.sleep(0.02)

    def losses(self, run: str) -> dict[int, float]:
        folder = self.root / "runs" / run
        return losses(folder) if (folder / "metrics.jsonl").is_file() else {}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    try:
        hosts.build()
    except subprocess.CalledProcessError as error:
        hosts.remove()
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    yield hosts
    hosts.remove()


def slurm(rank: int) -> dict[str, str]:
    """What srun sets for one of two tasks, one a host."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_JOB_NODELIST": "10.77.0.[1-2]",
    }


def deepspeed(hosts: Hosts, run: str, *overrides: str) -> Line:
    hostfile = hosts.root / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    words = [
        "deepspeed",
        "--hostfile",
        str(hostfile),
        "--no_ssh",
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        "29501",
    ]
    return lambda host: [*words, "--node_rank", str(host), *hosts.train(run, *overrides)]


def torchrun(hosts: Hosts, run: str, *overrides: str) -> Line:
    words = [
        "torchrun",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--master-addr",
        ADDRESSES[0],
        "--master-port",
        "29502",
    ]
    return lambda host: [*words, "--node-rank", str(host), *hosts.train(run, *overrides)]


@pytest.fixture(scope="module")
def one_host(hosts: Hosts) -> dict[int, float]:
    """The losses of two ranks on one host, by srun's variables."""
    line = hosts.train("one-host")
    ranks = [
        hosts.start(0, line, **{**slurm(rank), "SLURM_NODEID": "0", "SLURM_LOCALID": str(rank)}) for rank in (0, 1)
    ]
    assert hosts.finish(ranks) == [0, 0], hosts.said(0)
    found = hosts.losses("one-host")
    assert list(found) == list(range(1, STEPS + 1))
    return found


def test_srun_on_two_hosts_gives_the_losses_of_one(hosts: Hosts, one_host: dict[int, float]) -> None:
    line = hosts.train("srun")
    assert hosts.finish([hosts.start(rank, line, **slurm(rank)) for rank in (0, 1)]) == [0, 0], hosts.said(0)
    assert hosts.losses("srun") == one_host
    assert "finished" in hosts.said(0)
    assert "finished" not in hosts.said(1)


def test_a_host_that_dies_ends_the_other_and_the_same_lines_go_on(hosts: Hosts, one_host: dict[int, float]) -> None:
    """By deepspeed; it is the host of rank 0 that dies."""
    line = deepspeed(hosts, "killed")
    processes = [hosts.start(host, line(host)) for host in (0, 1)]
    hosts.wait_for_step("killed", 45, processes)
    hosts.kill(0)
    codes = hosts.finish(processes, 30)
    assert codes[1] != 0
    assert re.search(r"error: \[rank 1 on \S+\] another rank is gone or cannot be reached \(.+\)", hosts.said(1))
    assert hosts.launch(line) == [0, 0], hosts.said(0)
    assert "go on from" in hosts.said(0)
    assert hosts.losses("killed") == one_host


def test_a_cable_that_is_cut_ends_both_hosts_and_the_same_lines_go_on(hosts: Hosts, one_host: dict[int, float]) -> None:
    """By torchrun. No connection is closed, so only the want of progress tells."""
    line = torchrun(hosts, "cut", "trainer.stuck_seconds=6")
    processes = [hosts.start(host, line(host)) for host in (0, 1)]
    hosts.wait_for_step("cut", 45, processes)
    hosts.cable("down")
    try:
        codes = hosts.finish(processes, 60)
    finally:
        hosts.cable("up")
    assert all(code != 0 for code in codes)
    for rank in (0, 1):
        assert re.search(rf"error: \[rank {rank}\] no progress for \d+ s at", hosts.said(rank))
    assert hosts.launch(line) == [0, 0], hosts.said(0)
    assert "go on from" in hosts.said(0)
    assert hosts.losses("cut") == one_host


def test_hosts_with_different_code_are_refused_on_both(hosts: Hosts, tmp_path: Path) -> None:
    for room in ("g3n", "kernels"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "g3n/engine/ema.py", "a") as file:
        file.write("# changed on one host\n")
    line = hosts.train("versions")
    processes = [hosts.start(rank, line, (ROOT, tmp_path)[rank], **slurm(rank)) for rank in (0, 1)]
    assert hosts.finish(processes) == [2, 2]
    for rank in (0, 1):
        assert re.search(
            rf"error: \[rank {rank}\] hosts \S+ and \S+ run different versions \(g3n \w+ and \w+\)", hosts.said(rank)
        )
    assert not (hosts.root / "runs/versions").exists()


def test_an_interface_that_is_not_there_is_named(hosts: Hosts) -> None:
    line, env = hosts.train("interface"), {"GLOO_SOCKET_IFNAME": "eth7", "G3N_TIMEOUT_SECONDS": "20"}
    assert hosts.finish([hosts.start(rank, line, **slurm(rank), **env) for rank in (0, 1)]) == [2, 2]
    assert re.search(r"set GLOO_SOCKET_IFNAME \(now eth7\) on every host .*: lo, cable", hosts.said(1))
    assert "Traceback" not in hosts.said(0) + hosts.said(1)


def test_a_host_that_does_not_come_is_named(hosts: Hosts) -> None:
    """Two jobs, each without its other host."""
    jobs = [{**slurm(rank), "SLURM_JOB_ID": str(rank), "G3N_TIMEOUT_SECONDS": "2"} for rank in (0, 1)]
    assert hosts.finish([hosts.start(rank, hosts.train("missing"), **jobs[rank]) for rank in (0, 1)]) == [2, 2]
    assert "1 of 2 ranks came to 10.77.0.1:20000 within 2 s" in hosts.said(0)
    assert "waited at 10.77.0.1:20001 for 2 s" in hosts.said(1)
    assert "Traceback" not in hosts.said(0) + hosts.said(1)
