"""The initial value of every parameter, in one table.

DeepSeek-V3 draws all matrices from N(0, 0.006²) (report, §4.2); norms start as the identity. A parameter without a
row in the table is an error, so that a new module cannot start from uninitialised memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# The end of a parameter's name, as a pattern, and its initial value: a factor on initializer_range, or ones.
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

    A parameter's values depend on its name, its shape, `std`, `seed` and the type of its device, not on the other
    parameters. Raises KeyError for a parameter without a row.
    """
    for name, parameter in model.named_parameters():
        everything = range(len(parameter))
        for rows, values in initial_values(name, parameter.shape, everything, std, seed, parameter.device):
            parameter[rows].copy_(values)
    reset_buffers(model)


def initial_values(
    name: str, shape: Sequence[int], rows: range, std: float, seed: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """The initial values of some rows of the parameter `name` of global `shape`, in blocks of rows, float32.

    Each block comes with its slice of these rows. Experts are drawn one by one, so that a rank that holds a few
    of them draws no others; of any other parameter all rows are drawn.
    """
    factor = _factor_of(name)
    if factor is None:
        yield slice(None), torch.ones(len(rows), *shape[1:], dtype=torch.float32, device=device)
    elif len(shape) < 3:
        yield slice(None), _normal(name, shape, factor * std, seed, device)[rows.start : rows.stop]
    else:
        for index, expert in enumerate(rows):
            values = _normal(f"{name}.{expert}", shape[1:], factor * std, seed, device)
            yield slice(index, index + 1), values[None]


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Sets every routing bias to zero. Raises KeyError for any other buffer."""
    for name, buffer in model.named_buffers():
        if not name.endswith("e_score_correction_bias"):
            raise KeyError(f"buffer {name} has no initial value")
        buffer.zero_()


def _factor_of(name: str) -> float | None:
    for ending, factor in _TABLE.items():
        if re.search(rf"(^|\.){ending}$", name):
            return factor
    raise KeyError(f"parameter {name} has no row in the initialisation table of {__name__}")


def _normal(name: str, shape: Sequence[int], std: float, seed: int, device: torch.device) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(*shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator)
