"""The device meshes of a run: how its ranks form pipeline stages, replicas, shards and expert-parallel groups.

Ranks are numbered with the pipeline stages outermost, then the replicas of a stage (`data_replicate`), then the
FSDP shards of a replica (`data_shard`). The experts use a second mesh over the same ranks: each `expert`
consecutive ranks hold all experts of a layer between them, and ranks at the same position of their groups hold the
same experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from deepseek_v3.config.parallel_config import ParallelConfig


@dataclass(frozen=True)
class ParallelMesh:
    """The meshes of a layout and this rank's position in them.

    `dense` has the dimensions pipeline, replicate, shard; `experts` has pipeline, expert_replicate, expert_shard,
    expert. Both are None in a run of one rank. `ranks_per_node`: the number of consecutive ranks on one host.
    """

    parallel: ParallelConfig
    rank: int = 0
    dense: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    ranks_per_node: int = 1

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.parallel.world_size

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank."""
        return self.size == 1

    @property
    def data_rank(self) -> int:
        """This rank's index among the ranks of its stage, each of which reads different samples."""
        return self.rank % self.parallel.data_ranks

    @property
    def pipeline_rank(self) -> int:
        """This rank's index along the pipeline, from 0 at the embedding."""
        return self.rank // self.parallel.data_ranks

    @property
    def expert_rank(self) -> int:
        """The index of the shard of the experts that this rank holds."""
        return self.rank % self.parallel.expert

    @cached_property
    def dense_mesh(self) -> DeviceMesh | None:
        """The ranks that FSDP shards all parameters but the experts over: (shard), or (replicate, shard).

        None if one rank holds all of them.
        """
        return _data_mesh(self.dense, ("replicate", "shard"))

    @cached_property
    def expert_mesh(self) -> DeviceMesh | None:
        """The ranks that FSDP shards the same experts over, in the form of `dense_mesh`."""
        return _data_mesh(self.experts, ("expert_replicate", "expert_shard"))

    @cached_property
    def expert_shard_mesh(self) -> DeviceMesh:
        """This stage's mesh (expert, expert_shard, expert_replicate), in the order in which experts are sharded.

        It only describes the sharding: it has no process groups to communicate with.
        """
        assert self.experts is not None
        stage = self.experts.mesh[self.pipeline_rank].permute(2, 1, 0).contiguous()
        names = ("expert", "expert_shard", "expert_replicate")
        return DeviceMesh(self.experts.device_type, stage, mesh_dim_names=names, _init_backend=False)

    def group(self, name: str) -> dist.ProcessGroup:
        """The process group along one dimension: `expert` or `pipeline`."""
        mesh = self.experts if name == "expert" else self.dense
        assert mesh is not None
        return mesh[name].get_group()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Replaces `values` by their sum over all ranks, and returns them."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values


def build_mesh(parallel: ParallelConfig, device_type: str, ranks_per_node: int = 1) -> ParallelMesh:
    """The meshes of a layout over the ranks that torch.distributed was started with.

    A layout of one rank needs no torch.distributed. `ranks_per_node` is the number of consecutive ranks on one
    host, which reach each other faster than ranks on other hosts.
    """
    if parallel.world_size == 1:
        return ParallelMesh(parallel)
    numbers = torch.arange(parallel.world_size)
    dense = numbers.view(parallel.pipeline, parallel.data_replicate, parallel.data_shard)
    experts = numbers.view(parallel.pipeline, parallel.expert_replicate, parallel.expert_shard, parallel.expert)
    names = ("pipeline", "expert_replicate", "expert_shard", "expert")
    return ParallelMesh(
        parallel,
        dist.get_rank(),
        DeviceMesh(device_type, dense, mesh_dim_names=("pipeline", "replicate", "shard")),
        DeviceMesh(device_type, experts, mesh_dim_names=names),
        ranks_per_node,
    )


def _data_mesh(mesh: DeviceMesh | None, names: Sequence[str]) -> DeviceMesh | None:
    """The dimensions (replicate, shard) of `mesh`, without replicate if its size is 1; None for one rank."""
    if mesh is None:
        return None
    replicas, shards = (mesh[name].size() for name in names)
    if replicas > 1:
        return mesh[tuple(names)]
    return mesh[names[1]] if shards > 1 else None
