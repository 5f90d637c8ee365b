"""The order of the rotary rows of weights, which `rope_interleave` of a config.json tells.

Rotary embedding turns pairs of numbers. In the released weights, and in this project, the two numbers of a pair are
neighbours. With `rope_interleave: false` the first numbers of all pairs come first and the second ones after them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig

_QUERY = re.compile(r"model\.layers\.\d+\.self_attn\.q(_b)?_proj\.weight")
_KEY = re.compile(r"model\.layers\.\d+\.self_attn\.kv_a_proj_with_mqa\.weight")


def rows_of_halves(name: str, config: ModelConfig) -> Tensor | None:
    """Where weights with halves of pairs apart hold each row of a projection: int64 [rows].

    None for a tensor without rotary rows. These are the last ones of each head of the queries, and of the keys.
    """
    if _QUERY.fullmatch(name):
        rows_HK = torch.arange(config.num_attention_heads * config.qk_head_dim).view(-1, config.qk_head_dim)
    elif _KEY.fullmatch(name):
        rows_HK = torch.arange(config.kv_lora_rank + config.qk_rope_head_dim)[None]
    else:
        return None
    rotary_HR = rows_HK[:, -config.qk_rope_head_dim :]
    in_pairs_HR = rotary_HR.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
    return torch.cat((rows_HK[:, : -config.qk_rope_head_dim], in_pairs_HR), dim=1).flatten()
