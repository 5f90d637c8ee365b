"""Time of a training step, from the config alone: quantities of work over the rates of a device.

Each kind of work is counted first (operations, bytes moved), then divided by the device's peak and multiplied by a
factor over that peak, fitted to measured steps of this trainer on one H100 (`calibration.py`). Collectives over
several devices follow from their bytes (`collectives.py`), and no step is shorter than launching it takes the host.


FOLDED: Time of what the ranks of a layout send each other, from its bytes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.activations import saved_bytes
from deepseek_v3.planning.calibration import Rates, calibration
from deepseek_v3.planning.counts import rank_parameters
from deepseek_v3.planning.execution import Execution
from deepseek_v3.planning.flops import ForwardFlops, forward_flops, mtp_forward_flops
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.pipeline_split import stage_imbalance, stage_layer_kinds

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
    repeats = 1 if parallel.zero_stage == 1 or parallel.pipeline > 1 else config.gradient_accumulation_steps
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
    moe_layers = (model.num_moe_layers + model.num_nextn_predict_layers) / parallel.pipeline
    tokens = parallel.micro_batch_size * config.training.sequence_length * config.gradient_accumulation_steps
    passes = 2 if parallel.recomputation == "none" else 3
    bytes_each_way = moe_layers * tokens * run.expert_imbalance * run.width * model.hidden_size
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


# The factors that each part of a step's time is made of.
_FACTORS_OF_PARTS = {
    "matrices": ("matrices",),
    "experts": ("experts", "expert_bytes"),
    "attention": ("attention", "masked_attention"),
    "elementwise": ("activations", "logits"),
    "weights": ("weights",),
    "launches": ("seconds_per_layer", "seconds_per_step"),
}

# Seconds in which a host launches both passes of a layer with its share of all else in a step: on a rank of a
# pipeline alone, where ranks share out or sum gradients, and where experts live apart and it waits for counts of
# rows. Of hosts of two H200, on which shape 1b takes no less (benchmarks/results/multi_gpu_h200_x2.json). On one
# GPU the factors of `Rates` hold all of it.
_LAUNCHING, _LAUNCHING_SHARED, _LAUNCHING_APART = 0.005, 0.011, 0.018

# Of the time of collectives that run beside the computation, how much it takes longer for them: they use the same
# multiprocessors and memory. From shape 15b under FSDP on two H200 (results/multi_gpu_15b_h200_x2.json there).
_HIDDEN_COSTS = 0.5

# Seconds that a rank of a pipeline waits for neighbours in each micro-batch, besides uneven stages and the ends of
# a step: shape 1b in micro-batches of one, in two stages, took 304 ms a step on two H200.
_HANDING_OVER = 0.003

# Bytes moved for each parameter that ranks share out, in every micro-batch, at the memory's rate: casts and copies
# into two gathers and out of them, and of gradients into their reduction. From a trace of the same steps: 144 ms.
_SHARING_BYTES = 41


@dataclass(frozen=True)
class StepWork:
    """What one rank does in one step, were the pipeline always full.

    Operations of dense matrices, of experts and of attention scores; bytes of experts' rows and weights, of other
    activations, of logits, and of weights with their gradients and moments; layers run.
    """

    matrix_operations: float
    expert_operations: float
    attention_operations: float
    expert_bytes: float
    activation_bytes: float
    logit_bytes: float
    weight_bytes: float
    layer_runs: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part.

    `launches`: gaps between kernels, and how much longer than all else the host takes to launch a step. `waiting`:
    pipeline stages without work. `communication`: what is not hidden, and what the rest slows the computation by.
    """

    matrices: float
    experts: float
    attention: float
    elementwise: float
    weights: float
    launches: float
    communication: float
    waiting: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def estimate_step(config: RunConfig, run: Execution, device: Device) -> StepTime:
    """A step of the full batch on a rank of the stage with most layers; embedding and head are not weighed in."""
    work, rates = step_work(config, run), calibration().rates(run)
    computing = compute_seconds(work, rates, run, device)
    busy = sum(computing.values())
    hidden, exposed = collective_seconds(config, run, device)
    communication = exposed + max(0.0, hidden - busy) + _HIDDEN_COSTS * min(hidden, busy)
    launching = launch_seconds(config, work, device)
    computing["launches"] += max(0.0, launching - busy - communication)
    stages = config.parallel.pipeline
    longest = stage_imbalance(config.model, stages, config.training.sequence_length)
    waiting = max(busy, launching) * (longest * (1 + (stages - 1) / config.gradient_accumulation_steps) - 1)
    if stages > 1:
        waiting += config.gradient_accumulation_steps * _HANDING_OVER
    return StepTime(**computing, communication=communication, waiting=waiting)


def launch_seconds(config: RunConfig, work: StepWork, device: Device) -> float:
    """How long the host of one of several GPUs takes to launch a step; the GPU works meanwhile."""
    parallel = config.parallel
    if device.is_cpu or parallel.world_size == 1:
        return 0.0
    if parallel.expert > 1:
        return work.layer_runs * _LAUNCHING_APART
    return work.layer_runs * (_LAUNCHING if parallel.data_ranks == 1 else _LAUNCHING_SHARED)


def ideal_seconds(work: StepWork, run: Execution, device: Device) -> dict[str, float]:
    """What each factor of `Rates` is multiplied with: seconds at the device's peak, or how often it is paid."""
    peak, memory = device.peak(run.width), device.memory_gb_per_s * 1e9
    attention = work.attention_operations / peak
    return {
        "matrices": work.matrix_operations / peak,
        "experts": work.expert_operations / peak,
        "expert_bytes": work.expert_bytes / memory,
        "attention": 0.0 if run.mask_bytes else attention,
        "masked_attention": attention if run.mask_bytes else 0.0,
        "activations": work.activation_bytes / memory,
        "logits": work.logit_bytes / memory,
        "weights": work.weight_bytes / memory,
        "seconds_per_layer": 0.0 if device.is_cpu else work.layer_runs,
        "seconds_per_step": 0.0 if device.is_cpu else 1.0,
    }


def compute_seconds(work: StepWork, rates: Rates, run: Execution, device: Device) -> dict[str, float]:
    """Seconds by kind of work."""
    ideal = ideal_seconds(work, run, device)
    return {
        part: sum(getattr(rates, factor) * ideal[factor] for factor in factors)
        for part, factors in _FACTORS_OF_PARTS.items()
    }


def step_work(config: RunConfig, run: Execution) -> StepWork:
    """The work of one rank, equal shares of it on every pipeline stage."""
    model, parallel = config.model, config.parallel
    length = config.training.sequence_length
    passes = 4 if parallel.recomputation == "full" else 3
    behind = 3 if parallel.recomputation == "none" else 4  # passes through what comes behind attention
    tokens = parallel.micro_batch_size * length * config.gradient_accumulation_steps / parallel.pipeline
    parts = _forward(model, length)
    inside = sum(
        passes * (p.attention_projections + p.joining) + behind * (p.feed_forward - p.routed_experts) for p in parts
    )
    kinds = stage_layer_kinds(model, 1, length)[0]
    saved = sum(count * saved_bytes(model, kind, run) for kind, count in Counter(kinds).items())
    depths = 1 + model.num_nextn_predict_layers
    return StepWork(
        matrix_operations=tokens * (inside + 3 * sum(p.head for p in parts)),
        expert_operations=tokens * run.expert_imbalance * behind * sum(p.routed_experts for p in parts),
        attention_operations=tokens * passes * sum(p.attention_scores for p in parts),
        expert_bytes=behind * _expert_bytes(config, run, tokens),
        activation_bytes=tokens * saved * behind / 3,
        logit_bytes=tokens * depths * 3 * run.width * model.vocab_size,
        weight_bytes=_weight_bytes(config, run, recomputes=behind == 4),
        layer_runs=config.gradient_accumulation_steps * len(kinds) / parallel.pipeline * passes / 3,
    )


def _expert_bytes(config: RunConfig, run: Execution, tokens: float) -> float:
    """Rows into and out of both products of the experts, and their weights, for one pass."""
    model = config.model
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    rows = moe_layers * tokens * model.num_experts_per_tok * run.expert_imbalance
    weights = config.gradient_accumulation_steps * rank_parameters(config).experts
    return run.width * (rows * (2 * model.hidden_size + 3 * model.moe_intermediate_size) + weights)


def _weight_bytes(config: RunConfig, run: Execution, recomputes: bool) -> float:
    """Casts and copies of weights and gradients at every micro-batch, their sums, and the optimizer's pass."""
    own, repeats = rank_parameters(config), config.gradient_accumulation_steps
    if config.parallel.data_shard > 1:
        casts = _SHARING_BYTES
    else:
        casts = ((2 if recomputes else 1) + 1) * (4 + 2) if run.width == 2 else 0
    norm, update = 4, 3 * 4 + 2 * 2 * config.training.optimizer.moment_bytes
    summing = (repeats - 1) * 3 * 4
    return own.layers * (repeats * casts) + own.owned * (summing + norm + update)


@lru_cache
def _forward(model: ModelConfig, sequence_length: int) -> tuple[ForwardFlops, ForwardFlops]:
    """Operations per token of the main model and of its prediction layers; the same for every layout."""
    return forward_flops(model, sequence_length), mtp_forward_flops(model, sequence_length)
