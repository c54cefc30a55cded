"""Ranks: how this process joins the others, and the few collectives the trainer needs."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from g3n.config import G3nError
from g3n.engine.launchers import announced_world


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
    """Join the process group that the launcher announced (``deepspeed``, ``torchrun``, ``srun``, ``mpirun``), or make one of this
    process alone.

    NCCL on GPUs, gloo on CPUs. On CPUs the cores are shared out among the node's ranks. Joining, and any one collective later, may
    take G3N_TIMEOUT_SECONDS (1800). Raises G3nError where the ranks do not come together, on every rank, with the reason.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    import deepspeed
    import deepspeed.ops

    # Its shared-memory collective is compiled by g++ at first use; gloo does the same without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    world = announced_world()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    device = _device(int(os.environ.setdefault("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(seconds=_timeout_seconds())
    backend = "nccl" if device.type == "cuda" else "gloo"
    _join(backend, device, timeout)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    if world > 1:
        sys.excepthook = _last_words
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


def _device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        visible = torch.cuda.device_count()
        if local_rank >= visible:
            raise G3nError(
                f"rank {local_rank} of host {socket.gethostname()} has no GPU: {visible} are visible there, and each rank takes "
                "one; start fewer ranks on this host, or look at CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // local_world))
    return torch.device("cpu")


def _timeout_seconds() -> float:
    value = os.environ.get("G3N_TIMEOUT_SECONDS", "1800")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0
    if not 0 < seconds < 1e7:
        raise G3nError(f"G3N_TIMEOUT_SECONDS is '{value}', expected seconds > 0")
    return seconds


def _join(backend: str, device: torch.device, timeout: datetime.timedelta) -> None:
    """Meet the other ranks at MASTER_ADDR, compare notes, connect."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    me, place = f"host {socket.gethostname()}", f"{address}:{port}"
    seconds = f"{timeout.total_seconds():g} s (G3N_TIMEOUT_SECONDS)"
    try:
        socket.getaddrinfo(address, int(port))
    except (OSError, ValueError) as error:
        raise G3nError(
            f"{me} does not know the address '{place}' of rank 0 ({error}); give the launcher a name or address that every "
            "host can resolve (--master_addr, MASTER_ADDR)"
        ) from error
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        _compare_notes(store, rank, world)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise G3nError(
                f"port {port} is taken, perhaps by another training on this machine; give deepspeed --master_port another"
            ) from error
        joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
        if joined:
            raise G3nError(
                f"{joined[1]} of {joined[2]} ranks came to {place} within {seconds}: a host did not start, cannot reach this "
                "one, or was told another number of ranks"
            ) from error
        raise G3nError(
            f"{me} waited at {place} for {seconds}: rank 0 is not there, another rank did not come, or a firewall is between the "
            "hosts; look at the first error of each host"
        ) from error
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" and world > 1 else {}
    try:
        meeting = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world, timeout=timeout, **options)
        dist.all_reduce(
            torch.zeros(1, device=device)
        )  # connections that cannot be made show here, not in the first step
    except RuntimeError as error:
        name = f"{backend.upper()}_SOCKET_IFNAME"
        links = ", ".join(link for _, link in socket.if_nameindex())
        raise G3nError(
            f"{me} met the others at {place} but cannot exchange data with them ({_first_line(error)}); set {name} (now "
            f"{os.environ.get(name, 'not set')}) on every host to its interface that leads to the others: {links}"
        ) from error


def _compare_notes(store: dist.Store, rank: int, world: int) -> None:
    """Every rank leaves its note; the first to come reads all and says what is wrong. Raises the same G3nError on every rank."""
    notes = dist.PrefixStore(f"g3n/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    turn = notes.add("came", 1)
    notes.set(str(turn), json.dumps({"rank": rank, "world": world, "host": socket.gethostname(), "runs": _versions()}))
    if turn == 1:
        read: list[dict[str, Any]] = []
        while len(read) < world and not contradiction(read):
            read.append(json.loads(notes.get(str(len(read) + 1))))
        notes.set("verdict", contradiction(read))
    verdict = notes.get("verdict").decode()
    if verdict:
        time.sleep(2 if rank == 0 else 0)  # rank 0 serves the notes: the others read them first
        raise G3nError(verdict)


def contradiction(notes: list[dict[str, Any]]) -> str:
    """What is wrong with a list of {rank, world, host, runs: {name: version}}, one a process; empty where nothing is."""
    seen: dict[int, str] = {}
    for note in notes:
        first = notes[0]
        host, rank = note["host"], note["rank"]
        if note["world"] != first["world"]:
            return (
                f"host {first['host']} was told {first['world']} ranks and host {host} {note['world']}; start both with the same "
                "number of hosts and of ranks a host"
            )
        if rank in seen:
            return f"two processes are rank {rank} (hosts {seen[rank]} and {host}); each host needs its own --node_rank"
        seen[rank] = host
        other = [f"{name} {v} and {note['runs'][name]}" for name, v in first["runs"].items() if v != note["runs"][name]]
        if other:
            return (
                f"hosts {first['host']} and {host} run different versions ({', '.join(other)}); each needs the same checkout "
                "and environment"
            )
    return ""


def _versions() -> dict[str, str]:
    import deepspeed

    digest = hashlib.blake2b(digest_size=6)
    root = Path(__file__).resolve().parents[2]
    for file in sorted(f for room in ("g3n", "kernels") for f in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return {"g3n": digest.hexdigest(), "torch": torch.__version__, "deepspeed": deepspeed.__version__}


def _last_words(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """After the traceback of one among many ranks: which one, and whether it was only told that another is gone."""
    sys.__excepthook__(kind, error, trace)
    me = f"error: [rank {os.environ['RANK']} on {socket.gethostname()}]"
    text = str(error)
    if re.search(r"closed by peer|reset by peer|Broken pipe|Timed out|remote process exited|ncclRemoteError", text):
        print(
            f"{me} another rank is gone or cannot be reached ({_first_line(error)}); its own output says why. The same line "
            "again goes on from the last checkpoint",
            file=sys.stderr,
        )
    else:
        print(f"{me} {kind.__name__}: {_first_line(error)}", file=sys.stderr)


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"\[[^\]\s]*\.(?:cc|cpp|h):\d+\] ", "", line)[:300].rstrip(". ")  # without places in gloo's source
