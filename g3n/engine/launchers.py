"""What the launcher says about this process.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and the others; ``srun`` and ``mpirun`` start one process a task and say the
same in variables of their own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

from g3n.config import G3nError

FIRST_PORT, PORTS = 20000, 10000  # meeting ports of SLURM jobs; below those that Linux hands out to clients
_MPI = (  # rank, world, rank on this host, ranks on this host
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def announced_world() -> int:
    """The number of ranks that were started; 1 without a launcher.

    What srun or mpirun say goes into RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process,
    so that DeepSpeed and torch find it. Raises G3nError where the variables contradict each other.
    """
    env = os.environ
    if "RANK" not in env and "WORLD_SIZE" not in env:
        for name, value in (from_slurm(env, torch.cuda.device_count()) or from_mpi(env)).items():
            if name in ("MASTER_ADDR", "MASTER_PORT"):
                env.setdefault(name, value)
            else:
                env[name] = value
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return 1
    rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank >= world:
        raise G3nError(
            f"RANK is {rank} and WORLD_SIZE {world}; ranks go from 0 to {world - 1}: start them with one launcher"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if world > 1 and not env.get(name):
            raise G3nError(f"{name} is not set: every rank needs the address and port of rank 0's host")
    return world


def from_slurm(env: Mapping[str, str], visible_gpus: int) -> dict[str, str]:
    """torch's variables for a task of a step of several tasks; empty elsewhere, in a batch script outside srun for example.

    A task that sees one GPU (--gpus-per-task=1) takes that one, whichever its place on the host.
    """
    tasks = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", "1")
    if not (env.get("SLURM_STEP_ID") or env.get("SLURM_STEPID")) or not tasks.isdecimal() or int(tasks) < 2:
        return {}
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    job = _number(env, "SLURM_JOB_ID") + 101 * int(env.get("SLURM_STEP_ID") or env["SLURM_STEPID"])
    found = {
        "RANK": str(_number(env, "SLURM_PROCID")),
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if visible_gpus == 1 else str(_number(env, "SLURM_LOCALID")),
        "MASTER_PORT": str(FIRST_PORT + job % PORTS),
    }
    if host := first_host(hosts):
        found["MASTER_ADDR"] = host
    here = _tasks_here(env)
    return found | ({"LOCAL_WORLD_SIZE": here} if here else {})


def from_mpi(env: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for a process of Open MPI, MPICH or Intel MPI; empty elsewhere.

    MPI does not tell where rank 0 is: with several hosts MASTER_ADDR comes from the user.
    """
    for rank, world, local_rank, local_world in _MPI:
        if env.get(rank) and int(env.get(world, "1")) > 1:
            found = {"RANK": env[rank], "WORLD_SIZE": env[world], "MASTER_PORT": "29500"}
            found |= {"LOCAL_RANK": env.get(local_rank, "0"), "LOCAL_WORLD_SIZE": env.get(local_world, "1")}
            return found | ({"MASTER_ADDR": "127.0.0.1"} if env.get(local_world) == env[world] else {})
    return {}


def first_host(hosts: str) -> str:
    """The first name of SLURM's short form: ``gpu[007-010,12],login`` -> ``gpu007``."""
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])*", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else ""


def _tasks_here(env: Mapping[str, str]) -> str | None:
    """Tasks on this host, from ``4(x2),3`` and the host's number."""
    short = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", short):
        counts = [n for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", short) for _ in range(int(times or 1))]
        host = int(env.get("SLURM_NODEID", "0"))
        return counts[host] if host < len(counts) else None
    return env.get("SLURM_NTASKS_PER_NODE")


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise G3nError(
            f"{name} is {value!r}, expected a number >= 0: the launcher sets it, or all of RANK, WORLD_SIZE, ..."
        )
    return int(value)
