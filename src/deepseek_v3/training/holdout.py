"""Loss on text that is never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.training.batches import Documents, token_batches
from deepseek_v3.training.loss import Objective


@dataclass(frozen=True)
class HeldOutLoss:
    """`loss` in nats per token over `tokens` tokens; `bits_per_byte` of text, comparable between tokenizers."""

    loss: float
    bits_per_byte: float
    tokens: int


class HeldOutEvaluation:
    """Measures the main model's loss on the first windows of the hold-out split, `max_tokens` at most.

    Of `ranks` ranks each takes every so manieth batch, from the one numbered `rank` on. Raises DataError where the
    split is shorter than one window.
    """

    def __init__(
        self, shards: TokenShards, config: RunConfig, max_tokens: int, rank: int = 0, ranks: int = 1
    ) -> None:
        length = config.training.sequence_length
        self._loader = TokenLoader(shards, "holdout", sequence_length=length, shuffle=False)
        windows = max(1, min(self._loader.num_samples, max_tokens // length))
        # Whole batches only, so that a compiled model meets one shape.
        size = min(config.parallel.micro_batch_size, windows)
        batches = [(first, size) for first in range(0, windows - size + 1, size)]
        self._tokens_of_batch = size * length
        self._tokens = len(batches) * self._tokens_of_batch
        self._own = batches[rank::ranks]
        # Ranks run together, so each runs as many: one that has too few repeats a batch, and leaves it out.
        self._padding = [batches[0]] * (-(-len(batches) // ranks) - len(self._own))
        self._tokens_per_byte = shards.tokens_per_byte("holdout")

    def measure(
        self,
        main_losses: Callable[[Iterable[Tensor]], Tensor],
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> HeldOutLoss:
        """Runs the model over the windows; nothing of the model changes.

        `main_losses` gives the loss of each of some batches of tokens, `summed` the sum of a tensor over all ranks.
        """
        losses = main_losses(token_batches(self._loader, [*self._own, *self._padding], device))[: len(self._own)]
        loss = summed(losses.double().sum()).item() * self._tokens_of_batch / self._tokens
        return HeldOutLoss(loss, loss / math.log(2) * self._tokens_per_byte, self._tokens)


@torch.no_grad()
def main_losses(objective: Objective, documents: Documents, batches: Iterable[Tensor]) -> Tensor:
    """The main model's loss on each micro-batch: float32 [batches]."""
    losses = [objective(tokens_BX, 0.0, 0.0, documents(tokens_BX), predict=False).main for tokens_BX in batches]
    return torch.stack(losses)
