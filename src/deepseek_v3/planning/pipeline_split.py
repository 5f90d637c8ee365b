"""Divides the layers of a model into pipeline stages of even cost, and assigns the stages to ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.planning.execution import LayerKind
from deepseek_v3.planning.flops import head_flops, layer_flops


@lru_cache
def stage_layers(model: ModelConfig, stages: int, sequence_length: int) -> tuple[range, ...]:
    """The layers of the main model on each stage, in order; a stage may be empty.

    The MTP layers and the losses are on the last stage. The cost of a layer is its operations in a forward pass.
    """
    costs = [float(layer_flops(model, kind, sequence_length)) for kind in layer_kinds(model)]
    depth = model.num_nextn_predict_layers
    last = (1 + depth) * head_flops(model) + depth * layer_flops(model, "mtp", sequence_length)
    return _even_cut(costs, last, stages)


def stage_layer_kinds(model: ModelConfig, stages: int, sequence_length: int) -> list[list[LayerKind]]:
    """The kinds of the layers of each stage."""
    kinds = layer_kinds(model)
    found = [[kinds[layer] for layer in layers] for layers in stage_layers(model, stages, sequence_length)]
    found[-1] += ["mtp"] * model.num_nextn_predict_layers
    return found


def stages_of_rank(parallel: ParallelConfig, rank: int) -> list[int]:
    """The stages of one pipeline rank: in the V of zero_bubble and dualpipe_v these are r and 2p - 1 - r."""
    if parallel.stages_per_rank == 1:
        return [rank]
    if parallel.pipeline_schedule == "interleaved":
        return [rank, parallel.pipeline + rank]
    return [rank, 2 * parallel.pipeline - 1 - rank]


def max_in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> float:
    """The most micro-batches whose activations a pipeline rank holds at once, in units of all its layers.

    It is the number of forward minus backward passes in the order of torch's schedule; with two stages per rank,
    each counts half.
    """
    ranks = parallel.pipeline
    most: dict[str, float] = {
        "1f1b": ranks - rank,
        "interleaved": (3 * ranks - 1) / 2 - rank,
        "zero_bubble": ranks,
        "dualpipe_v": ranks + 0.5,
    }
    return min(most[parallel.pipeline_schedule], micro_batches)


@lru_cache
def stage_imbalance(model: ModelConfig, stages: int, sequence_length: int) -> float:
    """The cost of the slowest stage divided by the mean cost of a stage."""
    costs = [
        sum(layer_flops(model, kind, sequence_length) for kind in kinds)
        for kinds in stage_layer_kinds(model, stages, sequence_length)
    ]
    costs[-1] += (1 + model.num_nextn_predict_layers) * head_flops(model)
    return max(costs) * stages / sum(costs)


def layer_kinds(model: ModelConfig) -> list[LayerKind]:
    """The kinds of the main model's layers, in order."""
    dense: list[LayerKind] = ["dense"] * model.first_k_dense_replace
    moe_layers: list[LayerKind] = ["moe"] * model.num_moe_layers
    return dense + moe_layers


def _even_cut(costs: Sequence[float], last: float, stages: int) -> tuple[range, ...]:
    """Cuts the layers into consecutive stages with the smallest maximum cost; `last` is added to the last stage.

    Dynamic programming: best[n] holds, for the first n layers on the stages so far, that maximum and the sum of
    squared costs. The latter decides between equal maxima, in favour of the more even stages.
    """
    sums = [0.0, *accumulate(costs)]
    places = range(len(costs) + 1)
    best = [(total, total**2) for total in sums]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        more = last if stage == stages - 1 else 0.0
        found = []
        for end in places:
            ways = [(*_add_stage(best[cut], sums[end] - sums[cut] + more), cut) for cut in range(end + 1)]
            found.append(min(ways))
        best = [(most, squares) for most, squares, _ in found]
        cuts.append([cut for _, _, cut in found])
    ends = [len(costs)]
    for cut in reversed(cuts):
        ends.insert(0, cut[ends[0]])
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _add_stage(before: tuple[float, float], cost: float) -> tuple[float, float]:
    """The maximum cost and the sum of squares after adding one more stage."""
    return max(before[0], cost), before[1] + cost**2
