"""Ranks from a launcher's environment, Slurm's notations, devices, and the rendezvous of processes."""

import socket
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.utils.distributed.launch import (
    ALONE,
    World,
    first_host,
    process_group,
    select_device,
    tasks_on_node,
)
from deepseek_v3.utils.errors import ConfigError, TrainingError
from helpers import fork_server
from helpers.jobs import HANGS, free_port

TORCHRUN = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node01",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "4270123",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "10",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_JOB_NODELIST": "node[07,11-12]",
}


def test_the_rank_under_torchrun() -> None:
    assert World.from_environment(TORCHRUN) == World(11, 16, 3, 8, "node01", 29500, launcher_hosts_store=True)


def test_the_rank_under_deepspeed() -> None:
    world = World.from_environment(DEEPSPEED)
    assert world == World(0, 2, 0, 2, "127.0.0.1", 29500)
    assert world.hosts_store


def test_the_rank_under_srun() -> None:
    world = World.from_environment(SRUN)
    assert world == World(9, 10, 1, 2, "node07", 20123)
    assert not world.hosts_store


def test_srun_can_use_another_address_and_port() -> None:
    world = World.from_environment({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (world.address, world.port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script, which is no step of srun
        {**SRUN, "SLURM_NTASKS": "1"},
    ],
)
def test_a_process_without_launcher_is_alone(variables: dict[str, str]) -> None:
    assert World.from_environment(variables) == ALONE
    assert ALONE.is_alone


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TORCHRUN, "RANK": "16"}, "rank 16 of 16 processes: ranks count from 0 to 15"),
        ({**TORCHRUN, "LOCAL_RANK": "8"}, "local rank 8 of 8 processes"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT = http: expected a number"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "the environment lacks MASTER_ADDR; start it with torchrun"),
        ({"WORLD_SIZE": "4"}, "the environment lacks LOCAL_RANK"),
        ({"RANK": "0"}, "the environment lacks WORLD_SIZE"),
        ({**SRUN, "SLURM_PROCID": "10"}, "rank 10 of 10"),
        ({**SRUN, "SLURM_JOB_NODELIST": "node["}, r"'node\[' is not a list of nodes"),
        ({**SRUN, "SLURM_NODEID": "3"}, "has no node 3"),
    ],
)
def test_a_contradictory_environment_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        World.from_environment(variables)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", sorted(set(TORCHRUN) - {"TORCHELASTIC_USE_AGENT_STORE"}))
def test_every_missing_variable_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {name}"):
        World.from_environment({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize(("gpus", "expected"), [(4, "cuda:3"), (0, "cpu")])
def test_auto_is_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch, gpus: int, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert select_device("auto", World(3, 4, 3, 4)) == torch.device(expected)
    assert select_device("cpu", World(3, 4, 3, 4)) == torch.device("cpu")


def test_a_process_that_is_alone_takes_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == select_device("cuda") == torch.device("cuda:0")


def test_a_local_rank_beyond_the_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this process sees 2"):
        select_device("auto", World(2, 4, 2, 4))


def test_a_device_that_is_missing_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        select_device("cuda")
    with pytest.raises(ConfigError, match="expected auto, cpu or cuda"):
        select_device("tpu")


def test_a_process_that_is_alone_needs_no_group() -> None:
    with process_group(ALONE, torch.device("cpu"), timedelta(seconds=1)):
        assert not dist.is_initialized()


def _meet(rank: int, size: int, port: int, answers: Any) -> None:
    world, timeout = World(rank, size, rank, size, "127.0.0.1", port), timedelta(seconds=HANGS)
    with process_group(world, torch.device("cpu"), timeout):
        second = world.connect(timeout)  # the host's as well
        second.set(f"second {rank}", str(rank))
        total = torch.tensor(float(rank + 1))
        dist.all_reduce(total)
        others = [second.get(f"second {other}").decode() for other in range(size)]
        answers.put((rank, total.item(), others))
        dist.barrier()
    answers.put(dist.is_initialized())


def test_processes_form_a_group_and_leave_it() -> None:
    context, size, port = fork_server.CONTEXT, 2, free_port()
    answers = context.Queue()
    processes = [context.Process(target=_meet, args=(rank, size, port, answers)) for rank in range(size)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=HANGS) for _ in range(2 * size)]
    for process in processes:
        process.join()
    assert sorted(answer for answer in found if answer is not False) == [
        (rank, 3.0, ["0", "1"]) for rank in range(size)
    ]
    assert found.count(False) == size
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_rendezvous_says_what_to_check(rank: int) -> None:
    world = World(rank, 2, 0, 1, "127.0.0.1", free_port())
    with (
        pytest.raises(
            TrainingError, match=rf"rank {rank} of 2 did not meet .* 127.0.0.1:{world.port}: .*check"
        ) as raised,
        process_group(world, torch.device("cpu"), timedelta(milliseconds=300)),
    ):
        pass
    assert "\n" not in str(raised.value)
    assert not dist.is_initialized()


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        world = World(0, 2, 0, 2, "127.0.0.1", other.getsockname()[1])
        with pytest.raises(TrainingError, match="address already in use"):
            world.connect(timedelta(seconds=1))


def test_a_process_that_is_alone_can_have_a_group() -> None:
    with process_group(ALONE, torch.device("cpu"), timedelta(seconds=5), even_alone=True):
        numbers = torch.ones(3)
        dist.all_reduce(numbers)
        assert (dist.get_world_size(), numbers.sum()) == (1, 3)
    assert not dist.is_initialized()


NODE_NAMES = st.text("abcxyz-", min_size=1, max_size=5).map(lambda text: f"n{text}")


@st.composite
def _node_list_entries(draw: st.DrawFn) -> tuple[str, str]:
    """One entry of a node list, and the first node of it."""
    name = draw(NODE_NAMES)
    if draw(st.booleans()):
        return name, name
    width = draw(st.integers(1, 4))
    numbers = [f"{draw(st.integers(0, 10**width - 1)):0{width}d}" for _ in range(draw(st.integers(1, 3)))]
    ranges = ",".join(f"{number}-{'9' * width}" if draw(st.booleans()) else number for number in numbers)
    suffix = draw(st.sampled_from(["", "-ib", ".cluster"]))
    return f"{name}[{ranges}]{suffix}", f"{name}{numbers[0]}{suffix}"


@given(st.lists(_node_list_entries(), min_size=1, max_size=4))
def test_the_first_host_of_any_node_list(entries: list[tuple[str, str]]) -> None:
    assert first_host(",".join(entry for entry, _ in entries)) == entries[0][1]


@pytest.mark.parametrize(
    ("node_list", "expected"),
    [("node[01-03,07]", "node01"), ("gpu7", "gpu7"), ("a,b[1-2]", "a"), ("rack[2-3]n[04,08-09],x", "rack2n04")],
)
def test_the_first_host_of_example_lists(node_list: str, expected: str) -> None:
    assert first_host(node_list) == expected


@pytest.mark.parametrize("node_list", ["", ",a", "node[", "node[]", "node[01-03"])
def test_an_invalid_node_list_is_refused(node_list: str) -> None:
    with pytest.raises(ValueError, match="not a list of nodes"):
        first_host(node_list)


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), min_size=1, max_size=5), st.data())
def test_the_tasks_on_any_node(groups: list[tuple[int, int]], data: st.DataObject) -> None:
    counts = ",".join(str(tasks) if nodes == 1 else f"{tasks}(x{nodes})" for tasks, nodes in groups)
    written_out = [tasks for tasks, nodes in groups for _ in range(nodes)]
    node = data.draw(st.integers(0, len(written_out) - 1))
    assert tasks_on_node(counts, node) == written_out[node]
    with pytest.raises(ValueError, match="has no node"):
        tasks_on_node(counts, len(written_out))


def test_an_invalid_list_of_task_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="not a list of task counts"):
        tasks_on_node("8(x", 0)
