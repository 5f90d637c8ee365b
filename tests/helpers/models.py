"""Small models, filled with noise, for tests."""

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_v3.config.model_config import ModelConfig, RopeScaling
from deepseek_v3.model.transformer import DeepSeekV3

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


def small_config(**changes: Any) -> ModelConfig:
    """A config with every part of the architecture; all widths differ, so that tests notice swapped widths."""
    fields: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 8,
        "v_head_dim": 14,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**{**fields, **changes})


@torch.no_grad()
def fill_with_noise(module: nn.Module, std: float = 0.2) -> None:
    """Sets random weights: norms around one, all others and the routing biases around zero."""
    for name, parameter in module.named_parameters():
        parameter.normal_(mean=1.0 if name.endswith("norm.weight") else 0.0, std=std)
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=std)


def small_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DeepSeekV3:
    """A model of this shape, filled with noise."""
    model = DeepSeekV3(config)
    fill_with_noise(model)
    return model.to(dtype)


@torch.no_grad()
def foreseeable_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DeepSeekV3:
    """A model with random weights whose first MTP layer often foresees its tokens.

    The layers add little to the embedding of the last token, and the MTP layer passes on that of the next one.
    """
    model = small_model(config)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.05)
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.mul_(0.05)
    mtp = model.model.layers[config.num_hidden_layers]
    mtp.eh_proj.weight.copy_(torch.eye(config.hidden_size, 2 * config.hidden_size))
    mtp.enorm.weight.fill_(0.2)  # the length of an embedding
    return model.to(dtype)


def random_tokens(config: ModelConfig, batch_size: int, length: int) -> Tensor:
    """Tokens (batch, length) int64."""
    return torch.randint(config.vocab_size, (batch_size, length))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors of the same shape."""
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected number.

    The divisor is at least 1e-3, because an expert without tokens has a gradient of zero.
    """
    return largest_difference(found, expected) / max(expected.abs().max().item(), 1e-3)
