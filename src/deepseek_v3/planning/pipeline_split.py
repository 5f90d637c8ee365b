"""How a pipeline cuts the layers of a model, evenly, and which rank has which of the stages."""

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
    """The layers of the main model on each stage, in order; a stage may have none.

    The prediction layers and the losses belong to the last stage. Costs are operations of a forward pass.
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
    """The numbers of the stages on one rank of the pipeline; in a V, one on the way down and one on the way up."""
    if parallel.stages_per_rank == 1:
        return [rank]
    if parallel.pipeline_schedule == "interleaved":
        return [rank, parallel.pipeline + rank]
    return [rank, 2 * parallel.pipeline - 1 - rank]


def max_in_flight(parallel: ParallelConfig, rank: int, micro_batches: int) -> float:
    """For how many micro-batches at most a rank of the pipeline keeps the activations of all its layers.

    Forward passes of a stage less its backward passes, as torch orders them; of two stages each counts half.
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
    """The cost of the slowest stage over that of an even share."""
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
    """Cuts in order so that the largest sum of costs, with `last` on top of the last one's, is the smallest.

    best[n] holds that sum for the first n layers on the stages so far, and the sum of squares that tells equal ones
    apart: it is smaller where the other stages are more even.
    """
    sums = [0.0, *accumulate(costs)]
    places = range(len(costs) + 1)
    best = [(total, total**2) for total in sums]
    cuts: list[list[int]] = []
    for stage in range(1, stages):
        more = last if stage == stages - 1 else 0.0
        found = []
        for end in places:
            ways = [(*_joined(best[cut], sums[end] - sums[cut] + more), cut) for cut in range(end + 1)]
            found.append(min(ways))
        best = [(most, squares) for most, squares, _ in found]
        cuts.append([cut for _, _, cut in found])
    ends = [len(costs)]
    for cut in reversed(cuts):
        ends.insert(0, cut[ends[0]])
    return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))


def _joined(before: tuple[float, float], cost: float) -> tuple[float, float]:
    """The largest cost and the sum of squares, one more stage included."""
    return max(before[0], cost), before[1] + cost**2
