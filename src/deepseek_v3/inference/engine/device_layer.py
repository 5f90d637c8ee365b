"""A layer of the model on a GPU, for few rows: generated tokens. Nothing is cast, and few kernels are launched.

Axes: M rows, D model width, H heads, N qk_nope, R qk_rope, V v_head, C kv rank, L = C + R, K query width N + R, or
experts per token, X rows of a joined weight, P = R/2 pairs.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.mla.kv_compression import PagePool
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.moe.layer import MixtureOfExperts
from deepseek_v3.ops.expert_choice import EXPERT_CHOICE, Choices, ExpertChoice
from deepseek_v3.ops.few_rows import FEW_ROWS, FewRows
from deepseek_v3.ops.layers import Linear, RMSNorm
from deepseek_v3.ops.operation import Select


class PassedRows(NamedTuple):
    """The rows of a pass.

    Each is written to its slot, `slots_M` int64, -1 for padding, and attends to the first `lengths_M` int32 tokens,
    itself included, in the pages `table_MT` int32. `cos_MP` and `sin_MP` float32 are its angles.
    """

    slots_M: Tensor
    lengths_M: Tensor
    table_MT: Tensor
    cos_MP: Tensor
    sin_MP: Tensor


class DeviceLayer:
    """One layer; its weights are those of the module, which stay where they are or are moved side by side."""

    def __init__(self, module: DecoderLayer, pool: PagePool, select: Select) -> None:
        self.input_norm = module.input_layernorm
        self._ops = ops = select(FEW_ROWS, len(self.input_norm.weight))
        self._attention = _Attention(module.self_attn, pool, ops)
        self._second_norm = module.post_attention_layernorm
        self._feed_forward: _Experts | _Dense
        if isinstance(module.mlp, MixtureOfExperts):
            self._feed_forward = _Experts(module.mlp, ops, select)
        else:
            self._feed_forward = _Dense(module.mlp, ops)

    def __call__(self, x_MD: Tensor, normed_MD: Tensor, rows: PassedRows, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The states behind the layer, and the same after `norm`, the one that comes next."""
        attended_MD = self._attention(normed_MD, rows)
        x_MD, normed_MD = self._ops.add_norm(x_MD, attended_MD[:, None], *_weight(self._second_norm))
        return self._ops.add_norm(x_MD, self._feed_forward(normed_MD, rows), *_weight(norm))


class _Attention:
    """Absorbed attention over the rows of the cache."""

    def __init__(self, module: MultiHeadLatentAttention, pool: PagePool, ops: FewRows) -> None:
        config = module.config
        self._ops, self._module, self._pool, self._heads = ops, module, pool, config.num_attention_heads
        self._nope, self._rope, self._rank = config.qk_nope_head_dim, config.qk_rope_head_dim, config.kv_lora_rank
        first = module.q_proj if config.q_lora_rank is None else module.q_a_proj
        self._width = len(first.weight)
        self._first_XD = _side_by_side(first, module.kv_a_proj_with_mqa)
        w_uk_HNC, self._w_uv_HVC = module.absorbed_weights(module.kv_b_proj.weight.dtype)
        self._w_uk_HCN = w_uk_HNC.transpose(1, 2)

    def __call__(self, x_MD: Tensor, rows: PassedRows) -> Tensor:
        ops, module, pool = self._ops, self._module, self._pool
        first_MX = ops.product(x_MD, self._first_XD)
        query_MX, kv_ML = first_MX.split((self._width, self._rank + self._rope), 1)
        pages, norm = pool.pages[module.layer], module.kv_a_layernorm
        module.cached.write_latents(
            pages, rows.slots_M, kv_ML, norm.weight, norm.eps, rows.cos_MP, rows.sin_MP, pool.layout
        )
        if module.config.q_lora_rank is not None:
            norm = module.q_a_layernorm
            query_MX = ops.product(ops.rms_norm(query_MX, *_weight(norm)), module.q_b_proj.weight)
        q_MHK = query_MX.unflatten(1, (self._heads, self._nope + self._rope))
        q_MHL = x_MD.new_empty(len(x_MD), self._heads, self._rank + self._rope)
        ops.product_by_head(q_MHK[..., : self._nope], self._w_uk_HCN, q_MHL[..., : self._rank])
        ops.rotate_heads(q_MHK[..., self._nope :], rows.cos_MP, rows.sin_MP, q_MHL[..., self._rank :])
        out_M1HC, _ = module.cached.mla_decode(
            q_MHL[:, None], pages, rows.table_MT, rows.lengths_M, pool.layout, module.scale
        )
        out_MHV = x_MD.new_empty(len(x_MD), *self._w_uv_HVC.shape[:2])
        ops.product_by_head(out_M1HC[:, 0], self._w_uv_HVC, out_MHV)
        return ops.product(out_MHV.flatten(1), module.o_proj.weight)


class _Dense:
    """The network of a dense layer."""

    def __init__(self, module: FeedForward, ops: FewRows) -> None:
        self._ops, self._down = ops, module.down_proj
        self._gate_up_GD = _side_by_side(module.gate_proj, module.up_proj)

    def __call__(self, x_MD: Tensor, rows: PassedRows) -> Tensor:  # noqa: ARG002
        """The output of one network, (M, 1, D)."""
        return self._ops.product(self._ops.swiglu_product(x_MD, self._gate_up_GD), self._down.weight)[:, None]


class _Experts:
    """The routed experts, and the shared ones as experts that every row chooses."""

    def __init__(self, module: MixtureOfExperts, ops: FewRows, select: Select) -> None:
        self._ops, self._router = ops, module.gate
        self._choice = expert_choice(module.config, select)
        self._choices = choices_of(module.config)._replace(shared=module.config.n_shared_experts)
        self._gate_up_EGD, self._down_EDF = _all_experts(module)

    def __call__(self, x_MD: Tensor, rows: PassedRows) -> Tensor:
        """The outputs of each row's experts, (M, K, D)."""
        ops, choice, router = self._ops, self._choice, self._router
        logits_ME = choice.router_logits(x_MD, router.weight)
        gates_MK, experts_MK = choice.choose(logits_ME, router.e_score_correction_bias, self._choices)
        chosen = choice.rows_by_expert(experts_MK, rows.slots_M, len(self._gate_up_EGD))
        hidden_MKF = ops.expert_swiglu_product(x_MD, self._gate_up_EGD, chosen, gates_MK)
        return ops.expert_product(hidden_MKF, self._down_EDF, chosen)


def expert_choice(config: ModelConfig, select: Select) -> ExpertChoice:
    """What chooses the experts of a model."""
    is_limited = config.topk_group < config.n_group
    return select(EXPERT_CHOICE, config.n_routed_experts // config.n_group if is_limited else 1)


def choices_of(config: ModelConfig) -> Choices:
    """How the router of a model chooses."""
    groups, kept = config.n_group, config.topk_group
    return Choices(config.num_experts_per_tok, groups, kept, config.norm_topk_prob, config.routed_scaling_factor)


def _weight(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.eps


def _side_by_side(*layers: Linear) -> Tensor:
    """The weights of layers with the same inputs as one, (X, D), of which the layers' own become parts."""
    weights = [layer.weight.detach() for layer in layers]
    sizes, width = [len(weight) for weight in weights], weights[0].shape[1]
    ends = accumulate((weight.nbytes for weight in weights), initial=weights[0].data_ptr())
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if len(storages) == 1 and all(weight.data_ptr() == end for weight, end in zip(weights, ends, strict=False)):
        return weights[0].as_strided((sum(sizes), width), (width, 1))
    joined_XD = torch.cat(weights)
    for layer, part in zip(layers, joined_XD.split(sizes), strict=True):
        layer.weight.data = part
    return joined_XD


def _all_experts(module: MixtureOfExperts) -> tuple[Tensor, Tensor]:
    """The weights of routed and then shared experts, gate and up (E, G, D) and down (E, D, F).

    The routed ones become parts of these; the shared ones are copies.
    """
    experts, num_shared = module.experts, module.config.n_shared_experts
    gate_up_EGD, down_EDF = (_with_room(experts, name, num_shared) for name in ("gate_up_proj", "down_proj"))
    if num_shared:
        shared = module.shared_experts
        split = [layer.weight.detach().chunk(num_shared) for layer in (shared.gate_proj, shared.up_proj)]
        for place, (gate_FD, up_FD) in enumerate(zip(*split, strict=True), start=experts.num_experts):
            gate_up_EGD[place].copy_(torch.cat((gate_FD, up_FD)))
        down_EDF[experts.num_experts :].copy_(
            torch.stack(shared.down_proj.weight.detach().chunk(num_shared, dim=1))
        )
    return gate_up_EGD, down_EDF


def _with_room(experts: RoutedExperts, name: str, number: int) -> Tensor:
    """A stack of weights with room behind it for more experts, of which the parameter becomes a part."""
    stack = getattr(experts, name).detach()
    if stack.untyped_storage().nbytes() == (len(stack) + number) * stack[0].nbytes:
        return stack.as_strided((len(stack) + number, *stack.shape[1:]), stack.stride(), 0)
    wide = stack.new_empty(len(stack) + number, *stack.shape[1:])
    wide[: len(stack)] = stack
    getattr(experts, name).data = wide[: len(stack)]
    return wide
