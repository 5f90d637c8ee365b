"""The DeepSeek-V3 model: embedding, decoder layers, head, and the multi-token prediction (MTP) layers.

Axes: B batch, S sequence, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.cached_sequences import CacheView
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer, call_directly
from deepseek_v3.model.init import initialize
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.moe.balance import RoutingStats
from deepseek_v3.ops.cross_entropy import CROSS_ENTROPY, LinearCrossEntropy, linear_cross_entropy
from deepseek_v3.ops.layers import Linear, RMSNorm
from deepseek_v3.ops.operation import Select


class HiddenStates(NamedTuple):
    """The outputs of a forward pass that training needs.

    `main_BSD` and, for depth k = 1, 2, …, `mtp[k-1]` (B, S-k, D): the states that the shared head
    reads. `routing`: one entry per MoE layer, in the order of `routers_of(model)`.
    """

    main_BSD: Tensor
    mtp: list[Tensor]
    routing: list[RoutingStats]


class Backbone(nn.Module):
    """Everything between tokens and the head; `layers` ends with the MTP layers, as in the released weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        main, depth = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [DecoderLayer(config, layer) for layer in range(main)]
            + [MTPLayer(config, layer) for layer in range(main, main + depth)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class DeepSeekV3(nn.Module):
    """A DeepSeek-V3 language model with freshly initialised weights.

    Parameters and state carry the released checkpoint's names; only routed experts are stacked. Activations
    have the type of the embedding, or `compute_dtype` if set; each layer converts its weights to their type.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.run_layer: Callable[..., Any] = call_directly
        self.linear_cross_entropy: LinearCrossEntropy = linear_cross_entropy
        self.model = Backbone(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if not self.head_weight_VD.is_meta:
            initialize(self, config.initializer_range, seed=int(torch.randint(2**62, ())))

    def select_backends(self, select: Select) -> None:
        self.linear_cross_entropy = select(CROSS_ENTROPY, self.config.hidden_size)

    @property
    def head_weight_VD(self) -> Tensor:
        """The output head, (vocabulary, width); the embedding itself if the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_BS: Tensor, cache: CacheView | None = None) -> Tensor:
        """Logits (B, S, V), in the type of the activations, of the token after each of `tokens_BS` int64.

        With a cache, `tokens_BS` are the new tokens for which `extend` made the view, padded on the right.
        """
        return self.logits(self.final_states(tokens_BS, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of states (..., D) that the head reads."""
        return F.linear(hidden, self.head_weight_VD.to(hidden.dtype))

    def final_states(self, tokens_BS: Tensor, cache: CacheView | None = None) -> Tensor:
        """The states (B, S, D) that the head reads, with a cache as in `forward`."""
        metadata = self.attention_metadata(tokens_BS) if cache is None else self.cached_metadata(cache)
        x_BSD, _ = self.run_layers(self.embed(tokens_BS), metadata, cache=cache)
        return self.model.norm(x_BSD)

    def draft_states(self, hidden_BSD: Tensor, tokens_BS: Tensor, cache: CacheView) -> Tensor:
        """The states (B, S, D) that the head reads to predict the tokens after `tokens_BS`, by the first MTP layer.

        `hidden_BSD`: the states at the positions of the cache's view, of which `tokens_BS` are the next tokens.
        """
        layer, metadata = self.model.layers[self.config.num_hidden_layers], self.cached_metadata(cache)
        states_BSD, _ = self.run_layer(layer, hidden_BSD, self.embed(tokens_BS), metadata, cache)
        drafted_BSD: Tensor = states_BSD
        return drafted_BSD

    def hidden_states(
        self, tokens_BS: Tensor, documents_BS: Tensor | None = None, with_mtp: bool = True
    ) -> HiddenStates:
        """The states that the losses of the main model and of every prediction depth read.

        `documents_BS` int64 numbers the document of each token; tokens then attend only to their own document.
        Without `with_mtp` the MTP layers do not run.
        """
        metadata, embedded_BSD = self.attention_metadata(tokens_BS, documents_BS), self.embed(tokens_BS)
        x_BSD, routing = self.run_layers(embedded_BSD, metadata)
        main_BSD = self.model.norm(x_BSD)
        if not with_mtp:
            return HiddenStates(main_BSD, [], routing)
        predictions, more = self.run_mtp(main_BSD, embedded_BSD, metadata)
        return HiddenStates(main_BSD, predictions, routing + more)

    def keep_mtp_layers(self, depth: int) -> None:
        """Keeps the first `depth` MTP layers and removes the others."""
        self.config = self.config.model_copy(update={"num_nextn_predict_layers": depth})
        del self.model.layers[self.config.num_hidden_layers + depth :]

    def attention_metadata(self, tokens_BS: Tensor, documents_BS: Tensor | None = None) -> AttentionMetadata:
        """Positions, rotary tables and mask of whole sequences, which start at position 0."""
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        allowed_BSS = None if documents_BS is None else _same_document(documents_BS)
        return AttentionMetadata(positions_BS, *rotary_tables(positions_BS, self.config), allowed_BSS)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """The states (B, S, D) that enter the first layer."""
        embedded_BSD = self.model.embed_tokens(tokens_BS)
        return embedded_BSD if self.compute_dtype is None else embedded_BSD.to(self.compute_dtype)

    def run_layers(
        self,
        x_BSD: Tensor,
        metadata: AttentionMetadata,
        layers: range | None = None,
        cache: CacheView | None = None,
    ) -> tuple[Tensor, list[RoutingStats]]:
        """Runs `layers` of the main model, by default all, on states (B, S, D); returns states and routing."""
        routing: list[RoutingStats] = []
        for layer in range(self.config.num_hidden_layers) if layers is None else layers:
            x_BSD, stats = self.run_layer(self.model.layers[layer], x_BSD, metadata, cache)
            routing += [stats] if stats else []
        return x_BSD, routing

    def run_mtp(
        self, main_BSD: Tensor, embedded_BSD: Tensor, metadata: AttentionMetadata
    ) -> tuple[list[Tensor], list[RoutingStats]]:
        """Computes every MTP depth's states from the main model's states and the embeddings of its tokens."""
        predictions: list[Tensor] = []
        routing: list[RoutingStats] = []
        hidden_BSD, length = main_BSD, main_BSD.shape[1]
        for depth, layer in enumerate(self.model.layers[self.config.num_hidden_layers :], start=1):
            hidden_BSD, stats = self.run_layer(
                layer, hidden_BSD[:, :-1], embedded_BSD[:, depth:], _shortened(metadata, length - depth)
            )
            predictions.append(hidden_BSD)
            routing += [stats] if stats else []
        return predictions, routing

    def cached_metadata(self, cache: CacheView) -> AttentionMetadata:
        """Positions and rotary tables of new tokens that continue cached ones."""
        return AttentionMetadata(cache.positions_BS, *rotary_tables(cache.positions_BS, self.config))


def _same_document(documents_BS: Tensor) -> Tensor:
    """Which keys each query attends to, (B, S, S) bool: those of its own document, up to itself."""
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same_BSS & torch.ones_like(same_BSS[0]).tril()


def _shortened(metadata: AttentionMetadata, length: int) -> AttentionMetadata:
    allowed_BSS = metadata.allowed_BSS
    return AttentionMetadata(
        metadata.positions_BS[:, :length],
        metadata.cos_BSP[:, :length],
        metadata.sin_BSP[:, :length],
        None if allowed_BSS is None else allowed_BSS[:, :length, :length],
    )
