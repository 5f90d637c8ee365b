"""Expert parallelism over torch.distributed, with NCCL or gloo.

A token is sent once to each rank that holds any of its experts. If ranks are grouped in nodes, it is sent once to
each node, to the rank with the same local rank there, and from there to the other ranks of that node. Only the step
between nodes overlaps with computation, in both directions; the step within a node runs when the first one is done.

Axes: T tokens, K experts per token, R received tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from deepseek_v3.moe.exchange import ExchangeStep, ReturnHandle, RoutingPlan, fields_of, pack, unpack
from deepseek_v3.moe.expert_parallel import ExpertParallelDispatcher, Fp8Dispatch
from deepseek_v3.ops.fp8 import RowBlocks
from deepseek_v3.ops.moe_permute import MoePermute, reference


@final
class AllToAllDispatcher(ExpertParallelDispatcher):
    """Reaches experts through `steps`. With `fp8`, dispatched rows are sent as e4m3; all else keeps its type."""

    def __init__(
        self,
        num_experts: int,
        steps: Sequence[ExchangeStep],
        fp8: Fp8Dispatch | None = None,
        permute: MoePermute = reference,
    ) -> None:
        super().__init__(num_experts // steps[0].group.size(), permute)
        self.num_experts, self.steps, self.fp8 = num_experts, steps, fp8

    def _dispatch_exchange(self, experts_TK: Tensor) -> _DispatchExchange:
        return _DispatchExchange(self, experts_TK)


class _DispatchExchange:
    """Sends tokens to their experts; in the backward pass, sends the gradients back."""

    def __init__(self, dispatcher: AllToAllDispatcher, experts_TK: Tensor) -> None:
        self._dispatcher = dispatcher
        self._fp8_rows: RowBlocks | None = None
        self._plans = [dispatcher.steps[0].plan(experts_TK, dispatcher.num_experts, dispatcher.permute)]

    def start(self, *tensors: Tensor) -> None:
        x_TD, gates_TK, experts_TK = tensors
        fp8 = self._dispatcher.fp8
        rows = (x_TD,) if fp8 is None else fp8.rows_of(x_TD)
        sent = [*rows, gates_TK, experts_TK.int()]
        self._dtype, self._fields = x_TD.dtype, fields_of(sent)
        self._all_to_all = self._plans[0].send(pack(sent))

    def wait(self) -> tuple[Tensor, ...]:
        packed = self._all_to_all.wait()
        for step in self._dispatcher.steps[1:]:
            experts_RK = unpack(packed, self._fields)[-1]
            self._plans.append(step.plan(experts_RK, self._dispatcher.num_experts, self._dispatcher.permute))
            packed = self._plans[-1].send(packed).wait()
        *rows, gates_RK, experts_RK = unpack(packed, self._fields)
        x_RD, fp8 = rows[0], self._dispatcher.fp8
        if fp8 is not None:
            x_RD, self._fp8_rows = fp8.received(RowBlocks(*rows), self._dtype)
        return x_RD, gates_RK, experts_RK

    def take_fp8_rows(self) -> RowBlocks | None:
        rows, self._fp8_rows = self._fp8_rows, None
        return rows

    def start_backward(self, *gradients: Tensor) -> None:
        self._returning = _start_return(self._plans, gradients[:2])

    def wait_backward(self) -> tuple[Tensor | None, ...]:
        return *self._returning.wait(), None

    @property
    def num_copies(self) -> int:
        return self._plans[-1].num_copies

    @property
    def first_expert(self) -> int:
        return self._dispatcher.steps[0].group.rank() * self._dispatcher.num_local_experts

    def combine_exchange(self) -> _CombineExchange:
        return _CombineExchange(self._plans)


class _CombineExchange:
    """Sends results back over the steps of the dispatch; in the backward pass, dispatches their gradients."""

    def __init__(self, plans: Sequence[RoutingPlan]) -> None:
        self._plans = plans

    def start(self, *tensors: Tensor) -> None:
        self._returning = _start_return(self._plans, tensors)

    def wait(self) -> tuple[Tensor, ...]:
        return tuple(self._returning.wait())

    def start_backward(self, *gradients: Tensor) -> None:
        self._all_to_all = self._plans[0].send(gradients[0])

    def wait_backward(self) -> tuple[Tensor, ...]:
        rows = self._all_to_all.wait()
        for plan in self._plans[1:]:
            rows = plan.send(rows).wait()
        return (rows,)


def _start_return(plans: Sequence[RoutingPlan], tensors_RD: Sequence[Tensor]) -> ReturnHandle:
    """Sends rows back through every step, the last one first; the first one is still in flight on return."""
    for plan in reversed(plans[1:]):
        tensors_RD = plan.send_back(tensors_RD).wait()
    return plans[0].send_back(tensors_RD)
