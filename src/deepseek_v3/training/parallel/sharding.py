"""How the parameters of a model are sharded over ranks, for initial values, checkpoints and the gradient norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.multi_tensor import MULTI_TENSOR
from deepseek_v3.ops.operation import Target
from deepseek_v3.training.optimizer import local
from deepseek_v3.training.parallel.mesh import ParallelMesh


def as_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of the global `shape` whose local shard is `local`, sharing its memory.

    `placements` are applied in the order of the mesh dimensions. A stack of experts is sharded by the expert
    dimension first and by FSDP second: `[Shard(0), Shard(0)]`, or `[Shard(0), Shard(1)]` if FSDP shards the rows
    of each expert. An uneven split gives the first ranks more, as `torch.chunk` does. Raises ValueError if
    `local` does not have the shape of this rank's shard.
    """
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(
        local.detach(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    (chunk,) = whole.__create_chunk_list__()
    if chunk.sizes != local.shape:
        raise ValueError(
            f"a local shard of shape {list(local.shape)} for the global shape {list(shape)}: expected "
            f"{list(chunk.sizes)} on this rank of {mesh} with placements {tuple(placements)}"
        )
    return whole


@dataclass(frozen=True)
class LocalShard:
    """The block of a parameter that this rank holds.

    `shape`: the global shape of the parameter. `starts`, `sizes`: the block's offset and size in each dimension.
    `copies`: the number of ranks that hold the same block. `is_expert`: whether it belongs to a stack of experts.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int
    is_expert: bool

    @property
    def rows(self) -> range:
        """The block's indices in the first dimension."""
        return range(self.starts[0], self.starts[0] + self.sizes[0])

    def of(self, whole: Tensor) -> Tensor:
        """The block of a tensor of the global shape, as a view."""
        return self.of_rows(whole.narrow(0, self.starts[0], self.sizes[0]))

    def of_rows(self, rows: Tensor) -> Tensor:
        """The block of a tensor that holds only the block's rows, but is whole in all other dimensions; a view."""
        for dimension in range(1, len(self.shape)):
            rows = rows.narrow(dimension, self.starts[dimension], self.sizes[dimension])
        return rows


def local_shards(model: nn.Module, mesh: ParallelMesh) -> dict[str, LocalShard]:
    """This rank's shard of every parameter of a model that was parallelized over `mesh`, by parameter name."""
    experts = {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for name, _ in module.named_parameters()
    }
    parallel = mesh.parallel
    shards = {}
    for name, parameter in model.named_parameters():
        starts, sizes = _fsdp_block(parameter)
        shape = list(parameter.shape)
        if name in experts:
            starts[0] += experts[name].first_expert
            shape[0] = experts[name].num_experts
            copies = parallel.expert_replicate
        else:
            copies = parallel.data_replicate if isinstance(parameter, DTensor) else parallel.data_ranks
        shards[name] = LocalShard(tuple(shape), tuple(starts), tuple(sizes), copies, name in experts)
    return shards


def as_global(tensor: Tensor, shard: LocalShard | None, mesh: ParallelMesh) -> Tensor:
    """A parameter, or a tensor sharded like it, as a DTensor of its global shape, sharing its memory.

    FSDP's tensors already are such DTensors. Under expert parallelism, a stack holds only this rank's experts, and
    becomes a DTensor of all experts here. Tensors without a `shard`, such as buffers, are returned as they are.
    """
    if shard is None or not shard.is_expert or mesh.parallel.expert == 1:
        return tensor
    placements: list[Placement] = [Shard(0), Shard(_fsdp_dimension(tensor)), Replicate()]
    return as_dtensor(local(tensor), mesh.expert_shard_mesh, placements, shard.shape)


class GlobalGradNorm:
    """The L2 norm of the gradients of the whole model: every element counts once, however many ranks hold it.

    Call it with this rank's gradients by parameter name; returns 0-d float32, the same on all ranks.
    """

    def __init__(self, shards: Mapping[str, LocalShard], mesh: ParallelMesh, device: torch.device) -> None:
        self._copies = {name: shard.copies for name, shard in shards.items()}
        self._mesh = mesh
        self._sum_of_squares = MULTI_TENSOR.select(Target(device)).run.sum_of_squares

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        weights = [1 / self._copies[name] for name in gradients]
        return self._mesh.sum_over_ranks(self._sum_of_squares(list(gradients.values()), weights)).sqrt()


def _fsdp_dimension(tensor: Tensor) -> int:
    """The dimension that FSDP has sharded; the first one for a tensor that is not sharded."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return next((placement.dim for placement in placements if isinstance(placement, Shard)), 0)


def _fsdp_block(parameter: Tensor) -> tuple[list[int], list[int]]:
    """Offsets and sizes of this rank's FSDP shard, which is split as `torch.chunk` splits."""
    starts, sizes = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        coordinate = parameter.device_mesh.get_coordinate()
        assert coordinate is not None
        for placement, index, num_ranks in zip(
            parameter.placements, coordinate, parameter.device_mesh.shape, strict=True
        ):
            if isinstance(placement, Shard):
                size = -(-sizes[placement.dim] // num_ranks)
                start = min(index * size, sizes[placement.dim])
                starts[placement.dim] += start
                sizes[placement.dim] = min(size, sizes[placement.dim] - start)
    return starts, sizes
