"""Validation on the hold-out split, which is never trained on: the main model's loss, and how often it would accept
the drafts of the MTP layers.

Axes: G micro-batches, B sequences of a micro-batch, K prediction depths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader, draw_windows
from deepseek_v3.data.tokens.source import RunTokens, TokenSource, WeightedSource, mean_by_share
from deepseek_v3.training.data import DocumentIds, token_batches
from deepseek_v3.training.loss import Losses, Objective
from deepseek_v3.utils.errors import DataError

_TOKENS_READ_AT_ONCE = 2**20  # by each rank, between two checks that no rank has failed to read

Batch = Int64Array  # numbers of windows


class EvaluatedBatches(NamedTuple):
    """What one rank finds in its micro-batches, all of the same shape.

    `losses_G`: the summed main loss divided by the number of positions, float32. `drafts_GBK2`: the drafts and the
    accepted drafts of every sequence and depth, int64, as `count_drafts` counts them; K is 0 if they were not asked
    for.
    """

    losses_G: Tensor
    drafts_GBK2: Tensor

    @classmethod
    def of(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> EvaluatedBatches:
        """Stacks the losses, 0-d, and the counts (B, K, 2) of at least one micro-batch."""
        losses, drafts = zip(*batches, strict=True)
        return cls(torch.stack(losses), torch.stack(drafts))


Evaluate = Callable[[Iterable[Tensor]], EvaluatedBatches]


@dataclass(frozen=True)
class ValidationLoss:
    """The loss in nats per token over `tokens` targets, which encode `num_bytes` bytes of UTF-8 text.

    `windows`: the number of windows of the hold-out split that were evaluated. `by_source`: the same of every named
    source of a mixture. `mtp_acceptance`: for each prediction depth the share of its drafts that greedy decoding
    would accept, NaN if there was none; empty if they were not counted.
    """

    loss: float
    tokens: int
    num_bytes: float
    windows: int
    by_source: Mapping[str, ValidationLoss] = field(default_factory=dict)
    mtp_acceptance: tuple[float, ...] = ()

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
    """Computes the main model's loss and the acceptance of the MTP layers' drafts on `ValidationWindows`.

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
        evaluate: Evaluate,
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
        group: ProcessGroup | None = None,
    ) -> ValidationLoss:
        """Runs the model over the windows, without changing it, and returns the loss.

        `evaluate` maps batches of tokens to their losses and drafts, as `Engine.evaluate` does; `summed` sums a
        tensor over all ranks. Drafts are counted in whole numbers, each distinct window once, so that their shares
        do not depend on the number of ranks.
        Raises DataError on all ranks of `group` if any of them cannot read tokens. All check this before they run
        the model on the next batches, about a million tokens.
        """
        numbers = [
            self._batches[first : first + self._at_once] for first in range(0, len(self._batches), self._at_once)
        ]
        weights = iter(self._weights)
        total = torch.zeros((), dtype=torch.float64, device=device)
        drafts: list[Tensor] = []
        for batches in token_batches(self.windows.read, numbers, device, group):
            results = evaluate(batches)
            losses, own = results.losses_G.double(), list(islice(weights, len(results.losses_G)))
            total += (losses * losses.new_tensor(own)).sum()
            drafts.append(_sum_distinct(results.drafts_GBK2, own))
        windows = self.windows
        loss = summed(total).item() * self._length / windows.num_targets
        drafts_K2 = torch.stack(drafts).sum(0)
        return ValidationLoss(
            loss,
            windows.num_targets,
            self._num_bytes,
            len(windows.numbers),
            mtp_acceptance=_acceptance(summed(drafts_K2)) if len(drafts_K2) else (),
        )


class MixtureValidator:
    """Computes the loss and the acceptance of each source of a run, as `Validator` does, and those of the mixture.

    `max_tokens` are divided equally among the sources, so that the loss of each is measured equally well. The loss
    of the mixture is the mean of the sources' losses by their shares: what a held-out sample of the training order
    would have on average. Its bytes follow from the bytes per token of the sources, and its acceptance from theirs,
    in the same way.
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
        evaluate: Evaluate,
        device: torch.device,
        summed: Callable[[Tensor], Tensor] = lambda values: values,
        group: ProcessGroup | None = None,
    ) -> ValidationLoss:
        """Measures every source; arguments and errors are those of `Validator.measure`."""
        return mixed_loss(self._parts, [each.measure(evaluate, device, summed, group) for each in self._validators])


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
        mtp_acceptance=tuple(
            mean_by_share(parts, shares) for shares in zip(*(each.mtp_acceptance for each in losses), strict=True)
        ),
    )


def validation_metrics(validation: ValidationLoss) -> dict[str, float]:
    """The metrics by name; those of a source of a mixture end with `/NAME`."""
    record = _metrics(validation)
    for name, each in validation.by_source.items():
        record |= {f"{metric}/{name}": value for metric, value in _metrics(each).items()}
    return record


def validation_texts(step: int, validation: ValidationLoss) -> Iterator[str]:
    """The messages to log after a step: the loss and, if drafts were counted, the shares that would be accepted."""
    yield (
        f"Held-out loss after step {step}: {validation.loss:.4f} nats per token,\n"
        f"{validation.bits_per_byte:.4f} bits per byte"
        + "".join(
            f"\n  {name}: {each.loss:.4f} nats per token, {each.bits_per_byte:.4f} bits per byte"
            for name, each in validation.by_source.items()
        )
    )
    if validation.mtp_acceptance:
        yield f"MTP drafts accepted: {_shares(validation)}" + "".join(
            f"\n  {name}: {_shares(each)}" for name, each in validation.by_source.items()
        )


def _metrics(validation: ValidationLoss) -> dict[str, float]:
    losses = {"holdout_loss": validation.loss, "holdout_bits_per_byte": validation.bits_per_byte}
    shares = enumerate(validation.mtp_acceptance, start=1)
    return losses | {f"holdout_mtp_acceptance_{depth}": share for depth, share in shares}


def _shares(validation: ValidationLoss) -> str:
    """`63.1% (depth 1), 40.2% (depth 2)`; `no drafts` for a depth without any."""
    return ", ".join(
        f"{'no drafts' if math.isnan(share) else f'{share:.1%}'} (depth {depth})"
        for depth, share in enumerate(validation.mtp_acceptance, start=1)
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


def _sum_distinct(drafts_GBK2: Tensor, weights: Sequence[int]) -> Tensor:
    """Sums the counts of batches with `weights[g]` distinct windows, as `_batches` yields them: int64 (K, 2)."""
    size = drafts_GBK2.shape[1]
    counts = [[weight > 0 and row % (size // weight) == 0 for row in range(size)] for weight in weights]
    return drafts_GBK2[torch.tensor(counts, device=drafts_GBK2.device)].sum(0)


def _acceptance(drafts_K2: Tensor) -> tuple[float, ...]:
    """The share of drafts that were accepted, for each depth; NaN for a depth without drafts."""
    return tuple(accepted / drafted if drafted else math.nan for drafted, accepted in drafts_K2.tolist())


@torch.no_grad()
def evaluate(
    objective: Objective, documents: DocumentIds, batches: Iterable[Tensor], with_drafts: bool = False
) -> EvaluatedBatches:
    """Computes the main losses of micro-batches and, `with_drafts`, counts the drafts of the MTP layers."""

    def evaluated(tokens_BX: Tensor) -> tuple[Tensor, Tensor]:
        losses: Losses = objective(
            tokens_BX,
            0.0,
            0.0,
            documents(tokens_BX),
            main_only=True,
            num_targets=tokens_BX[:, 1:].numel(),
            with_drafts=with_drafts,
        )
        drafts_BK2 = losses.drafts_BK2
        return losses.main, tokens_BX.new_zeros(len(tokens_BX), 0, 2) if drafts_BK2 is None else drafts_BK2

    return EvaluatedBatches.of(evaluated(tokens_BX) for tokens_BX in batches)
