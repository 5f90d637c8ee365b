"""Experts on several ranks, reached through torch.distributed, over NCCL or gloo.

A token goes once to each rank that holds any of its experts. Where ranks are grouped in nodes it goes once to each
node, to the rank that has the same place there, and on from there. Of these two hops the one between nodes is in
flight while the caller computes, both ways.

Axes: T tokens, K experts per token, R received tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from deepseek_v3.moe.exchange import Homecoming, Hop, Leg, columns_of, pack, unpack
from deepseek_v3.moe.expert_parallel import RemoteDispatcher
from deepseek_v3.ops.fp8 import dequantize_1x128, quantize_1x128


@final
class AllToAllDispatcher(RemoteDispatcher):
    """Reaches experts over `hops`; with `fp8`, rows travel to them in 8 bits and everything else as it is."""

    def __init__(self, num_experts: int, hops: Sequence[Hop], fp8: bool = False) -> None:
        super().__init__(num_experts // hops[0].group.size())
        self.num_experts, self.hops, self.fp8 = num_experts, hops, fp8

    def _dispatching(self, experts_TK: Tensor) -> _Dispatching:
        return _Dispatching(self, experts_TK)


class _Dispatching:
    """Tokens on their way to experts; the way back is that of their gradients."""

    def __init__(self, dispatcher: AllToAllDispatcher, experts_TK: Tensor) -> None:
        self._dispatcher = dispatcher
        self._legs = [dispatcher.hops[0].leg(experts_TK, dispatcher.num_experts)]

    def start(self, *tensors: Tensor) -> None:
        x_TD, gates_TK, experts_TK = tensors
        rows = quantize_1x128(x_TD) if self._dispatcher.fp8 else (x_TD,)
        parts = [*rows, gates_TK, experts_TK.int()]
        self._dtype, self._columns = x_TD.dtype, columns_of(parts)
        self._flight = self._legs[0].outward(pack(parts))

    def finish(self) -> tuple[Tensor, ...]:
        packed = self._flight.land()
        for hop in self._dispatcher.hops[1:]:
            experts_RK = unpack(packed, self._columns)[-1]
            self._legs.append(hop.leg(experts_RK, self._dispatcher.num_experts))
            packed = self._legs[-1].outward(packed).land()
        *rows, gates_RK, experts_RK = unpack(packed, self._columns)
        x_RD = dequantize_1x128(rows[0], rows[1], self._dtype) if self._dispatcher.fp8 else rows[0]
        return x_RD, gates_RK, experts_RK

    def start_back(self, *gradients: Tensor) -> None:
        self._homecoming = _homeward(self._legs, gradients[:2])

    def finish_back(self) -> tuple[Tensor | None, ...]:
        return *self._homecoming.land(), None

    @property
    def num_copies(self) -> int:
        return self._legs[-1].num_copies

    @property
    def first_expert(self) -> int:
        return self._dispatcher.hops[0].group.rank() * self._dispatcher.num_local_experts

    def combining(self) -> _Combining:
        return _Combining(self._legs)


class _Combining:
    """Results on their way back over the same legs; the way of their gradients is that of the tokens."""

    def __init__(self, legs: Sequence[Leg]) -> None:
        self._legs = legs

    def start(self, *tensors: Tensor) -> None:
        self._homecoming = _homeward(self._legs, tensors)

    def finish(self) -> tuple[Tensor, ...]:
        return tuple(self._homecoming.land())

    def start_back(self, *gradients: Tensor) -> None:
        self._flight = self._legs[0].outward(*gradients)

    def finish_back(self) -> tuple[Tensor, ...]:
        rows_RD = self._flight.land()
        for leg in self._legs[1:]:
            rows_RD = leg.outward(rows_RD).land()
        return (rows_RD,)


def _homeward(legs: Sequence[Leg], parts: Sequence[Tensor]) -> Homecoming:
    """Rows back over all legs; over the first one they are still on their way."""
    for leg in reversed(legs[1:]):
        parts = leg.homeward(parts).land()
    return legs[0].homeward(parts)
