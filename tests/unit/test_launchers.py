"""What a launcher says becomes RANK, WORLD_SIZE and the others, or one line about what is wrong."""

from __future__ import annotations

import os

import pytest
import torch

from g3n.config import G3nError
from g3n.engine import distributed
from g3n.engine.launchers import announced_world, first_host, from_mpi, from_slurm

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_NODELIST": "gpu[007-009]",
}


@pytest.mark.parametrize(
    ("short", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu9", "gpu7"),
        ("node[001-004,7]", "node001"),
        ("node[012,003]", "node012"),
        ("login,node[1-2]", "login"),
        ("node[1-2],login", "node1"),
        ("rack[2-3]-node[10-12].site", "rack2-node10.site"),
        ("10.0.0.[1-2]", "10.0.0.1"),
        ("my-node-[5]", "my-node-5"),
        ("", ""),
        ("node[1", "node"),
    ],
)
def test_the_first_host_of_a_short_list(short: str, first: str) -> None:
    assert first_host(short) == first


def test_a_task_of_a_slurm_step() -> None:
    assert from_slurm(SLURM, 4) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "23456",
    }


def test_the_step_decides_not_the_job() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "gpu009", "SLURM_STEP_ID": "1"}
    found = from_slurm({**SLURM, **step}, 0)
    assert (found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("2", "gpu009")
    assert found["MASTER_PORT"] != from_slurm(SLURM, 0)["MASTER_PORT"]  # two steps of a job may run side by side


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    assert from_slurm(SLURM, 1)["LOCAL_RANK"] == "0"
    assert from_slurm(SLURM, 0)["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "changed", [{"SLURM_STEP_ID": ""}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": ""}], ids=str
)
def test_a_batch_script_and_a_step_of_one_task_are_one_process(changed: dict[str, str]) -> None:
    assert from_slurm({**SLURM, **changed}, 1) == {}


def test_ports_stay_below_those_of_clients() -> None:
    ports = {int(from_slurm({**SLURM, "SLURM_JOB_ID": str(job)}, 0)["MASTER_PORT"]) for job in range(0, 10**6, 997)}
    assert min(ports) >= 20000
    assert max(ports) < 30000
    assert len(ports) > 900


def test_open_mpi_and_pmi() -> None:
    ompi = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
    }
    assert from_mpi(ompi) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_PORT": "29500",
    }
    alone = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert from_mpi(alone)["MASTER_ADDR"] == "127.0.0.1"
    assert from_mpi({"PMI_RANK": "0", "PMI_SIZE": "1"}) == {}


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The process environment without any launcher's variables; what the test sets is undone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_without_a_launcher_there_is_one_rank(env: dict[str, str]) -> None:
    assert announced_world() == 1
    assert "RANK" not in env


def test_slurm_is_put_where_torch_looks_and_the_users_port_stays(env: dict[str, str]) -> None:
    env.update(SLURM, MASTER_PORT="4711")
    assert announced_world() == 7
    assert (env["RANK"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("5", "gpu007", "4711")
    assert announced_world() == 7


def test_torchrun_inside_a_slurm_task_wins(env: dict[str, str]) -> None:
    env.update(SLURM, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")
    assert announced_world() == 2
    assert env["RANK"] == "1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2; ranks go from 0 to 1"),
        ({"RANK": "0"}, "WORLD_SIZE is '', expected a number"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a', expected a number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({**SLURM, "SLURM_PROCID": ""}, "SLURM_PROCID is '', expected a number"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_contradictions_are_one_line(env: dict[str, str], given: dict[str, str], message: str) -> None:
    env.update(given)
    with pytest.raises(G3nError, match=message) as caught:
        announced_world()
    assert "\n" not in str(caught.value)


def test_a_rank_without_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed._device(1) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(G3nError, match="has no GPU: 2 are visible there"):
        distributed._device(2)


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", ""])
def test_a_timeout_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("G3N_TIMEOUT_SECONDS", value)
    with pytest.raises(G3nError, match="expected seconds > 0"):
        distributed._timeout_seconds()


def note(rank: int, host: str, world: int = 2, **versions: str) -> dict[str, object]:
    return {"rank": rank, "world": world, "host": host, "runs": {"g3n": "aa", "torch": "2.13.0", **versions}}


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ([note(1, "b"), note(0, "a")], ""),
        ([note(1, "b"), note(0, "a", world=4)], "host b was told 2 ranks and host a 4"),
        ([note(0, "b"), note(0, "a")], "two processes are rank 0 (hosts b and a)"),
        (
            [note(0, "a"), note(1, "b", torch="2.12.1")],
            "hosts a and b run different versions (torch 2.13.0 and 2.12.1)",
        ),
    ],
)
def test_the_ranks_notes_are_compared(notes: list[dict[str, object]], message: str) -> None:
    found = distributed.contradiction(notes)
    assert found.startswith(message) if message else not found


def test_the_last_words_tell_a_lost_peer_from_an_error_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    place = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] "
    distributed._last_words(RuntimeError, RuntimeError(f"{place}Connection closed by peer [10.0.0.2]:35442"), None)
    assert (
        "another rank is gone or cannot be reached (Connection closed by peer [10.0.0.2]:35442)"
        in capsys.readouterr().err
    )
    distributed._last_words(ValueError, ValueError("a\nb"), None)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: [rank 3 on ")
    assert last.endswith("] ValueError: a")
