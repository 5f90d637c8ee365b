"""The validation loss: the main model's loss on the hold-out split, which is never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader, draw_windows
from deepseek_v3.data.tokens.source import RunTokens, TokenSource, WeightedSource, mean_by_share
from deepseek_v3.training.data import DocumentIds, token_batches
from deepseek_v3.training.loss import Objective
from deepseek_v3.utils.errors import DataError

_TOKENS_READ_AT_ONCE = 2**20  # by each rank, between two checks that no rank has failed to read

Batch = Int64Array  # numbers of windows


@dataclass(frozen=True)
class ValidationLoss:
    """The loss in nats per token over `tokens` targets, which encode `num_bytes` bytes of UTF-8 text.

    `windows`: the number of windows of the hold-out split that were evaluated. `by_source`: the same of every named
    source of a mixture.
    """

    loss: float
    tokens: int
    num_bytes: float
    windows: int
    by_source: Mapping[str, ValidationLoss] = field(default_factory=dict)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, which is comparable between tokenizers."""
        return self.in_bits_per_byte(self.loss)

    def in_bits_per_byte(self, loss: float) -> float:
        """Converts a loss in nats per token over these targets to bits per byte; NaN if they encode no text."""
        return loss / math.log(2) * self.tokens / self.num_bytes if self.num_bytes else math.nan


class ValidationWindows:
    """The windows of the hold-out split that are measured: `max_tokens` tokens at most, and at least one window.

    They are drawn from the whole split by `draw_windows`, so they are the same for every run, rank, batch size and
    baseline. With `masked` documents the first token of a document is not a target, because no token of its
    document precedes it. Raises DataError if the split is shorter than one window, or no target is left.
    """

    def __init__(self, tokens: TokenSource, sequence_length: int, max_tokens: int, masked: bool = False) -> None:
        self._loader = TokenLoader(tokens, "holdout", sequence_length=sequence_length, shuffle=False)
        count = max(1, min(self._loader.num_samples, max_tokens // sequence_length))
        self.numbers = draw_windows(self._loader.num_samples, count)
        self._end_of_text = tokens.end_of_text if masked else None
        self.num_targets = sum(targets.size for targets in self._targets()) if masked else count * sequence_length
        if not self.num_targets:
            raise DataError(
                f"{tokens.name}: every target of the {count} held-out windows measured is the first token of "
                "a document, expected some within documents; measure more tokens, or set data.mask_documents=false"
            )
        self._byte_lengths = tokens.byte_lengths("holdout")

    def read(self, numbers: Batch) -> Int64Array:
        """These windows, each with the token that follows it: int64 (windows, sequence_length + 1)."""
        return self._loader.windows(numbers)

    def blocks(self) -> Iterator[Int64Array]:
        """All windows, about a million tokens at a time: int64 (windows, sequence_length + 1)."""
        at_once = max(1, _TOKENS_READ_AT_ONCE // self._loader.sequence_length)
        for first in range(0, len(self.numbers), at_once):
            yield self.read(self.numbers[first : first + at_once])

    def num_bytes(self) -> float:
        """The bytes of text that the targets encode."""
        return float(sum(self._byte_lengths[targets].sum() for targets in self._targets()))

    def _targets(self) -> Iterator[Int64Array]:
        """All tokens of each window but its first one, without those that begin a masked document."""
        for windows in self.blocks():
            targets = windows[:, 1:]
            yield targets if self._end_of_text is None else targets[windows[:, :-1] != self._end_of_text]


class Validator:
    """Computes the main model's loss on `ValidationWindows`.

    Rank `rank` reads every `ranks`-th batch, starting at batch `rank`.
    """

    def __init__(
        self, tokens: TokenSource, config: RunConfig, max_tokens: int, rank: int = 0, ranks: int = 1
    ) -> None:
        length = config.training.sequence_length
        self.windows = ValidationWindows(tokens, length, max_tokens, config.data.mask_documents)
        self._length = length
        self._num_bytes = self.windows.num_bytes()
        batches = list(_batches(self.windows.numbers, config.parallel.micro_batch_size))
        own = batches[rank::ranks]
        # All ranks must run the same number of batches: one with fewer repeats the first batch with weight 0.
        padding = -(-len(batches) // ranks) - len(own)
        self._batches = [batch for batch, _ in own] + [batches[0][0]] * padding
        self._weights = [weight for _, weight in own] + [0] * padding
        self._at_once = max(1, _TOKENS_READ_AT_ONCE // (batches[0][0].size * length))

    def measure(
        self,
        main_losses: Callable[[Iterable[Tensor]], Tensor],
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
        group: ProcessGroup | None = None,
    ) -> ValidationLoss:
        """Runs the model over the windows, without changing it, and returns the loss.

        `main_losses` maps batches of tokens to their losses, as `Engine.main_losses` does; `summed` sums a tensor
        over all ranks.
        Raises DataError on all ranks of `group` if any of them cannot read tokens. All check this before they run
        the model on the next batches, about a million tokens.
        """
        numbers = [
            self._batches[first : first + self._at_once] for first in range(0, len(self._batches), self._at_once)
        ]
        weights = iter(self._weights)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for batches in token_batches(self.windows.read, numbers, device, group):
            losses = main_losses(batches).double()
            total += (losses * losses.new_tensor(list(islice(weights, len(losses))))).sum()
        windows = self.windows
        loss = summed(total).item() * self._length / windows.num_targets
        return ValidationLoss(loss, windows.num_targets, self._num_bytes, len(windows.numbers))


class MixtureValidator:
    """Computes the loss of each source of a run, as `Validator` does, and that of the mixture.

    `max_tokens` are divided equally among the sources, so that the loss of each is measured equally well. The loss
    of the mixture is the mean of the sources' losses by their shares: what a held-out sample of the training order
    would have on average. Its bytes follow from the bytes per token of the sources in the same way.
    """

    def __init__(
        self, tokens: RunTokens, config: RunConfig, max_tokens: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self._parts = tokens.parts
        self._validators = [
            Validator(part.source, config, max_tokens // len(self._parts), rank, ranks) for part in self._parts
        ]

    def measure(
        self,
        main_losses: Callable[[Iterable[Tensor]], Tensor],
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
        group: ProcessGroup | None = None,
    ) -> ValidationLoss:
        """Measures every source; arguments and errors are those of `Validator.measure`."""
        return mixed_loss(
            self._parts, [each.measure(main_losses, device, summed, group) for each in self._validators]
        )


def mixed_loss(parts: Sequence[WeightedSource], losses: Sequence[ValidationLoss]) -> ValidationLoss:
    """The loss of a mixture from those of its sources; that of a single unnamed source is returned as it is."""
    if not parts[0].name:
        return losses[0]
    tokens = sum(each.tokens for each in losses)
    bytes_per_token = mean_by_share(parts, (each.num_bytes / each.tokens for each in losses))
    return ValidationLoss(
        loss=mean_by_share(parts, (each.loss for each in losses)),
        tokens=tokens,
        num_bytes=tokens * bytes_per_token,
        windows=sum(each.windows for each in losses),
        by_source={part.name: each for part, each in zip(parts, losses, strict=True)},
    )


def _batches(windows: Batch, size: int) -> Iterator[tuple[Batch, int]]:
    """Yields batches of exactly `size` windows, each with its number of distinct windows.

    One batch size means that a compiled model sees one shape. The last windows, too few for a batch, fill further
    batches, in each of which they are repeated equally often: the mean loss of a batch is then the mean over its
    distinct windows, and every window is evaluated whatever the batch size.
    """
    while len(windows):
        different = max(number for number in range(1, size + 1) if size % number == 0 and number <= len(windows))
        yield np.repeat(windows[:different], size // different), different
        windows = windows[different:]


@torch.no_grad()
def main_losses(objective: Objective, documents: DocumentIds, batches: Iterable[Tensor]) -> Tensor:
    """For each micro-batch the summed main loss divided by the number of positions: float32 (batches,)."""
    return torch.stack(
        [
            objective(
                tokens_BX,
                0.0,
                0.0,
                documents(tokens_BX),
                main_only=True,
                num_targets=tokens_BX[:, 1:].numel(),
            ).main
            for tokens_BX in batches
        ]
    )
