"""The numbers of rows for which matrix products give each row the same bits.

A library chooses the code of a matrix product by the shapes of its operands, and other code sums in another order.
So a row would depend on how many rows are computed with it. For one shape a row depends neither on its place nor on
the other rows. The passes of the engine therefore have few different numbers of rows, with which every product of
the model gives the same rows. They are found by computing the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_v3.mla.attention import MultiHeadLatentAttention
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import RoutedExperts
from deepseek_v3.ops.mla_decode.formats import PAGE

# The numbers that are tried, and the one with which the others have to agree. A single row is left out: it would be
# the product of a matrix and a vector, which agrees with no other.
_FEW, _FEW_ANCHOR = (2, 4, 8, 16, 32), 8
_MANY, _MANY_ANCHOR = (16, 32, PAGE, 2 * PAGE, 4 * PAGE), PAGE

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowCounts:
    """The numbers of rows of a pass, ascending: `few` for generated tokens, `many` for prompts."""

    few: tuple[int, ...]
    many: tuple[int, ...]


def padded(number: int, counts: Sequence[int]) -> int:
    """The smallest of `counts`, ascending, that is not below `number`; the largest has to be that large."""
    return next(count for count in counts if count >= number)


@torch.inference_mode()
def measure_row_counts(model: DeepSeekV3, dtype: torch.dtype) -> RowCounts:
    """The numbers of rows that agree for a model that computes in `dtype` on the CPU."""
    products = list(_products(model, dtype))
    head_VD = model.head_weight_VD.to(dtype)
    with_head = [*products, (head_VD.shape[1], _linear(head_VD))]
    return RowCounts(agreeing(_FEW, _FEW_ANCHOR, with_head), agreeing(_MANY, _MANY_ANCHOR, products))


def agreeing(counts: Sequence[int], anchor: int, products: Iterable[tuple[int, Product]]) -> tuple[int, ...]:
    """Those of `counts` with which all of the products give the same rows as in blocks of `anchor` rows.

    A product comes with the width of its rows, and takes and returns (rows, width). Larger counts than the anchor
    are multiples of it.
    """
    left = set(counts)
    generator = torch.Generator().manual_seed(0)
    for width, product in products:
        x_MI = torch.randn(max(counts), width, generator=generator)
        wanted_MO = torch.cat([product(block_AI) for block_AI in x_MI.split(anchor)])
        left = {count for count in left if torch.equal(product(x_MI[:count]), wanted_MO[:count])}
    return tuple(sorted(left | {anchor}))


def _products(model: DeepSeekV3, dtype: torch.dtype) -> Iterator[tuple[int, Product]]:
    """One product for each type and shape of weight in the layers."""
    weights: dict[tuple[torch.dtype, torch.Size], Tensor] = {}
    for module in model.model.layers.modules():
        if isinstance(module, RoutedExperts):
            stacks = (module.gate_up_proj[0], module.down_proj[0])
            weights |= {(dtype, weight.shape): weight for weight in stacks}
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2:
            is_router = hasattr(module, "e_score_correction_bias")
            weights[weight.dtype if is_router else dtype, weight.shape] = weight
    for (kind, shape), weight in weights.items():
        yield shape[1], _linear(weight.to(kind))
    first = next(module for module in model.modules() if isinstance(module, MultiHeadLatentAttention))
    w_uk_HNC, w_uv_HVC = first.absorbed_weights(dtype)
    for absorbed_HIO in (w_uk_HNC, w_uv_HVC.transpose(1, 2)):
        heads, width, _ = absorbed_HIO.shape
        yield heads * width, _by_head(absorbed_HIO)


def _linear(weight_OI: Tensor) -> Product:
    return lambda x_MI: F.linear(x_MI.to(weight_OI.dtype), weight_OI)


def _by_head(weight_HIO: Tensor) -> Product:
    heads = len(weight_HIO)
    return lambda x_MI: torch.bmm(
        x_MI.to(weight_HIO.dtype).unflatten(1, (heads, -1)).transpose(0, 1), weight_HIO
    ).transpose(0, 1)
