"""The forward pass over chunks of prompts on a GPU: the products and the attention of the model's modules.

What training compiles into few kernels, which are the norms, the sums and the choice of experts, are kernels here.

Axes: B chunks, S tokens of the longest one, T = B·S, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor

from deepseek_v3.inference.engine.device_layer import choices_of, expert_choice
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.cached_sequences import CacheView
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.few_rows import FEW_ROWS
from deepseek_v3.ops.layers import RMSNorm
from deepseek_v3.ops.operation import Select


class PromptForward:
    """Runs a model that is not trained; its norms use the kernel from now on."""

    def __init__(self, model: DeepSeekV3, select: Select) -> None:
        self._model, self._ops = model, select(FEW_ROWS, model.config.hidden_size)
        self._choice = expert_choice(model.config, select)
        self._choices = choices_of(model.config)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                module.rms_norm = self._ops.rms_norm

    def final_states(self, tokens_BS: Tensor, cache: CacheView) -> Tensor:
        """The states (B, S, D) that the head reads."""
        model = self._model
        main = model.model.layers[: model.config.num_hidden_layers]
        layers = [layer for layer in main if isinstance(layer, DecoderLayer)]
        return self._run(layers, model.model.norm, model.embed(tokens_BS), cache)

    def draft_states(self, hidden_BSD: Tensor, tokens_BS: Tensor, cache: CacheView) -> Tensor:
        """The states (B, S, D) of the first MTP layer, as `DeepSeekV3.draft_states` says."""
        layer = self._model.model.layers[self._model.config.num_hidden_layers]
        assert isinstance(layer, MTPLayer)
        return self._run([layer], layer.head_norm, layer.joined(hidden_BSD, self._model.embed(tokens_BS)), cache)

    def _run(self, layers: list[DecoderLayer], norm: RMSNorm, x_BSD: Tensor, cache: CacheView) -> Tensor:
        metadata, shape = self._model.cached_metadata(cache), x_BSD.shape
        norms = [*(layer.input_layernorm for layer in layers[1:]), norm]
        x_TD, first = x_BSD.flatten(0, 1), layers[0].input_layernorm
        normed_TD = self._ops.rms_norm(x_TD, first.weight, first.eps)
        for layer, next_norm in zip(layers, norms, strict=True):
            x_TD, normed_TD = self._attend(layer, x_TD, normed_TD.view(shape), metadata, cache)
            y_BSD = self._feed_forward(layer, normed_TD.view(shape))
            x_TD, normed_TD = self._ops.add_norm(x_TD, _one_by_one(y_BSD), next_norm.weight, next_norm.eps)
        return normed_TD.view(shape)

    def _attend(
        self,
        layer: DecoderLayer,
        x_TD: Tensor,
        normed_BSD: Tensor,
        metadata: AttentionMetadata,
        cache: CacheView,
    ) -> tuple[Tensor, Tensor]:
        norm, y_BSD = layer.post_attention_layernorm, layer.self_attn(normed_BSD, metadata, cache)
        return self._ops.add_norm(x_TD, _one_by_one(y_BSD), norm.weight, norm.eps)

    def _feed_forward(self, layer: DecoderLayer, x_BSD: Tensor) -> Tensor:
        if not isinstance(layer.mlp, MixtureOfExperts):
            return layer.mlp(x_BSD)
        router = layer.mlp.gate
        logits_TE = router.logits(x_BSD.flatten(0, 1), router.weight)
        gates_TK, experts_TK = self._choice.choose(logits_TE, router.e_score_correction_bias, self._choices)
        return layer.mlp.run_experts(x_BSD, gates_TK, experts_TK)


def _one_by_one(y_BSD: Tensor) -> Tensor:
    """What is added to each row, (T, 1, D)."""
    return y_BSD.reshape(-1, 1, y_BSD.shape[-1])
