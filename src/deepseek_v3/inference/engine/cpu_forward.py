"""The forward pass of the engine on the CPU: what it computes for a token depends on the token's own request alone.

Prompts and generated tokens run in passes of their own, each of a few fixed numbers of rows (see `row_counts`), so
every matrix product of a token has the same shape, or one that is known to agree, in every batch and schedule.

Axes: M rows, N tokens, B sequences, D model width, V vocabulary, P pairs of rotated numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.inference.engine.cpu_attention import Attend, CpuAttention, attend_alone, attend_block
from deepseek_v3.inference.engine.cpu_feed_forward import CpuExperts, CpuFeedForward
from deepseek_v3.inference.engine.invariant_ops import RmsNorm, transposed, turns_of
from deepseek_v3.inference.engine.row_counts import RowCounts, padded
from deepseek_v3.inference.engine.rows import Chunk, rows_of
from deepseek_v3.mla.cached_sequences import CachedSequence
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.mla_decode.formats import PAGE


class CpuForward:
    """Runs a model over the pages of a pool. It is valid as long as the model's weights do not change.

    With a pool that has rows of the first MTP layer, it runs that layer, too.
    """

    def __init__(self, model: DeepSeekV3, pool: PagePool, counts: RowCounts) -> None:
        self._config, self._counts = model.config, counts
        self._dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        self._embedding, self._head = model.model.embed_tokens.weight, model.head_weight_VD.to(self._dtype).t()
        self._norm = RmsNorm(model.model.norm)
        layers = [layer for layer in model.model.layers if isinstance(layer, DecoderLayer)]
        main = self._config.num_hidden_layers
        self._layers = [_CpuLayer(layer, pool, self._dtype) for layer in layers[:main]]
        drafting = [layer for layer in layers[main : len(pool.pages)] if isinstance(layer, MTPLayer)]
        self._mtp = _CpuMtpLayer(drafting[0], pool, self._dtype) if drafting else None
        self._turns_T21R = self._turns(PAGE)

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes chunks of several sequences; returns the state of the last token of each, (B, D)."""
        return torch.stack([states_ND[-1] for states_ND in self.states(chunks)])

    def states(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Computes chunks of several sequences; returns the states of the tokens of each, (N, D)."""
        return self._in_passes(chunks, None)

    def draft_states(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor]) -> list[Tensor]:
        """The states (N, D) of the first MTP layer, from states at the positions of chunks of the next tokens."""
        return self._in_passes(chunks, hidden)

    def decode(self, sequences: Sequence[CachedSequence], tokens_B: Tensor) -> Tensor:
        """Computes the last token of each sequence; returns their states, (B, D)."""
        ids = tokens_B.tolist()
        chunks = [
            Chunk(sequence, sequence.length - 1, [token], is_prompt=False)
            for sequence, token in zip(sequences, ids, strict=True)
        ]
        few = self._counts.few
        groups = [chunks[first : first + few[-1]] for first in range(0, len(chunks), few[-1])]
        return _joined([self._run(group, few, attend_alone)[: len(group)] for group in groups])

    def logits(self, states_BD: Tensor) -> Tensor:
        """The logits of the token after each state, (B, V)."""
        few = self._counts.few
        parts = []
        for part_BD in states_BD.split(few[-1]):
            number = part_BD.shape[0]
            padded_MD = F.pad(part_BD, (0, 0, 0, padded(number, few) - number))
            parts.append(torch.mm(padded_MD, self._head)[:number])
        return _joined(parts)

    def _in_passes(self, chunks: Sequence[Chunk], hidden: Sequence[Tensor] | None) -> list[Tensor]:
        """Runs the main model, or with `hidden` the MTP layer; the states of the tokens of each chunk, (N, D).

        Prompts come first, because others attend to their rows.
        """
        parts: list[list[Tensor]] = [[] for _ in chunks]
        prompts = PAGE, self._counts.many, attend_block
        others = 1, self._counts.few, attend_alone
        for is_prompt, (length, counts, attend) in ((True, prompts), (False, others)):
            rows = [row for row, chunk in enumerate(chunks) if chunk.is_prompt == is_prompt]
            pieces = [piece for row in rows for piece in _pieces(row, chunks[row], length, hidden)]
            for group in _packed(pieces, counts[-1]):
                inputs = [piece.hidden_ND for piece in group if piece.hidden_ND is not None]
                states_MD = self._run([piece.chunk for piece in group], counts, attend, inputs)
                ends = accumulate(len(piece.chunk.ids) for piece in group)
                for piece, end in zip(group, ends, strict=True):
                    parts[piece.row].append(states_MD[end - len(piece.chunk.ids) : end])
        return [_joined(states) for states in parts]

    def _run(
        self, chunks: list[Chunk], counts: Sequence[int], attend: Attend, hidden: Sequence[Tensor] = ()
    ) -> Tensor:
        """One pass, of the MTP layer if there are hidden states; the states (M, D) that the head reads."""
        rows = rows_of(chunks, counts)
        longest = max(chunk.end for chunk in chunks)
        if longest > self._turns_T21R.shape[0]:
            self._turns_T21R = self._turns(longest)
        turns_M21R = self._turns_T21R.index_select(0, rows.positions_M)
        x_MD = F.embedding(rows.tokens_M, self._embedding).to(self._dtype)
        layers, norm = self._layers, self._norm
        if hidden:
            assert self._mtp is not None
            hidden_ND = _joined(list(hidden))
            hidden_MD = F.pad(hidden_ND, (0, 0, 0, x_MD.shape[0] - hidden_ND.shape[0]))
            x_MD, layers, norm = self._mtp.combined(hidden_MD, x_MD), [self._mtp], self._mtp.head_norm
        for layer in layers:
            x_MD = x_MD + layer.attention(layer.input_norm(x_MD), rows, turns_M21R, attend)
            x_MD = x_MD + layer.feed_forward(layer.post_attention_norm(x_MD), rows.number, counts)
        return norm(x_MD)

    def _turns(self, number: int) -> Tensor:
        """The rotations of at least this many positions, twice as many as are needed, up to the context."""
        number = min(max(2 * number, PAGE), max(self._config.max_position_embeddings, number))
        cos_TP, sin_TP = (table[0] for table in rotary_tables(torch.arange(number)[None], self._config))
        return turns_of(cos_TP, sin_TP)


class _CpuLayer:
    """One layer of the model."""

    def __init__(self, module: DecoderLayer, pool: PagePool, dtype: torch.dtype) -> None:
        self.input_norm = RmsNorm(module.input_layernorm)
        self.post_attention_norm = RmsNorm(module.post_attention_layernorm)
        self.attention = CpuAttention(module.self_attn, pool, dtype)
        self._experts, self._dense = None, None
        if isinstance(module.mlp, MixtureOfExperts):
            self._experts = CpuExperts(module.mlp, dtype)
        else:
            self._dense = CpuFeedForward(module.mlp, dtype)

    def feed_forward(self, x_MD: Tensor, number: int, counts: Sequence[int]) -> Tensor:
        """The output of the feed-forward network, of which the first `number` rows are tokens."""
        if self._experts is not None:
            return self._experts(x_MD, number, counts)
        assert self._dense is not None
        return self._dense(x_MD)


class _CpuMtpLayer(_CpuLayer):
    """The first MTP layer of the model."""

    def __init__(self, module: MTPLayer, pool: PagePool, dtype: torch.dtype) -> None:
        super().__init__(module, pool, dtype)
        self._embedded_norm, self._hidden_norm = RmsNorm(module.enorm), RmsNorm(module.hnorm)
        self._projection = transposed(module.eh_proj, dtype)
        self.head_norm = RmsNorm(module.head_norm)

    def combined(self, hidden_MD: Tensor, embedded_MD: Tensor) -> Tensor:
        """What enters the layer, from states and the embeddings of the next tokens; (M, D)."""
        joined_MX = torch.cat((self._embedded_norm(embedded_MD), self._hidden_norm(hidden_MD)), dim=-1)
        return torch.mm(joined_MX, self._projection)


class _Piece(NamedTuple):
    """A part of the chunk with number `row`, and of the states at its positions, (N, D), for the MTP layer."""

    row: int
    chunk: Chunk
    hidden_ND: Tensor | None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(row: int, chunk: Chunk, length: int, hidden: Sequence[Tensor] | None) -> list[_Piece]:
    """The chunk with number `row` in pieces of at most `length` tokens."""
    return [
        _Piece(
            row,
            chunk._replace(start=chunk.start + first, ids=chunk.ids[first : first + length]),
            None if hidden is None else hidden[row][first : first + length],
        )
        for first in range(0, len(chunk.ids), length)
    ]


def _packed(pieces: list[_Piece], most: int) -> list[list[_Piece]]:
    """The pieces, in order, in groups of at most `most` tokens."""
    groups: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if len(piece.chunk.ids) > room:
            groups.append([])
            room = most
        groups[-1].append(piece)
        room -= len(piece.chunk.ids)
    return groups
