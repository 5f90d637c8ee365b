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
        together = max(1, PREFILL_TOKENS // max(len(chunk.ids) for chunk in chunks))
        groups = [chunks[first : first + together] for first in range(0, len(chunks), together)]
        return torch.cat([self._prefill_group(group) for group in groups])

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

    def _prefill_group(self, chunks: Sequence[Chunk]) -> Tensor:
        """One pass over chunks, padded on the right: the causal mask hides the padding, the cache skips it."""
        lengths = [len(chunk.ids) for chunk in chunks]
        view = view_of_new_tokens([chunk.sequence for chunk in chunks], lengths)
        tokens_BS = pad_sequence([torch.tensor(chunk.ids) for chunk in chunks], batch_first=True)
        states_BSD = self._model.final_states(tokens_BS.to(self._device, non_blocking=True), view)
        last_B = torch.tensor(lengths).to(self._device, non_blocking=True) - 1
        return states_BSD[torch.arange(len(chunks), device=self._device), last_B]


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
