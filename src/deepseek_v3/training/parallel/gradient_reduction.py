"""Sums gradients over data-parallel ranks that travel in fewer bits and are added in float32.

Every rank cuts its gradients into one piece for each rank of the group, rounds the pieces, and sends them in one
all-to-all. The owner of a piece adds what it received in float32, in the order of the ranks, so that a number is
rounded once on its way, however many ranks there are, and the sum is the same bit for bit in every run. A sum over
replicas is then sent back to all of them, in bfloat16.

FSDP calls `ReduceScatter` objects to sum over its shards, and hooks to sum over replicas.

Axes: P ranks of a group, N numbers of a piece, G blocks of 128 numbers of a piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, cast, final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from deepseek_v3.moe.exchange import AsyncAllToAll, fields_of, pack, unpack
from deepseek_v3.ops.fp8 import BLOCK, FP8_QUANTIZE, dequantize_1x128
from deepseek_v3.ops.operation import Target


class NarrowForm(ABC):
    """The form in which gradients travel: how a rank rounds its pieces, and how their owner adds them."""

    @abstractmethod
    def rounded(self, pieces_PN: Tensor) -> tuple[Tensor, ...]:
        """The tensors, with a row for each rank, in which the pieces (P, N) float32 travel."""

    @abstractmethod
    def add(self, received: Sequence[Tensor], total_N: Tensor) -> None:
        """Writes the float32 sum of all ranks' pieces, as `rounded` returns them, to `total_N` (N,)."""


@final
class Bfloat16Form(NarrowForm):
    """Gradients as bfloat16."""

    def rounded(self, pieces_PN: Tensor) -> tuple[Tensor, ...]:
        return (pieces_PN.bfloat16(),)

    def add(self, received: Sequence[Tensor], total_N: Tensor) -> None:
        torch.sum(received[0], 0, dtype=torch.float32, out=total_N)


@final
class Fp8Form(NarrowForm):
    """Gradients as e4m3 (P, N) with a float32 scale for every 128 of them, (P, G)."""

    def __init__(self, device: torch.device) -> None:
        self._quantize = FP8_QUANTIZE.select(Target(device)).run.quantize_rows

    def rounded(self, pieces_PN: Tensor) -> tuple[Tensor, ...]:
        ranks, numbers = pieces_PN.shape
        if numbers % BLOCK:
            return self._quantize(pieces_PN, False)
        # Kernels want many rows, not a few long ones.
        values, scales = self._quantize(pieces_PN.view(-1, BLOCK), False)
        return values.view(ranks, numbers), scales.view(ranks, -1)

    def add(self, received: Sequence[Tensor], total_N: Tensor) -> None:
        total_N.zero_()
        # One rank's after the other: those of all ranks in float32 would take four times the memory.
        for values_N, scales_G in zip(*received, strict=True):
            total_N += dequantize_1x128(values_N[None], scales_G[None], torch.float32)[0]


def narrow_form(name: Literal["bf16", "fp8"], device: torch.device) -> NarrowForm:
    """The form that `parallel.gradient_reduction` names, on a device."""
    return Bfloat16Form() if name == "bf16" else Fp8Form(device)


def reduce_scatter(gradients: Tensor, total_N: Tensor, group: dist.ProcessGroup, form: NarrowForm) -> None:
    """Writes the sum over the ranks of this rank's piece of the `gradients` (P·N,) float32 to `total_N` (N,)."""
    sent = form.rounded(gradients.view(group.size(), -1))
    one_each = [1] * group.size()
    exchange = AsyncAllToAll(pack(sent), one_each, one_each, group)
    form.add(unpack(exchange.wait(), fields_of(sent)), total_N)


def all_reduce(gradients: Tensor, group: dist.ProcessGroup, form: NarrowForm) -> None:
    """Replaces `gradients` (any number of float32) by their sum over the ranks, equal on all ranks.

    The sums travel in bfloat16, and the owner of a piece also keeps what the others receive.
    """
    count = gradients.numel()
    padded = F.pad(gradients, (0, -count % (group.size() * BLOCK)))
    total_N = padded.new_empty(padded.numel() // group.size())
    reduce_scatter(padded, total_N, group, form)
    gathered = torch.empty_like(padded, dtype=torch.bfloat16)
    pieces = gathered.view(torch.uint8).chunk(group.size())
    dist.all_gather(list(pieces), total_N.bfloat16().view(torch.uint8), group=group)
    gradients.copy_(gathered[:count])


@final
class NarrowReduceScatter(ReduceScatter):
    """FSDP's sum over the shards of a unit. FSDP calls it on its own stream and keeps the input until then."""

    def __init__(self, form: NarrowForm) -> None:
        self._form = form

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert op == dist.ReduceOp.SUM
        assert not async_op
        reduce_scatter(input_tensor, output_tensor, group, self._form)


class ReplicaReduction:
    """FSDP's hook that sums a unit's gradients over its replicas, once per step: after the last micro-batch.

    FSDP makes the gradients of the first micro-batch views of the buffer that it passes here, and adds those of
    later micro-batches to them. In the last one, this moves their sum into the new buffer and sets them to 0.
    """

    def __init__(self, group: dist.ProcessGroup, form: NarrowForm) -> None:
        self._group, self._form = group, form
        self._accumulated: Tensor | None = None
        self.is_last = True

    @torch.no_grad()
    def __call__(self, reduced: Tensor) -> None:
        if reduced.is_cuda:  # FSDP allocates it on another stream, which must not reuse it before this one is done
            reduced.record_stream(torch.cuda.current_stream())
        if not self.is_last:
            if self._accumulated is None:
                self._accumulated = reduced
            return
        if self._accumulated is not None:
            reduced += self._accumulated
            self._accumulated.zero_()
            self._accumulated = None
        all_reduce(reduced, self._group, self._form)


def shard_with_narrow_reduction(module: nn.Module, mesh: DeviceMesh, form: NarrowForm, **options: Any) -> None:
    """Makes `module` an FSDP unit whose gradients are summed over `mesh`, (shard) or (replicate, shard), in `form`.

    Gradients are float32, in `options` by `reduce_dtype`, and are not divided.
    """
    names = mesh.mesh_dim_names
    assert names is not None
    fully_shard(module, mesh=mesh[names[-1]], **options)
    unit = cast(FSDPModule, module)
    unit.set_custom_reduce_scatter(NarrowReduceScatter(form))
    if len(names) == 2:
        hook = ReplicaReduction(mesh.get_group(0), form)
        unit.set_all_reduce_hook(hook)
        unit.replica_reduction = hook  # type: ignore[attr-defined]


def replica_reductions(root: nn.Module) -> list[ReplicaReduction]:
    """The hooks of all FSDP units in `root`."""
    found = [getattr(module, "replica_reduction", None) for module in root.modules()]
    return [hook for hook in found if hook is not None]
