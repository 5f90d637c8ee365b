"""Moving rows between ranks as two nodes of autograd, one that starts and one that waits.

Whatever is computed between the two runs while rows travel. Autograd runs the latest node first, so the backward
pass meets the same two in the other order: the one that waited starts the way back, then comes the gradient of what
was computed in between, then the one that started waits.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Crossing(Protocol):
    """Rows on their way between ranks: one way in the forward pass, back in the backward pass.

    Each of the four may be called once in a pass, in this order.
    """

    def start(self, *tensors: Tensor) -> None:
        """Sends rows off."""

    def finish(self) -> tuple[Tensor, ...]:
        """Waits for the rows that have been sent here."""

    def start_back(self, *gradients: Tensor) -> None:
        """Sends the gradients of what `finish` returned off."""

    def finish_back(self) -> tuple[Tensor | None, ...]:
        """Waits for the gradients of what `start` took; None for whole numbers."""


def depart(crossing: Crossing, *tensors: Tensor) -> Tensor:
    """Starts a crossing; returns a ticket, an empty tensor that ties the two halves together."""
    return _Depart.apply(crossing, *tensors)


def arrive(crossing: Crossing, ticket: Tensor) -> tuple[Tensor, ...]:
    """Waits for what has crossed."""
    return _Arrive.apply(crossing, ticket)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *tensors: Tensor) -> Tensor:
        ctx.crossing = crossing
        crossing.start(*tensors)
        return tensors[0].new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.crossing.finish_back()


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, ticket: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004 -- ties the halves
        ctx.crossing = crossing
        return crossing.finish()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        ctx.crossing.start_back(*gradients)
        return None, gradients[0].new_zeros(0)
