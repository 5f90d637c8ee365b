"""Time of what the ranks of a layout send each other, from its bytes."""

from __future__ import annotations

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.execution import Execution
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.shares import micro_batches, rank_parameters

# Of the published rate. Gathers and reductions inside a node, alone on two H200: 0.47 and 0.61. Rows to experts in
# the midst of training steps there, with waiting for other ranks: 0.2 to 0.28. Beyond a node an assumption.
# benchmarks/results/multi_gpu_h200_x2.json and multi_gpu_15b_h200_x2.json.
_LINK_SHARE, _LINK_SHARE_OF_ROWS, _NETWORK_SHARE = 0.5, 0.25, 0.8


def collective_seconds(config: RunConfig, run: Execution, device: Device) -> tuple[float, float]:
    """Seconds of collectives that can run beside the computation, and of those that cannot."""
    parallel, own = config.parallel, rank_parameters(config)
    vocabulary = 2 * config.model.vocab_size * config.model.hidden_size / parallel.pipeline
    # ZeRO's third stage gathers weights for each pass of a micro-batch, its first once for all of a step.
    gathers = 1 if parallel.zero_stage < 3 else 2
    repeats = 1 if parallel.zero_stage == 1 or parallel.pipeline > 1 else micro_batches(config)
    hidden = 0.0
    others = own.layers - own.experts - own.whole + vocabulary
    for parameters, ranks in ((others, 1), (own.experts, parallel.expert)):
        # Experts that live apart on several ranks are sharded and copied over that many fewer.
        shards = max(1, parallel.data_shard // ranks)
        copies = parallel.data_ranks // (shards * ranks)
        each_time = (gathers * run.width + 4) * parameters * _left_over(shards)
        hidden += repeats * each_time / _bandwidth(device, parallel.data_shard)
        hidden += 2 * 4 * parameters / shards * _left_over(copies) / _bandwidth(device, parallel.data_ranks)
    hidden += 2 * 4 * own.whole * _left_over(parallel.data_ranks) / _bandwidth(device, parallel.data_ranks)
    return hidden, _expert_seconds(config, run, device)


def _expert_seconds(config: RunConfig, run: Execution, device: Device) -> float:
    """Seconds that rows take to experts and back, in every pass."""
    model, parallel = config.model, config.parallel
    if parallel.expert == 1:
        return 0.0
    mixtures = (model.num_moe_layers + model.num_nextn_predict_layers) / parallel.pipeline
    tokens = parallel.micro_batch_size * config.training.sequence_length * micro_batches(config)
    passes = 2 if parallel.recomputation == "none" else 3
    bytes_each_way = mixtures * tokens * run.row_factor * run.width * model.hidden_size
    inside = min(parallel.expert, device.devices_per_node)
    chosen = model.num_experts_per_tok
    way = _others_reached(parallel.expert, chosen) / (_LINK_SHARE_OF_ROWS * 1e9 * device.link_gb_per_s)
    if parallel.expert > inside:
        way += _others_reached(parallel.expert / inside, chosen) / _bandwidth(device, parallel.expert)
    return 2 * passes * bytes_each_way * way


def _others_reached(places: float, chosen: int) -> float:
    """How many other ranks, or nodes, a token goes to on average: once to each that holds any of its experts."""
    return (places - 1) * (1 - (1 - 1 / places) ** chosen)


def _left_over(ranks: int) -> float:
    """The share of a rank's data that is another rank's, of so many."""
    return (ranks - 1) / ranks


def _bandwidth(device: Device, ranks: int) -> float:
    """Bytes per second between ranks: the link inside a node, the network beyond."""
    if ranks <= device.devices_per_node:
        return _LINK_SHARE * 1e9 * device.link_gb_per_s
    return _NETWORK_SHARE * 1e9 * device.network_gb_per_s
