"""The angles of the decoupled rotary embedding, with YaRN scaling if the config has it.

Axes: B batch, S sequence, P = R/2 pairs of the R rotary dimensions.
"""

import math

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig, RopeScaling


def rotary_tables(positions_BS: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every pair's angle at the given int64 positions; each (B, S, R/2) float32.

    With YaRN both are multiplied by the ratio of its two magnitude scales, which is 1 in the released
    configuration.
    """
    frequencies_P = inverse_frequencies(config, positions_BS.device)
    angles_BSP = positions_BS[..., None].float() * frequencies_P
    scaling = config.rope_scaling
    if scaling is None:
        return angles_BSP.cos(), angles_BSP.sin()
    magnitude = _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return angles_BSP.cos() * magnitude, angles_BSP.sin() * magnitude


def inverse_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians per position of each of the R/2 pairs, float32 (RoPE, arXiv:2104.09864, eq. 15)."""
    width = config.qk_rope_head_dim
    exponents_P = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    plain_P = 1.0 / (config.rope_theta**exponents_P)
    scaling = config.rope_scaling
    if scaling is None:
        return plain_P
    stretched_P = 1.0 / (scaling.factor * config.rope_theta**exponents_P)
    keep_P = 1 - _ramp(config, scaling, device)
    return stretched_P * (1 - keep_P) + plain_P * keep_P


def softmax_scale(config: ModelConfig) -> float:
    """1/√(query width), times YaRN's squared magnitude (arXiv:2309.00071, eq. 22, applied to all dimensions)."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None:
        return scale
    return scale * _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def _ramp(config: ModelConfig, scaling: RopeScaling, device: torch.device) -> Tensor:
    """0 for pairs that keep their frequency, 1 for pairs that are interpolated fully, linear between; (R/2,)."""
    pairs = config.qk_rope_head_dim // 2
    low = max(math.floor(_pair_with_turns(scaling.beta_fast, config, scaling)), 0)
    high = min(math.ceil(_pair_with_turns(scaling.beta_slow, config, scaling)), config.qk_rope_head_dim - 1)
    span = high - low or 0.001
    return ((torch.arange(pairs, dtype=torch.float32, device=device) - low) / span).clamp(0, 1)


def _pair_with_turns(turns: float, config: ModelConfig, scaling: RopeScaling) -> float:
    """The (fractional) number of the pair that makes `turns` turns over the pre-training context length."""
    wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0
