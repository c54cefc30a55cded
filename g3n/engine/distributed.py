"""Ranks: how this process joins the others, and the few collectives the trainer needs."""

from __future__ import annotations

import datetime
import os
import socket
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from g3n.config import G3nError


@dataclass(frozen=True)
class Ranks:
    """Who this process is among ``world``."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def start() -> Ranks:
    """Join the process group that ``deepspeed`` or ``torchrun`` announced, or make one of a single process.

    NCCL on GPUs, gloo on CPUs. On CPUs the cores are shared out among the node's ranks. Raises G3nError where the ranks'
    meeting port is taken.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collective is compiled by g++ at first use; gloo does the same without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _cores() // local_world))
    try:
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=datetime.timedelta(minutes=30)
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise G3nError(
            f"port {port} is taken, perhaps by another training on this machine; give deepspeed --master_port another"
        ) from error
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def stop() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise sum over ranks (a new tensor)."""
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def max_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """The element-wise maximum of a list of integers."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [int(v) for v in tensor.tolist()]


def exchange(values: torch.Tensor, ranks: Ranks) -> list[list[float]]:
    """A few numbers of every rank, in rank order: one collective, one wait for the device."""
    values = values.to(ranks.device, torch.float64)
    everyone = [torch.empty_like(values) for _ in range(ranks.world)]
    dist.all_gather(everyone, values)
    table: list[list[float]] = torch.stack(everyone).tolist()
    return table


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """``value`` of every rank, in rank order."""
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
