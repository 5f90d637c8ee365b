"""Which layers of a run compute in FP8 (DeepSeek-V3 report, §3.3): one rule for the planner and the trainer.

A layer has the name of its module in a decoder layer, so that the layers of all decoder layers share their names.
The embedding, the head, routers, norms, the core of attention and the projection that joins the inputs of an MTP
layer are no such layers: they compute as they do without FP8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import ParameterCounts, count_layers, projection_widths

SPEED_FILE = Path(__file__).with_name("fp8_speed.json")

DENSE_NETWORK, SHARED_EXPERTS, ROUTED_EXPERTS = "mlp", "mlp.shared_experts", "mlp.experts"

_UNIT = 16  # the products need widths that are multiples of it
_BLOCK = 128  # numbers of a block, as in ops/fp8; a network quantizes its hidden layer in whole blocks


@dataclass(frozen=True)
class LayerSize:
    """The size of a layer that can compute in FP8.

    `kind`: a projection of attention, a dense or shared feed-forward network, or the routed experts of a layer.
    `rows`: the rows of one product of it, for experts the mean over the experts. `widths`: the widths of the rows
    before and after its products; for networks and experts the width of the model and the hidden width.
    """

    kind: Literal["projection", "feed_forward", "experts"]
    rows: int
    widths: tuple[int, ...]

    def obstacle(self) -> str | None:
        """Why the layer cannot compute in FP8; None if it can."""
        if any(width % _UNIT for width in self.widths):
            return f"widths that are no multiples of {_UNIT}"
        if self.kind == "feed_forward" and self.widths[1] % _BLOCK:
            return f"a hidden width that is no multiple of {_BLOCK}"
        return None


@dataclass(frozen=True)
class MeasuredSpeed:
    """A row of `fp8_speed.json`: layers of this kind were faster in FP8 than in bf16.

    It holds for devices whose name begins with `device`, for products of at least `rows` rows between widths of
    at least `width`.
    """

    device: str
    kind: str
    rows: int
    width: int

    def covers(self, size: LayerSize, device_name: str) -> bool:
        return (
            device_name.startswith(self.device)
            and size.kind == self.kind
            and size.rows >= self.rows
            and min(size.widths) >= self.width
        )


def measured_speeds(path: Path = SPEED_FILE) -> list[MeasuredSpeed]:
    """The rows of a table."""
    return [MeasuredSpeed(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


@cache
def shipped_speeds() -> tuple[MeasuredSpeed, ...]:
    """The rows of `fp8_speed.json`."""
    return tuple(measured_speeds())


def reason_against(size: LayerSize, precision: Literal["fp8", "auto"], device_name: str) -> str | None:
    """Why a layer does not compute in FP8 under this `parallel.precision`; None if it does.

    `fp8` takes every layer that can, `auto` those that were measured to be faster. `device_name` is the driver's
    name of the GPU.
    """
    reason = size.obstacle()
    if reason is not None or precision == "fp8":
        return reason
    if any(row.covers(size, device_name) for row in shipped_speeds()):
        return None
    return f"not measured to be faster in FP8 on {device_name}"


def layer_sizes(config: RunConfig) -> dict[str, LayerSize]:
    """The size of every layer of the run that could compute in FP8, by name."""
    model, parallel = config.model, config.parallel
    width, hidden = model.hidden_size, model.moe_intermediate_size
    rows = parallel.micro_batch_size * config.training.sequence_length
    rows_per_expert = rows * parallel.expert * model.num_experts_per_tok // model.n_routed_experts
    sizes = {
        name: LayerSize("projection", rows, (before, after))
        for name, (before, after) in projection_widths(model).items()
    }
    if model.first_k_dense_replace:
        sizes[DENSE_NETWORK] = LayerSize("feed_forward", rows, (width, model.intermediate_size))
    if model.num_moe_layers or model.num_nextn_predict_layers:
        sizes[ROUTED_EXPERTS] = LayerSize("experts", rows_per_expert, (width, hidden))
        if model.n_shared_experts:
            sizes[SHARED_EXPERTS] = LayerSize("feed_forward", rows, (width, model.n_shared_experts * hidden))
    return sizes


def has_all_in_fp8(config: RunConfig, in_fp8: frozenset[str]) -> bool:
    """Whether every layer of the run that could compute in FP8 is among these."""
    return in_fp8 == layer_sizes(config).keys()


def describe_layers(in_fp8: frozenset[str]) -> str:
    """The kinds of layers with these names, for a reader, such as "self_attn.o_proj, routed experts"."""
    networks = {DENSE_NETWORK: "dense networks", SHARED_EXPERTS: "shared experts", ROUTED_EXPERTS: "routed experts"}
    words = [name for name in sorted(in_fp8) if name not in networks]
    return ", ".join(words + [word for name, word in networks.items() if name in in_fp8])


def layers_in_fp8(config: RunConfig, device_name: str) -> frozenset[str]:
    """The names of the layers that compute in FP8 on a GPU that can run them."""
    precision = config.parallel.precision
    if precision not in ("fp8", "auto"):
        return frozenset()
    sizes = layer_sizes(config).items()
    return frozenset(name for name, size in sizes if reason_against(size, precision, device_name) is None)


def weights_in_fp8(model: ModelConfig, counts: ParameterCounts, in_fp8: frozenset[str]) -> ParameterCounts:
    """Of the parameters of some layers, the weights of those that compute in FP8, by part."""
    sizes = {name: before * after for name, (before, after) in projection_widths(model).items()}
    chosen = sum(size for name, size in sizes.items() if name in in_fp8)
    return ParameterCounts(
        attention=counts.attention * chosen // sum(sizes.values()),
        dense_ffn=counts.dense_ffn if DENSE_NETWORK in in_fp8 else 0,
        routed_experts=counts.routed_experts if ROUTED_EXPERTS in in_fp8 else 0,
        shared_experts=counts.shared_experts if SHARED_EXPERTS in in_fp8 else 0,
    )


@lru_cache
def share_in_fp8(model: ModelConfig, expert_ranks: int, in_fp8: frozenset[str]) -> float:
    """The share of the weights of a rank's projections, networks and experts that are in FP8."""
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    counts = count_layers(model, model.first_k_dense_replace, moe_layers, model.n_routed_experts // expert_ranks)
    return weights_in_fp8(model, counts, in_fp8).total / (counts.total - counts.gates - counts.norms)
