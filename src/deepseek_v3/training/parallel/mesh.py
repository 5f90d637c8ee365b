"""This process among all ranks of a run: who shares what with whom.

Ranks are numbered with pipeline stages outermost; inside a stage come the copies (`data_replicate`), inside a copy
the ranks that share it out (`data_shard`). Experts lie over the same ranks in another grid: each `expert`
consecutive ranks hold all experts between them, those with the same place in their group hold the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from deepseek_v3.config.parallel_config import ParallelConfig


@dataclass(frozen=True)
class ParallelMesh:
    """The grid of a layout and this rank's place in it; `dense` and `experts` are None where it is the only one.

    `dense` has the dimensions pipeline, replicate, shard; `experts` has pipeline, expert_replicate, expert_shard,
    expert.
    """

    parallel: ParallelConfig
    rank: int = 0
    dense: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    ranks_per_node: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.parallel.world_size

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.size == 1

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank sees."""
        return self.rank % self.parallel.data_ranks

    @property
    def pipeline_rank(self) -> int:
        """Which ranks of the pipeline this one belongs to, from the embedding on."""
        return self.rank // self.parallel.data_ranks

    @property
    def expert_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.rank % self.parallel.expert

    def dense_mesh(self) -> DeviceMesh | None:
        """The ranks that share out all but experts: one dimension, or copies times shards; None for one rank."""
        return _used(self.dense, ("replicate", "shard"))

    def expert_mesh(self) -> DeviceMesh | None:
        """The ranks that share out the same experts, in the same form."""
        return _used(self.experts, ("expert_replicate", "expert_shard"))

    def expert_shard_mesh(self) -> DeviceMesh:
        """The ranks of this stage as experts are cut among them: expert, expert_shard, expert_replicate.

        It says where parts belong; no rank can be reached by it.
        """
        assert self.experts is not None
        stage = self.experts.mesh[self.pipeline_rank].permute(2, 1, 0).contiguous()
        names = ("expert", "expert_shard", "expert_replicate")
        return DeviceMesh(self.experts.device_type, stage, mesh_dim_names=names, _init_backend=False)

    def group(self, name: str) -> dist.ProcessGroup:
        """The ranks along one dimension: `expert` or `pipeline`."""
        mesh = self.experts if name == "expert" else self.dense
        assert mesh is not None
        return mesh[name].get_group()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of such tensors over all ranks, on each of them; in place."""
        if not self.is_alone:
            dist.all_reduce(values)
        return values


def build_mesh(parallel: ParallelConfig, device_type: str, ranks_per_node: int = 1) -> ParallelMesh:
    """The grid of the processes that torch.distributed was started with; of this one alone where it was not.

    `ranks_per_node`: how many neighbouring ones are on one host, and reach each other faster.
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


def _used(mesh: DeviceMesh | None, names: Sequence[str]) -> DeviceMesh | None:
    """The dimensions of these two with more than one rank; the second one always where there are copies."""
    if mesh is None:
        return None
    copies, shards = (mesh[name].size() for name in names)
    if copies > 1:
        return mesh[tuple(names)]
    return mesh[names[1]] if shards > 1 else None
