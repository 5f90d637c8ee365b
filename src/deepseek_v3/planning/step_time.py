"""Time of a training step, from the config alone: amounts of work divided by the rates of a device.

Each kind of work is counted (operations, bytes moved), divided by the device's peak rate, and multiplied by a
factor that was fitted to measured steps of this trainer (`calibration.py`). The time of collectives follows from
their bytes. A step is at least as long as its host needs to launch it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.activations import saved_bytes
from deepseek_v3.planning.calibration import Rates, calibration
from deepseek_v3.planning.counts import rank_parameters
from deepseek_v3.planning.execution import FP8_ACTIVATION, Execution, LayerKind, ranks_reached
from deepseek_v3.planning.flops import ForwardFlops, forward_flops, forward_flops_in_fp8, mtp_forward_flops
from deepseek_v3.planning.fp8_choice import DENSE_NETWORK, ROUTED_EXPERTS, SHARED_EXPERTS, share_in_fp8
from deepseek_v3.planning.fp8_traffic import activation_traffic, weight_traffic
from deepseek_v3.planning.hardware import Device
from deepseek_v3.planning.pipeline_split import stage_imbalance, stage_layer_kinds

# Achieved share of the published bandwidth. Measured on two H200 of one node: 0.47 for gathers and 0.61 for
# reductions alone; 0.2 to 0.28 for the expert exchange during training, including the wait for other ranks. The
# share between nodes is an assumption. See benchmarks/results/multi_gpu_h200_x2.json and
# multi_gpu_15b_h200_x2.json.
_LINK_SHARE, _LINK_SHARE_OF_ROWS, _NETWORK_SHARE = 0.5, 0.25, 0.8

# The factors of `Rates` that make up each part of a step's time.
_FACTORS_OF_PARTS = {
    "matrices": ("matrices", "fp8_matrices"),
    "experts": ("experts", "expert_bytes", "fp8_experts"),
    "attention": ("attention", "masked_attention"),
    "elementwise": ("activations", "logits", "quantization"),
    "weights": ("weights",),
    "launches": ("seconds_per_layer", "seconds_per_step"),
}

# Seconds in which a host launches the forward and the backward pass of one layer, with a proportional part of the
# rest of a step: alone, with pipeline parallelism, with data parallelism, and with expert parallelism, where the
# host also waits for row counts. Measured as the shortest steps of shape 1b: alone with 4 micro-batches of two
# sequences (benchmarks/results/planner_points_h200.json), otherwise on hosts of two H200
# (benchmarks/results/multi_gpu_h200_x2.json).
_LAUNCH_ALONE, _LAUNCH_PIPELINE, _LAUNCH_DATA, _LAUNCH_EXPERT = 0.0062, 0.005, 0.011, 0.018

# Overlapped collectives slow the computation by this share of their own time, because they use the same
# multiprocessors and memory. From shape 15b under FSDP on two H200 (benchmarks/results/multi_gpu_15b_h200_x2.json).
_OVERLAP_COST = 0.5

# Seconds per micro-batch that a pipeline rank waits for its neighbours, apart from uneven stages and the bubble:
# shape 1b with micro-batches of one sequence in two stages took 304 ms a step on two H200.
_PIPELINE_WAIT = 0.003

# Bytes of a gradient on its way to the owner of its shard, and those of a sum on its way back to the replicas.
_GRADIENT_BYTES = {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "fp8": (1 + 4 / 128, 2.0)}

# Bytes moved per sharded parameter and micro-batch, at memory bandwidth: casts and copies into and out of two
# gathers, and of gradients into their reduction. From a trace of the same steps: 144 ms.
_SHARDING_BYTES = 41


@dataclass(frozen=True)
class StepWork:
    """The work of one rank in one step, without pipeline bubbles.

    Operations of dense matrices, experts and attention scores; bytes of the experts' rows and weights, of other
    activations, of logits, and of weights with their gradients and moments; number of layer executions. With FP8,
    operations of dense matrices and experts in FP8, and bytes that are moved to quantize.
    """

    matrix_operations: float
    expert_operations: float
    attention_operations: float
    expert_bytes: float
    activation_bytes: float
    logit_bytes: float
    weight_bytes: float
    layer_runs: float
    fp8_matrix_operations: float = 0.0
    fp8_expert_operations: float = 0.0
    quantization_bytes: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by part.

    `launches`: gaps between kernels, and the time by which the host's launches exceed all other work. `waiting`:
    the pipeline bubble. `communication`: collectives that are not overlapped, and the slow-down from those that
    are.
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
        """Seconds of the whole step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return dict(vars(self))


def estimate_step(config: RunConfig, run: Execution, device: Device) -> StepTime:
    """Time of a step of the full batch on the rank with the slowest pipeline stage."""
    work, rates = step_work(config, run), calibration(device).rates(run)
    computing = compute_seconds(work, rates, run, device)
    busy = sum(computing.values())
    overlapped, exposed = collective_seconds(config, run, device)
    communication = exposed + max(0.0, overlapped - busy) + _OVERLAP_COST * min(overlapped, busy)
    launching = launch_seconds(config, work, device)
    computing["launches"] += max(0.0, launching - busy - communication)
    stages = config.parallel.pipeline
    longest = stage_imbalance(config.model, stages, config.training.sequence_length)
    waiting = max(busy, launching) * (longest * (1 + (stages - 1) / config.gradient_accumulation_steps) - 1)
    if stages > 1:
        waiting += config.gradient_accumulation_steps * _PIPELINE_WAIT
    return StepTime(**computing, communication=communication, waiting=waiting)


def launch_seconds(config: RunConfig, work: StepWork, device: Device) -> float:
    """Seconds in which the host launches a step on its GPU; 0 on a CPU."""
    parallel = config.parallel
    if device.is_cpu:
        return 0.0
    if parallel.world_size == 1:
        return work.layer_runs * _LAUNCH_ALONE
    if parallel.expert > 1:
        return work.layer_runs * _LAUNCH_EXPERT
    return work.layer_runs * (_LAUNCH_PIPELINE if parallel.data_ranks == 1 else _LAUNCH_DATA)


def ideal_seconds(work: StepWork, run: Execution, device: Device) -> dict[str, float]:
    """The multiplier of each factor of `Rates`: seconds at the device's peak rate, or the number of repetitions."""
    peak, fp8_peak, memory = device.peak(run.width), device.peak(1), device.memory_gb_per_s * 1e9
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
        "fp8_matrices": work.fp8_matrix_operations / fp8_peak,
        "fp8_experts": work.fp8_expert_operations / fp8_peak,
        "quantization": work.quantization_bytes / memory,
        "seconds_per_layer": 0.0 if device.is_cpu else work.layer_runs,
        "seconds_per_step": 0.0 if device.is_cpu else 1.0,
    }


def compute_seconds(work: StepWork, rates: Rates, run: Execution, device: Device) -> dict[str, float]:
    """Seconds of computation by part of `StepTime`."""
    ideal = ideal_seconds(work, run, device)
    return {
        part: sum(getattr(rates, factor) * ideal[factor] for factor in factors)
        for part, factors in _FACTORS_OF_PARTS.items()
    }


def step_work(config: RunConfig, run: Execution) -> StepWork:
    """The work of one rank, with equal pipeline stages."""
    model, parallel = config.model, config.parallel
    length = config.training.sequence_length
    passes = 4 if parallel.recomputation == "full" else 3
    ffn_passes = 3 if parallel.recomputation == "none" else 4  # passes through the feed-forward parts
    tokens = parallel.micro_batch_size * length * config.gradient_accumulation_steps / parallel.pipeline
    parts, in_fp8 = _forward(model, length), _forward_in_fp8(model, run.fp8)
    projections = passes * sum(p.attention_projections for p in parts)
    networks = ffn_passes * sum(p.dense_ffn + p.shared_experts for p in parts)
    others = sum(passes * p.joining + ffn_passes * p.gates + 3 * p.head for p in parts)
    matrices_in_fp8 = passes * in_fp8.attention_projections
    matrices_in_fp8 += ffn_passes * (in_fp8.dense_ffn + in_fp8.shared_experts)
    expert_passes = tokens * run.expert_imbalance * ffn_passes
    kinds = stage_layer_kinds(model, 1, length)[0]
    moved = sum(count * _moved_bytes(model, kind, run) for kind, count in Counter(kinds).items())
    depths = 1 + model.num_nextn_predict_layers
    return StepWork(
        matrix_operations=tokens * (projections + networks + others - matrices_in_fp8),
        expert_operations=expert_passes * (sum(p.routed_experts for p in parts) - in_fp8.routed_experts),
        attention_operations=tokens * passes * sum(p.attention_scores for p in parts),
        expert_bytes=ffn_passes * _expert_bytes(config, run, tokens),
        activation_bytes=tokens * moved * ffn_passes / 3,
        logit_bytes=tokens * depths * 3 * run.width * model.vocab_size,
        weight_bytes=_weight_bytes(config, run, recomputes=ffn_passes == 4),
        layer_runs=config.gradient_accumulation_steps * len(kinds) / parallel.pipeline * passes / 3,
        fp8_matrix_operations=tokens * matrices_in_fp8,
        fp8_expert_operations=expert_passes * in_fp8.routed_experts,
        quantization_bytes=tokens * activation_traffic(model, kinds, run, passes - 2, ffn_passes - 2)
        + config.gradient_accumulation_steps * weight_traffic(config, run, ffn_passes - 2),
    )


def _moved_bytes(model: ModelConfig, kind: LayerKind, run: Execution) -> float:
    """Bytes per token to which the traffic of all elementwise work is proportional: what a layer saves.

    In FP8, SwiGLU quantizes and is counted there; the rest moves what it moves in bfloat16.
    """
    if kind == "dense":
        hidden: float = model.intermediate_size if DENSE_NETWORK in run.fp8 else 0
    else:
        routed = model.num_experts_per_tok * run.expert_imbalance if ROUTED_EXPERTS in run.fp8 else 0
        shared = model.n_shared_experts if SHARED_EXPERTS in run.fp8 else 0
        hidden = (routed + shared) * model.moe_intermediate_size
    return saved_bytes(model, kind, replace(run, fp8=frozenset())) - 3 * run.width * hidden


def _expert_bytes(config: RunConfig, run: Execution, tokens: float) -> float:
    """Bytes of the experts' input and output rows and of their weights, for one pass."""
    model = config.model
    moe_layers = model.num_moe_layers + model.num_nextn_predict_layers
    rows = moe_layers * tokens * model.num_experts_per_tok * run.expert_imbalance
    weights = config.gradient_accumulation_steps * rank_parameters(config).experts
    # In FP8, products read one byte and write two: of the bytes in bfloat16, two thirds.
    width = 4 / 3 if ROUTED_EXPERTS in run.fp8 else run.width
    row = width * (2 * model.hidden_size + 3 * model.moe_intermediate_size)
    return rows * row + run.width * weights


def _weight_bytes(config: RunConfig, run: Execution, recomputes: bool) -> float:
    """Bytes of casts and copies in every micro-batch, of gradient accumulation, and of the optimizer's update."""
    own, repeats = rank_parameters(config), config.gradient_accumulation_steps
    if config.parallel.data_shard > 1:
        casts: float = _SHARDING_BYTES
    else:
        # Weights in FP8 are quantized instead, and their gradients are computed in float32.
        cast_share = 1 - share_in_fp8(config.model, config.parallel.expert, run.fp8)
        casts = cast_share * ((2 if recomputes else 1) + 1) * (4 + 2) if run.width == 2 else 0.0
    norm, update = 4, 3 * 4 + 2 * 2 * config.training.optimizer.moment_bytes
    summing = (repeats - 1) * 3 * 4
    return own.layers * (repeats * casts) + own.owned * (summing + norm + update)


@lru_cache
def _forward(model: ModelConfig, sequence_length: int) -> tuple[ForwardFlops, ForwardFlops]:
    """Operations per token of the main model and of its MTP layers, cached because every layout asks for them."""
    return forward_flops(model, sequence_length), mtp_forward_flops(model, sequence_length)


@lru_cache
def _forward_in_fp8(model: ModelConfig, in_fp8: frozenset[str]) -> ForwardFlops:
    """Operations per token of all layers with these names, cached in the same way."""
    return forward_flops_in_fp8(model, in_fp8)


def collective_seconds(config: RunConfig, run: Execution, device: Device) -> tuple[float, float]:
    """Seconds of collectives that overlap with computation, and of those that do not."""
    parallel, own = config.parallel, rank_parameters(config)
    vocabulary = 2 * config.model.vocab_size * config.model.hidden_size / parallel.pipeline
    # ZeRO stage 3 gathers weights in both passes of a micro-batch, stage 2 in one of them, stage 1 once per step.
    gathers = 1 if parallel.zero_stage < 3 else 2
    repeats = 1 if parallel.zero_stage == 1 or parallel.pipeline > 1 else config.gradient_accumulation_steps
    gradient, summed = _GRADIENT_BYTES[parallel.gradient_reduction]
    overlapped = 0.0
    others = own.layers - own.experts - own.whole + vocabulary
    shard_bandwidth, data_bandwidth = (_bandwidth(device, n) for n in (parallel.data_shard, parallel.data_ranks))
    for parameters, ranks in ((others, 1), (own.experts, parallel.expert)):
        # With expert parallelism, an expert is sharded and replicated over fewer ranks.
        shards = max(1, parallel.data_shard // ranks)
        copies = parallel.data_ranks // (shards * ranks)
        each_time = (gathers * run.width + gradient) * parameters * _share_of_others(shards)
        overlapped += repeats * each_time / shard_bandwidth
        overlapped += (gradient + summed) * parameters / shards * _share_of_others(copies) / data_bandwidth
    overlapped += 2 * 4 * own.whole * _share_of_others(parallel.data_ranks) / data_bandwidth
    return overlapped, _expert_seconds(config, run, device)


def _expert_seconds(config: RunConfig, run: Execution, device: Device) -> float:
    """Seconds of the expert exchange: dispatch and combine in every pass; gradients have the activations' type."""
    model, parallel = config.model, config.parallel
    if parallel.expert == 1:
        return 0.0
    moe_layers = (model.num_moe_layers + model.num_nextn_predict_layers) / parallel.pipeline
    tokens = parallel.micro_batch_size * config.training.sequence_length * config.gradient_accumulation_steps
    passes = 2 if parallel.recomputation == "none" else 3
    dispatched = FP8_ACTIVATION if parallel.dispatch_precision == "fp8" else run.width
    bytes_of_a_number = (passes - 1) * dispatched + (passes + 1) * run.width  # the backward pass sends both ways
    numbers = moe_layers * tokens * run.expert_imbalance * model.hidden_size
    inside = min(parallel.expert, device.devices_per_node)
    chosen = model.num_experts_per_tok
    way = _others_reached(parallel.expert, chosen) / (_LINK_SHARE_OF_ROWS * 1e9 * device.link_gb_per_s)
    if parallel.expert > inside:
        way += _others_reached(parallel.expert / inside, chosen) / _bandwidth(device, parallel.expert)
    return numbers * bytes_of_a_number * way


def _others_reached(places: float, chosen: int) -> float:
    """Mean number of other ranks (or nodes) that a token is sent to: once to each that holds any of its experts."""
    return _share_of_others(places) * ranks_reached(places, chosen)


def _share_of_others(ranks: float) -> float:
    """The share of gathered data that belongs to other ranks: (n - 1) / n of n ranks."""
    return (ranks - 1) / ranks


def _bandwidth(device: Device, ranks: int) -> float:
    """Bytes per second between ranks: over the links of a node, or over the network between nodes."""
    if ranks <= device.devices_per_node:
        return _LINK_SHARE * 1e9 * device.link_gb_per_s
    return _NETWORK_SHARE * 1e9 * device.network_gb_per_s
