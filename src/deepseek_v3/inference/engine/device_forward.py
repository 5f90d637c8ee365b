"""The forward pass of the engine on a GPU.

Prompts run through the modules of the model. So do generated tokens of a model that is trained, whose weights are
wider than what it computes in. Those of a model that was loaded for inference run row by row, in captured graphs,
and so do short prompts.

Axes: B sequences, S new tokens, N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepseek_v3.inference.engine.device_prompts import PromptForward
from deepseek_v3.inference.engine.device_rows import MOST_ROWS, Row, RowsForward, runs_by_rows
from deepseek_v3.inference.engine.rows import Chunk
from deepseek_v3.mla.cached_sequences import CachedSequence, view_of_new_tokens
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.operation import Op, Operation, Target

PREFILL_TOKENS = 16384  # of one forward pass, with padding
_FEW_READ = 4096  # tokens


class DeviceForward:
    """Runs a model whose layers attend to the pages of a pool. It is valid while the weights do not change."""

    def __init__(self, model: DeepSeekV3, pool: PagePool, batch_invariant: bool = False) -> None:
        self._model, self._batch_invariant = model, batch_invariant
        self._device = model.head_weight_VD.device
        self._rows: RowsForward | None = None
        self._prompts: PromptForward | DeepSeekV3 = model
        if runs_by_rows(model):
            self._rows = RowsForward(model, pool, self._select)
            self._prompts = PromptForward(model, self._select)

    def _select(self, operation: Operation[Op], *widths: int) -> Op:
        return operation.select(Target(self._device, self._model.head_weight_VD.dtype, widths)).run

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes chunks of several sequences; returns the state of the last token of each, (B, D)."""
        return torch.stack([states_SD[-1] for states_SD in self.states(chunks)])

    def decode(self, sequences: Sequence[CachedSequence], tokens_B: Tensor) -> Tensor:
        """Computes the last token of each sequence; returns their states, (B, D)."""
        if self._rows is not None:
            return self._rows.states([Row(each, each.length - 1) for each in sequences], tokens_B)
        view = view_of_new_tokens(sequences, [1] * len(sequences))
        return self._model.final_states(tokens_B[:, None], view)[:, 0]

    def logits(self, states_BD: Tensor) -> Tensor:
        """The logits of the token after each state, (B, V)."""
        return self._model.logits(states_BD) if self._rows is None else self._rows.logits(states_BD)

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
            places = [place for place, chunk in enumerate(chunks) if chunk.is_prompt == is_prompt]
            if not places:
                continue
            group = [chunks[place] for place in places]
            given = None if hidden is None else [hidden[place] for place in places]
            by_rows = self._rows is not None and (not is_prompt or self._batch_invariant or _are_few(group))
            run = self._by_rows if by_rows else self._by_modules
            found |= dict(zip(places, run(group, given), strict=True))
        return [found[place] for place in range(len(chunks))]

    def _by_rows(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        assert self._rows is not None
        rows = [Row(chunk.sequence, position) for chunk in chunks for position in range(chunk.start, chunk.end)]
        tokens = [token for chunk in chunks for token in chunk.ids]
        states_ND = self._rows.states(rows, tokens, None if hidden is None else torch.cat(list(hidden)))
        return list(states_ND.split([len(chunk.ids) for chunk in chunks]))

    def _by_modules(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        states: list[Tensor] = []
        together = max(1, PREFILL_TOKENS // max(len(chunk.ids) for chunk in chunks))
        for first in range(0, len(chunks), together):
            part = slice(first, first + together)
            states += self._pass(chunks[part], None if hidden is None else hidden[part])
        return states

    def _pass(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """One pass over chunks, padded on the right: the causal mask hides the padding, the cache skips it."""
        lengths, sequences = [len(chunk.ids) for chunk in chunks], [chunk.sequence for chunk in chunks]
        view = view_of_new_tokens(sequences, lengths, ends=[chunk.end for chunk in chunks])
        tokens_BS = pad_sequence([torch.tensor(chunk.ids) for chunk in chunks], batch_first=True)
        tokens_BS = tokens_BS.to(self._device, non_blocking=True)
        if hidden is None:
            states_BSD = self._prompts.final_states(tokens_BS, view)
        else:
            hidden_BSD = pad_sequence(list(hidden), batch_first=True)
            states_BSD = self._prompts.draft_states(hidden_BSD, tokens_BS, view)
        return [states_SD[:length] for states_SD, length in zip(states_BSD, lengths, strict=True)]


def _are_few(chunks: Sequence[Chunk]) -> bool:
    """Whether chunks of prompts are faster row by row: one graph, but each row reads all rows before it."""
    return sum(len(chunk.ids) for chunk in chunks) <= MOST_ROWS and max(chunk.end for chunk in chunks) <= _FEW_READ
