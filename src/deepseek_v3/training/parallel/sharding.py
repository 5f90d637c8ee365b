"""Which part of every parameter this rank holds: for first weights, for files, and for norms over all ranks.

FOLDED: Which part of a whole tensor a rank's own tensor is, in words that saving and loading understand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.multi_tensor import sum_of_squares
from deepseek_v3.training.optimizer import local
from deepseek_v3.training.parallel.mesh import ParallelMesh


def as_dtensor(local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]) -> DTensor:
    """A DTensor of `shape` whose part on this rank is `local`, in the same memory.

    `placements` cut the whole by one mesh dimension after the other: a stack of experts is cut by the expert
    dimension first, then by that of the sharded data parallel, `[Shard(0), Shard(0)]`, or `[Shard(0), Shard(1)]`
    where the latter cuts rows. Where a cut is uneven, earlier ranks hold more, as `torch.chunk` has it. Raises
    ValueError where `local` does not have the shape that this rank's part must have.
    """
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(
        local.detach(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    (part,) = whole.__create_chunk_list__()
    if part.sizes != local.shape:
        raise ValueError(
            f"a part of shape {list(local.shape)} of {list(shape)}, expected {list(part.sizes)} on this rank "
            f"where {mesh} is cut by {tuple(placements)}"
        )
    return whole


@dataclass(frozen=True)
class LocalShard:
    """A block of a parameter of `shape`: along each dimension from `starts`, so many as `sizes`.

    `copies`: how many ranks hold this block. `is_expert`: whether it is of a stack of experts.
    """

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    copies: int
    is_expert: bool

    @property
    def rows(self) -> range:
        """Its place along the first dimension."""
        return range(self.starts[0], self.starts[0] + self.sizes[0])

    def of(self, whole: Tensor) -> Tensor:
        """The same block of a whole tensor: a view."""
        return self.of_rows(whole.narrow(0, self.starts[0], self.sizes[0]))

    def of_rows(self, rows: Tensor) -> Tensor:
        """Of rows that are whole along all other dimensions, what belongs to the block: a view."""
        for dimension in range(1, len(self.shape)):
            rows = rows.narrow(dimension, self.starts[dimension], self.sizes[dimension])
        return rows


def local_shards(model: nn.Module, mesh: ParallelMesh) -> dict[str, LocalShard]:
    """The piece of every parameter of a model that was laid out over `mesh`, by name."""
    experts = {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for name, _ in module.named_parameters()
    }
    parallel = mesh.parallel
    pieces = {}
    for name, parameter in model.named_parameters():
        starts, sizes = _held(parameter)
        shape = list(parameter.shape)
        if name in experts:
            starts[0] += experts[name].first_expert
            shape[0] = experts[name].num_experts
        if name in experts:
            copies = parallel.expert_replicate
        else:
            copies = parallel.data_replicate if isinstance(parameter, DTensor) else parallel.data_ranks
        pieces[name] = LocalShard(tuple(shape), tuple(starts), tuple(sizes), copies, name in experts)
    return pieces


class Views:
    """Shows the tensors of a model, or others cut like them, as parts of the whole, for files.

    FSDP's are already. Experts that live apart are whole tensors to each rank; here they are parts of all experts.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh) -> None:
        apart = mesh.parallel.expert > 1
        self._pieces = {
            name: piece for name, piece in local_shards(model, mesh).items() if apart and piece.is_expert
        }
        self._mesh = mesh

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, as a DTensor where it is a part."""
        if name not in self._pieces:
            return tensor
        placements: list[Placement] = [Shard(0), Shard(_cut_dimension(tensor)), Replicate()]
        return as_dtensor(local(tensor), self._mesh.expert_shard_mesh(), placements, self._pieces[name].shape)


class GlobalGradNorm:
    """The norm of the gradients of all ranks as one vector; each number counts once, however many ranks hold it."""

    def __init__(self, pieces: Mapping[str, LocalShard], mesh: ParallelMesh) -> None:
        self._copies = {name: piece.copies for name, piece in pieces.items()}
        self._mesh = mesh

    def __call__(self, gradients: Mapping[str, Tensor]) -> Tensor:
        shares = [1 / self._copies[name] for name in gradients]
        return self._mesh.sum_over_ranks(sum_of_squares(list(gradients.values()), shares)).sqrt()


def _cut_dimension(tensor: Tensor) -> int:
    """Along which dimension FSDP has cut a tensor; the first where it has not."""
    placements = tensor.placements if isinstance(tensor, DTensor) else ()
    return next((placement.dim for placement in placements if isinstance(placement, Shard)), 0)


def _held(parameter: Tensor) -> tuple[list[int], list[int]]:
    """Starts and sizes of this rank's block, sharded as torch.chunk cuts."""
    starts, sizes = [0] * parameter.ndim, list(parameter.shape)
    if isinstance(parameter, DTensor):
        place = parameter.device_mesh.get_coordinate()
        assert place is not None
        for placement, number, ranks in zip(parameter.placements, place, parameter.device_mesh.shape, strict=True):
            if isinstance(placement, Shard):
                size = -(-sizes[placement.dim] // ranks)
                start = min(number * size, sizes[placement.dim])
                starts[placement.dim] += start
                sizes[placement.dim] = min(size, sizes[placement.dim] - start)
    return starts, sizes
