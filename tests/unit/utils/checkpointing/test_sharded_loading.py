"""Checkpoints saved by four ranks and loaded by one to four with other shardings, compared with slices."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file as load_safetensors
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard

from deepseek_v3.training.parallel.sharding import as_dtensor
from deepseek_v3.utils.checkpointing.directory import load_checkpoint, save_checkpoint
from deepseek_v3.utils.checkpointing.sharded import load_sharded, save_sharded, verify_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import unflatten
from deepseek_v3.utils.distributed.collectives import checkpoint_group
from deepseek_v3.utils.errors import CheckpointError
from helpers.rank_pool import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.bool)
PLAIN: dict[str, Any] = {"step": 7, "model": {}, "optimizer": {"num_steps": 7, "exp_avg": {}}, "random": {}}
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def wholes() -> dict[str, Tensor]:
    """Tensors of every dtype that a run saves, in many shapes that do not divide evenly."""
    draw = torch.Generator().manual_seed(0)
    shapes = random.Random(0)
    tensors = {
        EXPERTS: torch.randn(5, 6, 4, generator=draw),
        f"optimizer.exp_avg.{EXPERTS.removeprefix('model.')}": torch.randn(5, 6, 4, generator=draw).bfloat16(),
        "model.scale": torch.tensor(0.25),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.randn(8, generator=draw),
        "random.cpu": torch.arange(99, dtype=torch.uint8),
        "model.empty": torch.zeros(0, 3),
    }
    for number in range(40):
        shape = [shapes.randrange(8) for _ in range(shapes.randrange(4))]
        numbers = torch.randint(2**40, shape, generator=draw)
        tensors[f"model.{number}.weight"] = (
            numbers if number % 6 == 2 else (numbers % 251).to(DTYPES[number % len(DTYPES)])
        )
    return tensors


def part_of(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """This rank's local shard, sliced along one mesh dimension after the other."""
    part = whole
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces = list(part.chunk(mesh.size(axis), placement.dim))
            mine = mesh.get_local_rank(axis)
            part = pieces[mine] if mine < len(pieces) else part.narrow(placement.dim, 0, 0)
    return part


def meshes(world: int) -> list[DeviceMesh]:
    return [
        init_device_mesh("cpu", shape)
        for shape in {1: [(1,)], 4: [(4,), (2, 2)]}.get(world, [(world,), (1, world)])
    ]


def placements_of(name: str, ndim: int, mesh: DeviceMesh, draw: random.Random) -> list[Placement]:
    choices: list[Placement] = [Replicate(), *map(Shard, range(ndim))]
    if name == EXPERTS and mesh.ndim == 2:
        return [Shard(0), Shard(0)]
    return [draw.choice(choices) for _ in range(mesh.ndim)]


def cut(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """For each name on this rank: its tensor to load into, and the expected local shard."""
    rank, world, draw = dist.get_rank(), dist.get_world_size(), random.Random(seed)
    grids = meshes(world)
    tensors = {}
    for name, whole in wholes().items():
        mesh = draw.choice(grids) if name != EXPERTS else grids[-1]
        placements = placements_of(name, whole.ndim, mesh, draw)
        only = draw.randrange(world)
        if name == "random.cpu" or draw.random() < 0.1:  # as pipeline stages have it: one rank has it whole
            if rank == (0 if name == "random.cpu" else only):
                tensors[name] = whole.clone(), whole
        elif draw.random() < 0.2:
            tensors[name] = whole.clone(), whole
        else:
            part = part_of(whole, mesh, placements)
            tensors[name] = as_dtensor(part.clone(), mesh, placements, whole.shape), part
    return tensors


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def save_by_ranks(folder: Path) -> None:
    group = checkpoint_group()
    tensors = {name: tensor for name, (tensor, _) in cut(seed=1).items()}
    plain = PLAIN if dist.get_rank() == 0 else {"step": "of no account"}
    assert save_sharded(folder, tensors, plain, group).wait() == folder


@pytest.fixture(scope="module")
def folder(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that four ranks saved, each its local shards."""
    path = tmp_path_factory.mktemp("four") / "checkpoint_step_7"
    pool.run(4, save_by_ranks, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same state as one file."""
    path = tmp_path_factory.mktemp("one") / "checkpoint_step_7.pt"
    save_checkpoint(path, unflatten(wholes(), PLAIN))
    return path


def load_by_ranks(*paths: Path) -> None:
    group = checkpoint_group()
    for seed, path in enumerate(paths, start=2):
        parts = cut(seed)
        tensors = {name: tensor for name, (tensor, _) in parts.items()}
        places = {name: local(tensor).data_ptr() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            local(tensor).view(torch.uint8).fill_(1) if tensor.ndim else tensor.zero_()
        load_sharded(path, tensors, group)
        for name, (tensor, expected) in parts.items():
            assert local(tensor).dtype == expected.dtype
            assert local(tensor).shape == expected.shape, name
            assert bits(local(tensor)) == bits(expected), name
            assert local(tensor).data_ptr() == places[name], f"{name} was not filled in place"
    check_refusals(paths[0], group)


def check_refusals(path: Path, group: ProcessGroup | None) -> None:
    """An error that only the last rank has is raised on all, and no tensor has changed."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for wrong, message in (
        ({"model.other": torch.zeros(1)}, "has no tensor 'model.other'"),
        ({"model.scale": torch.zeros(2)}, r"'model.scale' is torch.float32 \[\] there, torch.float32 \[2\] here"),
        ({"model.scale": torch.tensor(1)}, r"'model.scale' is torch.float32 \[\] there, torch.int64 \[\] here"),
    ):
        tensors = {name: torch.zeros_like(whole) for name, whole in wholes().items()}
        before = {name: bits(tensor) for name, tensor in tensors.items()}
        with pytest.raises(CheckpointError, match=message) as error:
            load_sharded(path, {**tensors, **(wrong if last else {})}, group)
        assert str(path) in str(error.value)
        assert {name: bits(tensor) for name, tensor in tensors.items()} == before
    del tensors["model.scale"]
    with pytest.raises(CheckpointError, match=r"has the tensor 'model.scale', which has no place"):
        load_sharded(path, tensors, group)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_other_ranks_load_the_same_bits(pool: RankPool, world: int, folder: Path, file: Path) -> None:
    pool.run(world, load_by_ranks, folder, file)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_one_process_loads_whole_tensors(form: str, request: pytest.FixtureRequest) -> None:
    tensors = {name: torch.zeros_like(whole) for name, whole in wholes().items()}
    parameter = torch.nn.Parameter(tensors["model.scale"])
    load_sharded(request.getfixturevalue(form), {**tensors, "model.scale": parameter}, None)
    assert parameter.item() == 0.25
    for name, whole in wholes().items():
        assert bits(tensors[name]) == bits(whole), name


def test_a_folder_loads_as_the_same_dicts_as_a_file(folder: Path, file: Path) -> None:
    one, other = load_checkpoint(folder), load_checkpoint(file)
    assert one.keys() == other.keys()
    assert one["optimizer"].keys() == {"num_steps", "exp_avg"}
    assert (one["step"], one["optimizer"]["num_steps"]) == (7, 7)
    for path in (("model",), ("optimizer", "exp_avg"), ("random",)):
        left, right = one, other
        for key in path:
            left, right = left[key], right[key]
        assert left.keys() == right.keys()
        assert all(bits(left[name]) == bits(right[name]) for name in left)


def test_tensors_are_written_once_in_a_readable_format(folder: Path) -> None:
    found: dict[str, list[Tensor]] = {}
    for path in folder.glob("rank_*.safetensors"):
        for key, tensor in load_safetensors(path).items():
            found.setdefault(key.partition("[")[0], []).append(tensor)
    truth = wholes()
    assert found.keys() == truth.keys()
    for name, parts in found.items():
        assert sum(part.numel() for part in parts) == truth[name].numel(), name
        assert sorted(x for part in parts for x in part.double().view(-1).tolist()) == sorted(
            truth[name].double().view(-1).tolist()
        ), name


def test_a_local_shard_of_another_shape_is_refused(pool: RankPool) -> None:
    pool.run(2, check_parts)


def check_parts() -> None:
    mesh = init_device_mesh("cpu", (2,))
    expected = 2 - dist.get_rank()
    with pytest.raises(
        ValueError,
        match=rf"a local shard of shape \[3\] for the global shape \[3\]: expected \[{expected}\] on this rank",
    ):
        as_dtensor(torch.zeros(3), mesh, [Shard(0)], (3,))


def damaged_for_one(folder: Path) -> None:
    group = checkpoint_group()
    with pytest.raises(CheckpointError, match=r"rank_00001\.safetensors: is damaged"):
        verify_checkpoint(folder, group)


def test_damage_that_one_rank_finds_is_raised_on_all(pool: RankPool, folder: Path) -> None:
    path = folder / "rank_00001.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        pool.run(2, damaged_for_one, folder)
    finally:
        path.write_bytes(good)
