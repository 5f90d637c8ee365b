"""Joins this process to its job: its rank from the launcher's environment, its device and its process group."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # public, but not exported

from deepseek_v3.utils.errors import ConfigError, TrainingError

_FIRST_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)")
_RANGES = re.compile(r"\[([^\[\],-]+)[^\[\]]*\]")
_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_LAUNCHERS = "start it with torchrun, deepspeed or srun, or without any of their variables"


@dataclass(frozen=True)
class World:
    """This process's rank among the `size` of its job and the `local_size` of its host; by default it is alone.

    `address` and `port` are those of the store for the rendezvous of all ranks. Rank 0 hosts it, or, with
    `launcher_hosts_store`, the launcher's process on the first host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0
    launcher_hosts_store: bool = False

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> World:
        """Reads the variables of torchrun, deepspeed or an srun step; without a launcher the process is alone.

        Raises ConfigError for variables that are missing, not numbers, or contradict each other.
        """
        if "RANK" in variables or variables.get("WORLD_SIZE", "1") != "1":
            world = _from_launcher(variables)
        elif variables.get("SLURM_NTASKS", "1") != "1" and "SLURM_STEP_ID" in variables:
            world = _from_slurm_step(variables)  # a batch script also has SLURM_NTASKS, but is not a step
        else:
            world = ALONE
        _check("rank", world.rank, world.size)
        _check("local rank", world.local_rank, world.local_size)
        return world

    @property
    def is_alone(self) -> bool:
        """Whether this process is the only one of its job."""
        return self.size == 1

    @property
    def hosts_store(self) -> bool:
        """Whether this process hosts the rendezvous store, which then ends with it."""
        return self.rank == 0 and not self.launcher_hosts_store

    def connect(self, timeout: timedelta) -> TCPStore:
        """Connects to the rendezvous store; the process that hosts it creates it and waits for the others.

        Each thread needs its own connection: one that waits for an answer blocks every other use of it. Raises
        TrainingError if the processes do not find each other in time.
        """
        try:
            return TCPStore(
                self.address,
                self.port,
                world_size=self.size,
                is_master=self.hosts_store,
                timeout=timeout,
                multi_tenant=True,  # a second connection in the host process uses the same store
            )
        except RuntimeError as error:
            raise _rendezvous_failed(self, error) from error


ALONE = World()


@contextmanager
def process_group(
    world: World, device: torch.device, timeout: timedelta, even_alone: bool = False
) -> Iterator[None]:
    """While entered, torch.distributed works over all ranks: NCCL for CUDA tensors, gloo for CPU tensors.

    `timeout` limits the rendezvous and every collective operation. A process that is alone needs no group and gets
    one only with `even_alone`. Raises TrainingError if the processes do not find each other in time.
    """
    if world.is_alone and not even_alone:
        yield
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store = HashStore() if world.is_alone else world.connect(timeout)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
    except RuntimeError as error:
        raise _rendezvous_failed(world, error) from error
    failed = True
    try:
        yield
        failed = False
    finally:
        # After a failure NCCL would wait for operations that other ranks never join; the process ends anyway.
        if not (failed and on_gpu):
            dist.destroy_process_group()


def export_environment(world: World, device: torch.device) -> None:
    """Sets the environment variables from which DeepSpeed reads its ranks and its device."""
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    os.environ["DS_ACCELERATOR"] = device.type


def select_device(name: str, world: World = ALONE) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`; `auto` is this local rank's CUDA device, or the CPU without CUDA.

    Raises ConfigError for a device that is missing or unknown.
    """
    # CUDA reads this at its first allocation. Expandable segments fragment less than segments of fixed sizes.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu or cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
    found = torch.cuda.device_count()
    if world.local_rank >= found:
        raise ConfigError(
            f"local rank {world.local_rank} has no GPU: this process sees {found}; start at most {found} processes "
            "on a host, and let each of them see all its GPUs (under Slurm --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", world.local_rank)


def first_host(node_list: str) -> str:
    """The first node of a Slurm node list: `node01` of `node[01-03,07],login`. Raises ValueError for other text."""
    entry = _FIRST_ENTRY.match(node_list)
    host = _RANGES.sub(r"\1", entry[0]) if entry else ""
    if not host or "[" in host:
        raise ValueError(f"{node_list!r} is not a list of nodes such as node[01-03,07]")
    return host


def tasks_on_node(counts: str, node: int) -> int:
    """The tasks on node `node`, from 0, by a Slurm list such as `8(x3),4`. Raises ValueError if it has none."""
    left = node
    for entry in counts.split(","):
        match = _REPEATED.fullmatch(entry)
        if match is None:
            raise ValueError(f"{counts!r} is not a list of task counts such as 8(x3),4")
        left -= int(match[2] or 1)
        if left < 0:
            return int(match[1])
    raise ValueError(f"{counts!r} has no node {node}")


def _from_launcher(variables: Mapping[str, str]) -> World:
    """Reads the variables of torchrun and deepspeed; deepspeed says LOCAL_SIZE instead of LOCAL_WORLD_SIZE."""
    size, local_rank = _number(variables, "WORLD_SIZE"), _number(variables, "LOCAL_RANK")
    local_size = "LOCAL_SIZE" if "LOCAL_SIZE" in variables else "LOCAL_WORLD_SIZE"
    return World(
        rank=_number(variables, "RANK"),
        size=size,
        local_rank=local_rank,
        local_size=_number(variables, local_size),
        address=_value(variables, "MASTER_ADDR"),
        port=_number(variables, "MASTER_PORT"),
        launcher_hosts_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm_step(variables: Mapping[str, str]) -> World:
    """Reads the variables of an srun step; the port of the rendezvous follows from the job's number."""
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in variables else "SLURM_JOB_NODELIST"
    try:
        local_size = tasks_on_node(
            _value(variables, "SLURM_STEP_TASKS_PER_NODE"), _number(variables, "SLURM_NODEID")
        )
        address = variables.get("MASTER_ADDR") or first_host(_value(variables, nodes))
    except ValueError as error:
        raise ConfigError(f"{error}; {_LAUNCHERS}") from error
    default_port = 20_000 + _number(variables, "SLURM_JOB_ID") % 10_000
    return World(
        rank=_number(variables, "SLURM_PROCID"),
        size=_number(variables, "SLURM_NTASKS"),
        local_rank=_number(variables, "SLURM_LOCALID"),
        local_size=local_size,
        address=address,
        port=_number(variables, "MASTER_PORT") if "MASTER_PORT" in variables else default_port,
    )


def _value(variables: Mapping[str, str], name: str) -> str:
    if not variables.get(name):
        raise ConfigError(f"the environment lacks {name}; {_LAUNCHERS}")
    return variables[name]


def _number(variables: Mapping[str, str], name: str) -> int:
    text = _value(variables, name)
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text}: expected a number; {_LAUNCHERS}")
    return int(text)


def _check(name: str, rank: int, size: int) -> None:
    if rank >= size:
        raise ConfigError(f"{name} {rank} of {size} processes: ranks count from 0 to {size - 1}; {_LAUNCHERS}")


def _rendezvous_failed(world: World, error: RuntimeError) -> TrainingError:
    reason = str(error).split("\n")[0]
    return TrainingError(
        f"rank {world.rank} of {world.size} did not meet the others at {world.address}:{world.port}: {reason}; "
        f"check that all {world.size} processes were started, that the address is reachable from every host and "
        "the port free, and that GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, name one of its interfaces"
    )
