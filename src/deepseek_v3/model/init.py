"""How every parameter starts: one table.

DeepSeek-V3 draws all matrices from N(0, 0.006²) (report, §4.2); norms start as the identity. A parameter that
no row of the table names is an error, so that a new module cannot start from whatever memory held.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor, nn

# What a parameter's name ends with, and its start: a factor on the config's initializer_range, or ones.
_MATRIX = 1.0
_ONES = None
_TABLE: dict[str, float | None] = {
    r"embed_tokens\.weight": _MATRIX,
    r"lm_head\.weight": _MATRIX,
    r"self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)\.weight": _MATRIX,
    r"mlp\.(shared_experts\.)?(gate_proj|up_proj|down_proj)\.weight": _MATRIX,
    r"mlp\.experts\.(gate_up_proj|down_proj)": _MATRIX,
    r"mlp\.gate\.weight": _MATRIX,
    r"eh_proj\.weight": _MATRIX,
    r"(input_layernorm|post_attention_layernorm|q_a_layernorm|kv_a_layernorm)\.weight": _ONES,
    r"(enorm|hnorm|norm)\.weight": _ONES,
}


@torch.no_grad()
def initialize(model: nn.Module, std: float, seed: int) -> None:
    """Sets every parameter from the table, and every routing bias to zero.

    What a parameter becomes depends on its name and `seed` alone, not on the order or number of the others.
    Raises KeyError for a parameter without a row.
    """
    for name, parameter in model.named_parameters():
        factor = _start_of(name)
        if factor is None:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, factor * std, generator=_generator(seed, name, parameter))
    for name, buffer in model.named_buffers():
        if not name.endswith("e_score_correction_bias"):
            raise KeyError(f"buffer {name} has no initial value")
        buffer.zero_()


def _start_of(name: str) -> float | None:
    for ending, factor in _TABLE.items():
        if re.search(rf"(^|\.){ending}$", name):
            return factor
    raise KeyError(f"parameter {name} has no row in the initialisation table of {__name__}")


def _generator(seed: int, name: str, parameter: Tensor) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator(parameter.device).manual_seed(int.from_bytes(digest, "little") >> 1)
