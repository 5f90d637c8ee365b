"""What one rank of a layout has of the model and of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.parallel_config import ParallelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_float32_weights, count_layers, count_parameters


@dataclass(frozen=True)
class RankParameters:
    """How many parameters a rank works on.

    `layers`: in whole layers; of these `experts` in routed experts, and `whole` in routers and norms, which every
    rank holds whole. `share`: those that the rank updates.
    """

    layers: float
    experts: float
    whole: float
    share: float


def rank_parameters(config: RunConfig) -> RankParameters:
    """Those of one rank, on average over pipeline stages."""
    parallel, (routed, others, outside) = config.parallel, parameters_by_place(config.model)
    experts, whole, stages = routed / parallel.expert, count_float32_weights(config.model), parallel.pipeline
    share = own_share(parallel, routed, whole, others + outside - whole)
    return RankParameters((experts + others) / stages, experts / stages, whole / stages, share / stages)


def own_share(parallel: ParallelConfig, routed: float, whole: float, others: float) -> float:
    """How many a rank owns of parameters in routed experts, in what every rank holds whole, and of others."""
    return routed / max(parallel.data_shard, parallel.expert) + whole + others / parallel.data_shard


@lru_cache
def parameters_by_place(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters of routed experts, of all else in layers, and of embedding and head."""
    mixtures = model.num_moe_layers + model.num_nextn_predict_layers
    routed = count_layers(model, 0, mixtures, model.n_routed_experts).routed_experts
    counts = count_parameters(model)
    outside = counts.embedding + counts.head
    return routed, counts.with_prediction - outside - routed, outside


def micro_batches(config: RunConfig) -> int:
    """Those that a rank runs in a step of the full batch."""
    parallel = config.parallel
    return config.training.global_batch_size // (parallel.micro_batch_size * parallel.data_ranks)
