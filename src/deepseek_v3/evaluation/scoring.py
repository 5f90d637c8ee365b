"""Log probabilities of tokens: windows of a long text, and batches of windows that a model scores.

Axes: B batch, S sequence, T scored tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.dtypes import at_least_float32
from deepseek_v3.utils.errors import CheckpointError

# The most tokens of a batch, padding included; a single window may have more.
BATCH_TOKENS = 2**14
# The most logits that exist at once: 0.5 GiB in float32 on a GPU; few enough for the caches of a CPU.
_CHUNK_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 20}


class Window(NamedTuple):
    """One pass of the model: `inputs` int64 [S], and the tokens after the last of them, `targets` int64 [n ≤ S]."""

    inputs: Int64Array
    targets: Int64Array


class TokenScores(NamedTuple):
    """For each target of a window: log P(target | inputs before it) in nats, and whether it is the likeliest."""

    log_probabilities: Float64Array
    is_likeliest: BoolArray


def rolling_windows(ids: Int64Array, start: int, context: int, stride: int | None = None) -> Iterator[Window]:
    """Windows of at most `context` inputs in which each of `ids` is a target exactly once.

    `start` is the token before the text. The first window scores the first `context` ids; each later one scores
    the next `stride` ids, by default `context`, and the last one those that are left. A later window is always
    full: its inputs are the `context` ids before its last target. So each of its targets follows at least
    `context` - `stride` + 1 ids of the text, as in lm-evaluation-harness, whose `context_len` is that number.
    """
    text = np.concatenate([[start], ids])
    done = min(context, len(ids))
    if done:
        yield Window(text[:done], ids[:done])
    while done < len(ids):
        end = min(done + (stride or context), len(ids))
        yield Window(text[end - context : end], ids[done:end])
        done = end


def batches_by_length(lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Batches of the indices of `lengths`, the longest first, of at most `batch_tokens` tokens with padding.

    Equal lengths keep their order. A length above `batch_tokens` makes a batch of its own.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * max(lengths[batch[0]], 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Scorer:
    """Scores windows of tokens with a model, in batches of similar lengths.

    Logits have the model's compute dtype; their softmax is taken in at least float32, over all ids of the model.
    """

    def __init__(self, model: DeepSeekV3, batch_tokens: int = BATCH_TOKENS) -> None:
        self.context = model.config.max_position_embeddings
        self._model = model
        self._batch_tokens = batch_tokens
        self._device = model.head_weight_VD.device

    def score(self, windows: Sequence[Window]) -> Iterator[tuple[int, TokenScores]]:
        """Yields the index of each window with its scores, the longest windows first.

        Raises CheckpointError if a score is NaN.
        """
        for batch in batches_by_length([len(window.inputs) for window in windows], self._batch_tokens):
            yield from zip(batch, self._score([windows[index] for index in batch]), strict=True)

    @torch.inference_mode()
    def _score(self, windows: list[Window]) -> list[TokenScores]:
        """Windows with the same inputs share a row. Padding on the right is hidden by the causal mask."""
        rows: dict[bytes, int] = {}
        row_of = [rows.setdefault(window.inputs.tobytes(), len(rows)) for window in windows]
        tokens_BS = np.zeros((len(rows), max(len(window.inputs) for window in windows)), np.int64)
        for row, (inputs, _) in zip(row_of, windows, strict=True):
            tokens_BS[row, : len(inputs)] = inputs
        lengths = [len(window.targets) for window in windows]
        row_T = np.repeat(row_of, lengths)
        position_T = np.concatenate([np.arange(-len(targets), 0) + len(inputs) for inputs, targets in windows])
        hidden_BSD = self._model.final_states(self._to_device(tokens_BS))
        hidden_TD = hidden_BSD[self._to_device(row_T), self._to_device(position_T)]
        targets_T = self._to_device(np.concatenate([window.targets for window in windows]))
        scores_T, likeliest_T = self._head(hidden_TD, targets_T)
        ends = np.cumsum(lengths)[:-1]
        parts = zip(np.split(scores_T, ends), np.split(likeliest_T, ends), strict=True)
        return [TokenScores(*part) for part in parts]

    def _to_device(self, array: Int64Array) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _head(self, hidden_TD: Tensor, targets_T: Tensor) -> tuple[Float64Array, BoolArray]:
        rows = max(1, _CHUNK_LOGITS.get(self._device.type, 1 << 20) // self._model.config.vocab_size)
        scores, likeliest = (
            [hidden_TD.new_zeros(0, dtype=torch.float64)],
            [targets_T.new_zeros(0, dtype=torch.bool)],
        )
        for hidden, targets in zip(hidden_TD.split(rows), targets_T.split(rows), strict=True):
            logits_TV = at_least_float32(self._model.logits(hidden))
            log_probabilities = logits_TV.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            scores.append(log_probabilities.double())
            likeliest.append(logits_TV.argmax(-1) == targets)
        scores_T = torch.cat(scores).cpu()
        if scores_T.isnan().any():
            raise CheckpointError(
                "the model's logits are NaN or infinite: its weights are damaged, or its training diverged; use an "
                "earlier checkpoint"
            )
        return scores_T.numpy(), torch.cat(likeliest).cpu().numpy()
