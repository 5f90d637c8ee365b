"""The forward pass of the engine on a GPU, through the modules of the model and their kernels.

A pass over generated tokens has one of a few shapes: the number of sequences and the width of their page tables are
powers of two. It can therefore be captured once for each shape.

Axes: B sequences, S new tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.mla.cached_sequences import CachedSequence, view_of_new_tokens
from deepseek_v3.model.transformer import DeepSeekV3

PREFILL_TOKENS = 8192  # of one forward pass, with padding


class DeviceForward:
    """Runs a model whose layers attend to the pages of a pool."""

    def __init__(self, model: DeepSeekV3) -> None:
        self._model = model
        self._device = model.head_weight_VD.device

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes chunks of several sequences; returns the state of the last token of each, (B, D)."""
        return torch.stack([states_SD[-1] for states_SD in self.states(chunks)])

    def decode(self, sequences: Sequence[CachedSequence], tokens_B: Tensor) -> Tensor:
        """Computes the last token of each sequence; returns their states, (B, D)."""
        rows = _power_of_two(len(sequences))
        pages = _power_of_two(max(len(sequence.pages) for sequence in sequences))
        view = view_of_new_tokens(sequences, [1] * len(sequences), rows, pages)
        tokens_BS = F.pad(tokens_B, (0, rows - len(sequences)))[:, None]
        return self._model.final_states(tokens_BS, view)[: len(sequences), 0]

    def logits(self, states_BD: Tensor) -> Tensor:
        """The logits of the token after each state, (B, V)."""
        return self._model.logits(states_BD)

    def states(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Computes chunks of several sequences; returns the states of the tokens of each, (S, D)."""
        return self._in_passes(chunks, None)

    def draft_states(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor]) -> list[Tensor]:
        """The states (S, D) of the first MTP layer, from states at the positions of chunks of the next tokens."""
        return self._in_passes(chunks, hidden)

    def _in_passes(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """Runs the main model, or with `hidden` the MTP layer; the states of the tokens of each chunk, (S, D).

        Prompts come first, because others attend to their rows.
        """
        found: dict[int, Tensor] = {}
        for is_prompt in (True, False):
            rows = [row for row, chunk in enumerate(chunks) if chunk.is_prompt == is_prompt]
            together = max(1, PREFILL_TOKENS // max((len(chunks[row].ids) for row in rows), default=1))
            for first in range(0, len(rows), together):
                group = rows[first : first + together]
                given = None if hidden is None else [hidden[row] for row in group]
                found |= dict(zip(group, self._pass([chunks[row] for row in group], given), strict=True))
        return [found[row] for row in range(len(chunks))]

    def _pass(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """One pass over chunks, padded on the right: the causal mask hides the padding, the cache skips it."""
        lengths, sequences = [len(chunk.ids) for chunk in chunks], [chunk.sequence for chunk in chunks]
        view = view_of_new_tokens(sequences, lengths, ends=[chunk.end for chunk in chunks])
        tokens_BS = pad_sequence([torch.tensor(chunk.ids) for chunk in chunks], batch_first=True)
        tokens_BS = tokens_BS.to(self._device, non_blocking=True)
        if hidden is None:
            states_BSD = self._model.final_states(tokens_BS, view)
        else:
            hidden_BSD = pad_sequence(list(hidden), batch_first=True)
            states_BSD = self._model.draft_states(hidden_BSD, tokens_BS, view)
        return [states_SD[:length] for states_SD, length in zip(states_BSD, lengths, strict=True)]


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
