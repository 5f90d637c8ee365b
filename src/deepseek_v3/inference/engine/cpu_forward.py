"""The forward pass of the engine on the CPU: what it computes for a token depends on the token's own request alone.

Prompts and generated tokens run in passes of their own, each of a few fixed numbers of rows (see `row_counts`), so
every matrix product of a token has the same shape, or one that is known to agree, in every batch and schedule.

Axes: M rows, B sequences, D model width, V vocabulary, P pairs of rotated numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.inference.engine.cpu_attention import Attend, CpuAttention, attend_alone, attend_block
from deepseek_v3.inference.engine.cpu_feed_forward import CpuExperts, CpuFeedForward
from deepseek_v3.inference.engine.invariant_ops import RmsNorm, turns_of
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
    """Runs a model over the pages of a pool. It is valid as long as the model's weights do not change."""

    def __init__(self, model: DeepSeekV3, pool: PagePool, counts: RowCounts) -> None:
        self._config, self._counts = model.config, counts
        self._dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        self._embedding, self._head = model.model.embed_tokens.weight, model.head_weight_VD.to(self._dtype).t()
        self._norm = RmsNorm(model.model.norm)
        layers = [layer for layer in model.model.layers if not isinstance(layer, MTPLayer)]
        self._layers = [_CpuLayer(layer, pool, self._dtype) for layer in layers if isinstance(layer, DecoderLayer)]
        self._turns_T21R = self._turns(PAGE)

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes chunks of several sequences; returns the state of the last token of each, (B, D)."""
        prompts = [piece for chunk in chunks if chunk.is_prompt for piece in _pieces(chunk, PAGE)]
        others = [piece for chunk in chunks if not chunk.is_prompt for piece in _pieces(chunk, 1)]
        last: dict[int, Tensor] = {}
        for group in _packed(prompts, self._counts.many[-1]):
            last |= self._last_states(group, self._run(group, self._counts.many, attend_block))
        for group in _packed(others, self._counts.few[-1]):
            last |= self._last_states(group, self._run(group, self._counts.few, attend_alone))
        return torch.stack([last[id(chunk.sequence)] for chunk in chunks])

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

    def _run(self, chunks: list[Chunk], counts: Sequence[int], attend: Attend) -> Tensor:
        """One pass; the states (M, D) that the head reads."""
        rows = rows_of(chunks, counts)
        longest = max(chunk.end for chunk in chunks)
        if longest > self._turns_T21R.shape[0]:
            self._turns_T21R = self._turns(longest)
        turns_M21R = self._turns_T21R.index_select(0, rows.positions_M)
        x_MD = F.embedding(rows.tokens_M, self._embedding).to(self._dtype)
        for layer in self._layers:
            x_MD = x_MD + layer.attention(layer.input_norm(x_MD), rows, turns_M21R, attend)
            x_MD = x_MD + layer.feed_forward(layer.post_attention_norm(x_MD), rows.number, counts)
        return self._norm(x_MD)

    def _turns(self, number: int) -> Tensor:
        """The rotations of at least this many positions, twice as many as are needed, up to the context."""
        number = min(max(2 * number, PAGE), max(self._config.max_position_embeddings, number))
        cos_TP, sin_TP = (table[0] for table in rotary_tables(torch.arange(number)[None], self._config))
        return turns_of(cos_TP, sin_TP)

    @staticmethod
    def _last_states(chunks: list[Chunk], states_MD: Tensor) -> dict[int, Tensor]:
        """The state of the last token of each chunk, by its sequence."""
        last: dict[int, Tensor] = {}
        end = 0
        for chunk in chunks:
            end += len(chunk.ids)
            last[id(chunk.sequence)] = states_MD[end - 1]
        return last


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


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(chunk: Chunk, length: int) -> list[Chunk]:
    """The chunk in pieces of at most `length` tokens."""
    return [
        chunk._replace(start=chunk.start + first, ids=chunk.ids[first : first + length])
        for first in range(0, len(chunk.ids), length)
    ]


def _packed(chunks: list[Chunk], most: int) -> list[list[Chunk]]:
    """The chunks, in order, in groups of at most `most` tokens."""
    groups: list[list[Chunk]] = []
    room = 0
    for chunk in chunks:
        if len(chunk.ids) > room:
            groups.append([])
            room = most
        groups[-1].append(chunk)
        room -= len(chunk.ids)
    return groups
