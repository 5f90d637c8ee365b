"""Step time: amounts of work compared with operations and bytes counted by hand, and invariants."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.planning import step_time
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.counts import rank_parameters
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.flops import flops_per_token, training_flops_per_token
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.pipeline_split import stage_imbalance
from deepseek_v3.planning.step_time import (
    StepTime,
    StepWork,
    collective_seconds,
    compute_seconds,
    estimate_step,
    step_work,
)
from helpers import ROOT
from helpers.fp8_choices import EVERY_LAYER, NETWORKS, PROJECTIONS
from helpers.runs import run_fields

CONFIGS = sorted((ROOT / "configs").glob("deepseek_v3_*.yaml"))
COMPILED = Execution(2, compiled=True)
RANKS = {"data_replicate": 2, "data_shard": 4, "expert": 2, "pipeline": 2}
RATES = ("fp8_tflops", "bfloat16_tflops", "float32_tflops", "memory_gb_per_s", "link_gb_per_s", "network_gb_per_s")

WHOLE = ("norm.weight", "mlp.gate.weight")  # routers and norms, replicated on every rank

# A gigabyte takes a tenth of a second in a node of four, and a second between nodes: collectives reach half of a
# link's published bandwidth, the expert exchange a quarter, and both 0.8 of the network's.
DEVICE = Device(
    name="a device for hand counts",
    memory_gib=10.0,
    bfloat16_tflops=100.0,
    fp8_tflops=200.0,
    float32_tflops=50.0,
    memory_gb_per_s=1000.0,
    link_gb_per_s=20.0,
    network_gb_per_s=1.25,
    devices_per_node=4,
    dollars_per_hour=1.0,
    source="made up",
)
LINK, LINK_OF_ROWS, NETWORK = 10e9, 5e9, 1e9
SLOWED = 0.5  # share of overlapped communication
# Computes so slowly that all communication except the expert exchange is overlapped.
SLOW = DEVICE.model_copy(update={"bfloat16_tflops": 1e-6})


@pytest.fixture(autouse=True, scope="module")
def _one_fit() -> Iterator[None]:
    """All devices take the same factors, so that only their rates differ."""
    fit = calibration(DEVICE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(step_time, "calibration", lambda _: fit)
        yield


def _run(model: dict[str, Any] | None = None, moments: str = "bfloat16", **changes: Any) -> RunConfig:
    """A small run; `changes` are fields of `parallel`, or of `training` where they are its."""
    fields = run_fields(Path("run"))
    del fields["data"]["corpus"]
    fields["model"] |= model or {}
    fields["training"]["optimizer"]["moments"] = moments
    for name, value in changes.items():
        fields["training" if name in ("sequence_length", "global_batch_size") else "parallel"][name] = value
    return RunConfig.model_validate(fields, strict=False)


def _operations(work: StepWork) -> float:
    dense = work.matrix_operations + work.fp8_matrix_operations
    return dense + work.expert_operations + work.fp8_expert_operations + work.attention_operations


def _busy(step: StepTime) -> float:
    return step.total - step.communication - step.waiting


def _weights(config: RunConfig, *parts: str) -> int:
    """Number of parameters of the built model with any of `parts` in their names."""
    with torch.device("meta"):
        named = list(DeepSeekV3(config.model).named_parameters())
    return sum(parameter.numel() for name, parameter in named if any(part in name for part in parts))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("ranks", [{}, RANKS], ids=["one rank", "many ranks"])
def test_operations_of_all_ranks_are_those_of_every_token(depth: int, ranks: dict[str, int]) -> None:
    config = _run({"num_nextn_predict_layers": depth}, global_batch_size=64, **ranks)
    tokens = 64 * config.training.sequence_length
    kept = _operations(step_work(config, COMPILED)) * config.parallel.world_size
    assert kept == training_flops_per_token(config.model, config.training.sequence_length) * tokens
    again = _run({"num_nextn_predict_layers": depth}, global_batch_size=64, recomputation="full", **ranks)
    repeated = _operations(step_work(again, COMPILED)) * config.parallel.world_size
    assert repeated == flops_per_token(config.model, config.training.sequence_length, "full").total * tokens


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_operations_of_shipped_runs(path: Path) -> None:
    config = load_config(path)
    training, model = config.training, config.model
    tokens = training.global_batch_size * training.sequence_length
    found = _operations(step_work(config, COMPILED)) * config.parallel.world_size
    counts = flops_per_token(model, training.sequence_length, config.parallel.recomputation)
    assert found == pytest.approx(counts.total * tokens, rel=1e-12)


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_fp8_leaves_head_and_routers_in_bf16(recomputation: str) -> None:
    config = _run(global_batch_size=8, recomputation=recomputation)
    narrow, fp8 = step_work(config, COMPILED), step_work(config, replace(COMPILED, fp8=EVERY_LAYER))
    assert _operations(fp8) == pytest.approx(_operations(narrow))
    tokens, model = 8 * config.training.sequence_length, config.model
    depth, width = model.num_nextn_predict_layers, model.hidden_size
    head = 3 * (1 + depth) * model.vocab_size * width
    gates = (model.num_moe_layers + depth) * model.n_routed_experts * width * (3 if recomputation == "none" else 4)
    joining = depth * 2 * width * width * (4 if recomputation == "full" else 3)
    assert fp8.matrix_operations == 2 * tokens * (head + gates + joining)
    assert fp8.fp8_expert_operations == narrow.expert_operations
    assert fp8.expert_operations == 0
    assert narrow.quantization_bytes == 0


def test_layers_in_fp8_keep_their_operations_and_no_others_do() -> None:
    """By hand for one dense and one MoE layer, of whose layers three are in FP8."""
    changes = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
    config = _run(changes, global_batch_size=8)
    model, tokens = config.model, 8 * config.training.sequence_length
    run = replace(COMPILED, fp8=frozenset(("self_attn.o_proj", "mlp", "mlp.experts")))
    mixed, narrow = step_work(config, run), step_work(config, COMPILED)
    outputs = 2 * model.num_attention_heads * model.v_head_dim * model.hidden_size
    dense = 3 * model.hidden_size * model.intermediate_size
    routed = 3 * model.hidden_size * model.moe_intermediate_size * model.num_experts_per_tok
    assert mixed.fp8_matrix_operations == 3 * 2 * tokens * (outputs + dense)
    assert mixed.fp8_expert_operations == 3 * 2 * tokens * routed
    assert mixed.expert_operations == 0
    assert _operations(mixed) == _operations(narrow)


def test_only_weights_in_bf16_are_cast() -> None:
    """All weights of projections, networks and experts are cast or quantized, in proportion to their numbers."""
    config = _run(global_batch_size=8)
    projections, networks, every = (
        step_work(config, replace(COMPILED, fp8=layers)) for layers in (PROJECTIONS, NETWORKS, EVERY_LAYER)
    )
    narrow = step_work(config, COMPILED)
    both = projections.quantization_bytes + networks.quantization_bytes
    assert both == pytest.approx(every.quantization_bytes)
    saved = 2 * narrow.weight_bytes - projections.weight_bytes - networks.weight_bytes
    assert saved == pytest.approx(narrow.weight_bytes - every.weight_bytes)
    attention = _weights(config, "self_attn.") - _weights(config, "a_layernorm")
    others = _weights(config, "mlp.") - _weights(config, "mlp.gate.")
    share = (narrow.weight_bytes - projections.weight_bytes) / (narrow.weight_bytes - every.weight_bytes)
    assert share == pytest.approx(attention / (attention + others))


class _Traffic(NamedTuple):
    """Bytes of a tensor's quantization: read in bfloat16, written in FP8 by row, by column, or both."""

    numbers: int

    def bytes(self, forms: int = 2, read: float = 2.0) -> float:
        return self.numbers * (read + forms * (1 + 4 / 128))


@pytest.mark.parametrize("recomputes", [False, True])
def test_bytes_that_quantization_moves(recomputes: bool) -> None:
    """Each tensor of one MoE layer by hand: inputs and output gradients of linear layers, SwiGLU, rows, weights."""
    changes = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    config = _run(changes, global_batch_size=2, recomputation="full" if recomputes else "none")
    model, tokens = config.model, 2 * config.training.sequence_length
    width, heads, hidden = model.hidden_size, model.num_attention_heads, model.moe_intermediate_size
    query, nope, value = model.qk_head_dim, model.qk_nope_head_dim, model.v_head_dim
    rank, latent, rope = model.q_lora_rank, model.kv_lora_rank, model.qk_rope_head_dim
    rows, shared = model.num_experts_per_tok, model.n_shared_experts * hidden
    inputs = [width, rank, latent, width]  # the last is that of the shared experts
    gradients = [rank, heads * query, latent + rope, heads * (nope + value), width, width]
    forward = sum(_Traffic(number).bytes() for number in inputs)
    forward += _Traffic(heads * value).bytes(forms=1)  # by column in the backward pass
    forward += _Traffic(2 * shared).bytes(forms=1) + (1 + 4 / 128) * shared  # gate and up; their product
    forward += _Traffic(width).bytes(forms=1) + rows * _Traffic(width).bytes(forms=1, read=1 + 4 / 128)
    forward += rows * (_Traffic(2 * hidden).bytes(forms=1) + (1 + 4 / 128) * hidden)
    backward = sum(_Traffic(number).bytes() for number in gradients) + _Traffic(heads * value).bytes(forms=1)
    for count, inner in ((1, shared), (rows, hidden)):  # gate and up, read in FP8, and the product's gradient
        backward += count * (_Traffic(2 * inner).bytes(read=1 + 4 / 128) + _Traffic(inner).bytes(forms=1))
    backward += _Traffic(width).bytes(forms=1)
    backward += rows * (_Traffic(width).bytes(forms=1, read=1 + 4 / 128) + 2 * _Traffic(width).bytes(forms=1))
    passes = 2 if recomputes else 1
    weights = rank_parameters(config).layers * (4 + 2 * (1 + 4 / 128**2))
    micro_batches = config.gradient_accumulation_steps
    expected = tokens * (passes * forward + backward) + passes * micro_batches * weights
    assert step_work(config, replace(COMPILED, fp8=EVERY_LAYER)).quantization_bytes == pytest.approx(expected)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_fp8_steps_of_wide_layers_are_faster(path: Path) -> None:
    """Products take about half the time. In narrow layers, quantization may cost as much as that."""
    overrides = [f"parallel.{name}=1" for name in ("data_replicate", "data_shard", "expert", "pipeline")]
    config = load_config(path, [*overrides, "parallel.precision=bf16"])
    device = find_device("H200")
    assert device is not None
    narrow = estimate_step(config, COMPILED, device)
    fp8 = estimate_step(config, replace(COMPILED, fp8=EVERY_LAYER), device)
    assert fp8.matrices < narrow.matrices
    assert fp8.experts < narrow.experts
    assert fp8.weights < narrow.weights
    if config.model.hidden_size >= 2048:
        assert fp8.total < narrow.total


def test_experts_of_the_busiest_rank_do_more() -> None:
    config = _run()
    even, uneven = step_work(config, COMPILED), step_work(config, Execution(2, compiled=True, expert_imbalance=1.5))
    assert uneven.expert_operations == 1.5 * even.expert_operations
    assert uneven.matrix_operations == even.matrix_operations
    assert uneven.attention_operations == even.attention_operations


@given(
    factor=st.integers(2, 5),
    micro=st.integers(1, 4),
    recomputation=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_work_is_linear_in_tokens(factor: int, micro: int, recomputation: str, precision: str) -> None:
    def work(sequences: int, at_once: int) -> StepWork:
        config = _run(global_batch_size=sequences, micro_batch_size=at_once, recomputation=recomputation)
        return step_work(config, Execution(2 if precision == "bf16" else 4, precision == "bf16"))

    once, more = work(4 * micro, micro), work(4 * micro * factor, micro)
    for part in ("matrix_operations", "expert_operations", "attention_operations"):
        assert getattr(more, part) == pytest.approx(factor * getattr(once, part))
    for part in ("expert_bytes", "activation_bytes", "logit_bytes", "layer_runs"):
        assert getattr(more, part) == pytest.approx(factor * getattr(once, part))
    # A larger micro-batch is the same work in fewer passes: the weights are read less often.
    longer = work(4 * micro * factor, micro * factor)
    assert _operations(longer) == pytest.approx(_operations(more))
    assert longer.layer_runs == pytest.approx(once.layer_runs)
    assert longer.weight_bytes == once.weight_bytes < more.weight_bytes
    assert longer.expert_bytes < more.expert_bytes


def test_weights_are_cast_in_every_micro_batch() -> None:
    config = {"vocab_size": 7, "num_nextn_predict_layers": 1}
    inside = _weights(_run(config), ".layers.", "model.norm")
    whole = inside + 2 * 7 * 32

    def weight_bytes(
        micro_batches: int, width: int, moments: str = "bfloat16", recomputation: str = "none", shards: int = 1
    ) -> float:
        run = _run(
            config,
            moments,
            micro_batch_size=1,
            global_batch_size=micro_batches * shards,
            recomputation=recomputation,
            data_shard=shards,
        )
        return step_work(run, Execution(2 if width == 2 else 4, compiled=width == 2)).weight_bytes

    # The norm reads gradients; the update reads weights, gradients and moments, and writes weights and moments.
    update = 4 + 3 * 4
    assert weight_bytes(1, 4) == (update + 2 * 4) * whole
    assert weight_bytes(1, 4, "float32") == (update + 2 * 8) * whole
    # A later micro-batch's gradients are read, and read and written where they are summed.
    assert weight_bytes(3, 4) - weight_bytes(1, 4) == 2 * 3 * 4 * whole
    # Each cast reads one type and writes the other: of the weights forward, of their gradients backward.
    assert weight_bytes(1, 2) - weight_bytes(1, 4) == 2 * 6 * inside
    assert weight_bytes(1, 2, recomputation="full") - weight_bytes(1, 4) == 3 * 6 * inside
    assert weight_bytes(3, 2) - weight_bytes(3, 4) == 3 * 2 * 6 * inside
    # With two shards, a rank updates half of the parameters and all routers and norms; all parameters of layers are
    # gathered and reduced for each micro-batch.
    updated = (1 + _weights(_run(config), *WHOLE) / whole) / 2
    for micro_batches in (1, 3):
        shared = weight_bytes(micro_batches, 2, shards=2)
        assert shared == pytest.approx(weight_bytes(micro_batches, 4) * updated + micro_batches * 41 * inside)


def test_seconds_are_work_over_the_rates_of_the_device() -> None:
    work = StepWork(
        matrix_operations=1e14,
        expert_operations=2e14,
        attention_operations=3e14,
        expert_bytes=1e12,
        activation_bytes=2e12,
        logit_bytes=3e12,
        weight_bytes=4e12,
        layer_runs=5.0,
        fp8_matrix_operations=6e14,
        fp8_expert_operations=8e14,
        quantization_bytes=7e12,
    )
    rates = calibration(DEVICE).rates(Execution(2, compiled=True))
    seconds = compute_seconds(work, rates, COMPILED, DEVICE)
    assert seconds == {
        "matrices": pytest.approx(rates.matrices + 3 * rates.fp8_matrices),
        "experts": pytest.approx(2 * rates.experts + rates.expert_bytes + 4 * rates.fp8_experts),
        "attention": pytest.approx(3 * rates.attention),
        "elementwise": pytest.approx(2 * rates.activations + 3 * rates.logits + 7 * rates.quantization),
        "weights": pytest.approx(4 * rates.weights),
        "launches": pytest.approx(5 * rates.seconds_per_layer + rates.seconds_per_step),
    }
    half_as_fast = compute_seconds(work, rates, Execution(4, compiled=False), DEVICE)
    assert half_as_fast["attention"] == pytest.approx(2 * seconds["attention"])


@given(
    micro=st.integers(1, 3),
    micro_batches=st.integers(1, 3),
    recomputation=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "fp32"]),
)
def test_one_device_does_not_wait(micro: int, micro_batches: int, recomputation: str, precision: str) -> None:
    config = _run(
        micro_batch_size=micro,
        global_batch_size=micro * micro_batches,
        recomputation=recomputation,
        precision=precision,
    )
    step = estimate_step(config, resolve_execution(DEVICE, config), DEVICE)
    assert step.communication == step.waiting == 0
    assert step.total == pytest.approx(sum(step.parts().values()))
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in step.parts().values())
    assert step.total > 0


def _sending_seconds(config: RunConfig) -> float:
    """Seconds of all collectives except the expert exchange, on links slower than the computation."""
    changes = {rate: 1e-4 * getattr(DEVICE, rate) for rate in ("link_gb_per_s", "network_gb_per_s")}
    step = estimate_step(config, COMPILED, DEVICE.model_copy(update=changes))
    assert step.communication > 0
    return 1e-4 * (step.communication + (1 - SLOWED) * _busy(step))


@pytest.mark.parametrize(("shards", "bandwidth"), [(2, LINK), (4, LINK), (8, NETWORK)])
def test_gathers_and_reductions_of_shards(shards: int, bandwidth: float) -> None:
    config = _run({"vocab_size": 1}, data_shard=shards, micro_batch_size=1, global_batch_size=3 * shards)
    whole = _weights(config, *WHOLE)
    weights = _weights(config, ".layers.", "model.norm") - whole
    # In each of three micro-batches layers are gathered twice in bfloat16, and gradients reduced in float32. Those
    # of routers and norms are summed once.
    sent = (3 * (2 * 2 + 4) * weights + 2 * 4 * whole) * (shards - 1) / shards
    assert _sending_seconds(config) == pytest.approx(sent / bandwidth, rel=0.01)


@pytest.mark.parametrize(("copies", "bandwidth"), [(2, LINK), (4, LINK), (8, NETWORK)])
def test_gradients_of_replicas_are_reduced_once_a_step(copies: int, bandwidth: float) -> None:
    config = _run({"vocab_size": 1}, data_replicate=copies, micro_batch_size=1, global_batch_size=3 * copies)
    weights = _weights(config, "")
    # A ring all-reduce sends 2 (n - 1) / n of the gradients, in float32.
    assert _sending_seconds(config) == pytest.approx(2 * 4 * weights * (copies - 1) / copies / bandwidth, rel=0.01)


@pytest.mark.parametrize(("form", "there", "back"), [("fp32", 4, 4), ("bf16", 2, 2), ("fp8", 132 / 128, 2)])
def test_gradients_may_travel_in_fewer_bits(form: str, there: float, back: float) -> None:
    """FP8 has a float32 scale for 128 gradients; a sum returns to the replicas in bfloat16 at least."""
    layout = {"data_replicate": 2, "data_shard": 2, "gradient_reduction": form}
    config = _run({"vocab_size": 1}, **layout, micro_batch_size=1, global_batch_size=4)
    whole = _weights(config, *WHOLE)
    weights = _weights(config, "") - whole
    halves = (2 * 2 + there) * weights + (there + back) * weights / 2
    assert _sending_seconds(config) == pytest.approx((halves / 2 + 2 * 4 * whole * 3 / 4) / LINK, rel=0.01)


@pytest.mark.parametrize(
    ("replicate", "shard", "expert", "expert_shards", "expert_copies"),
    [(1, 4, 2, 2, 1), (1, 4, 4, 1, 1), (2, 2, 2, 1, 2), (2, 2, 4, 1, 1)],
)
def test_expert_parallelism_gathers_over_fewer_ranks(
    replicate: int, shard: int, expert: int, expert_shards: int, expert_copies: int
) -> None:
    config = _run(
        {"vocab_size": 1},
        data_replicate=replicate,
        data_shard=shard,
        expert=expert,
        micro_batch_size=1,
        global_batch_size=replicate * shard,
    )
    experts, whole = _weights(config, ".mlp.experts."), _weights(config, *WHOLE)
    others = _weights(config, "") - experts - whole
    kinds = (
        (whole, 1, replicate * shard),
        (others, shard, replicate),
        (experts / expert, expert_shards, expert_copies),
    )
    sent = sum(
        (2 * 2 + 4) * weights * (shards - 1) / shards + 2 * 4 * weights / shards * (copies - 1) / copies
        for weights, shards, copies in kinds
    )
    rows = estimate_step(config, COMPILED, SLOW).communication - SLOWED * sent / LINK
    assert _sending_seconds(config) - rows == pytest.approx(sent / LINK, rel=0.01)


def _others_reached(places: int, chosen: int, experts: int) -> float:
    """Mean number of other ranks with any of `chosen` random experts, by enumeration."""
    draws = list(product(range(experts), repeat=chosen))
    reached = [{expert * places // experts for expert in draw} - {0} for draw in draws]
    return sum(map(len, reached)) / len(draws)


@pytest.mark.parametrize(("recomputation", "passes"), [("none", 2), ("full", 3)])
@pytest.mark.parametrize("expert_imbalance", [1.0, 1.2])
@pytest.mark.parametrize(
    ("expert", "ways"),
    [(1, {}), (2, {2: LINK_OF_ROWS}), (4, {4: LINK_OF_ROWS}), (8, {8: LINK_OF_ROWS, 2: NETWORK})],
)
def test_rows_are_sent_once_to_each_rank_with_their_experts(
    recomputation: str, passes: int, expert_imbalance: float, expert: int, ways: dict[int, float]
) -> None:
    """Rows are sent once to each node of four ranks, and from there to its ranks."""
    chosen, width, moe_layers = 2, 32, 2
    config = _run(
        {"n_routed_experts": 8, "num_experts_per_tok": chosen},
        data_replicate=8,
        expert=expert,
        micro_batch_size=2,
        global_batch_size=48,
        sequence_length=32,
        recomputation=recomputation,
    )
    run = Execution(2, compiled=True, expert_imbalance=expert_imbalance)
    tokens = 3 * 2 * 32 * expert_imbalance * moe_layers
    seconds = sum(_others_reached(places, chosen, 8) / rate for places, rate in ways.items())
    _, found = collective_seconds(config, run, DEVICE)
    assert found == pytest.approx(2 * passes * tokens * 2 * width * seconds)
    in_fp8 = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"dispatch_precision": "fp8"})}
    )
    _, narrow = collective_seconds(in_fp8, run, DEVICE)
    assert found - narrow == pytest.approx((passes - 1) * tokens * (2 - (1 + 4 / 128)) * width * seconds)


def test_communication_overlaps_with_computation_and_slows_it() -> None:
    config = _run(data_shard=4, micro_batch_size=1, global_batch_size=12)
    run = resolve_execution(DEVICE, config)
    hidden = estimate_step(config, run, SLOW).communication
    assert hidden == pytest.approx(SLOWED * _sending_seconds(config))
    for link in (1e-3, 1e-4):
        step = estimate_step(config, run, DEVICE.model_copy(update={"link_gb_per_s": link}))
        sending = _sending_seconds(config) * 20.0 / link
        assert step.communication + (1 - SLOWED) * _busy(step) == pytest.approx(sending)
        assert step.total == pytest.approx(_busy(step) + step.communication)


@pytest.mark.parametrize(
    ("layout", "seconds"),
    [
        ({"data_shard": 2}, 0.011),
        ({"data_replicate": 2}, 0.011),
        ({"data_replicate": 2, "expert": 2}, 0.018),
        ({"pipeline": 2}, 0.005),
    ],
)
def test_a_step_is_at_least_as_long_as_its_launches(layout: dict[str, int], seconds: float) -> None:
    fast = DEVICE.model_copy(update=dict.fromkeys(RATES, 1e12))
    config = _run({"num_hidden_layers": 3}, **layout, micro_batch_size=1, global_batch_size=8)
    step = estimate_step(config, resolve_execution(fast, config), fast)
    ranks = config.parallel.data_ranks
    layers = 4 / config.parallel.pipeline  # including an MTP layer
    assert step.total - step.waiting == pytest.approx(8 / ranks * layers * seconds)
    cpu = find_device("CPU")
    assert cpu is not None
    assert estimate_step(config, resolve_execution(cpu, config), cpu).launches == 0


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 4), (3, 6), (3, 3)])
def test_pipeline_bubbles_are_waiting_time(stages: int, micro_batches: int) -> None:
    model = {"num_hidden_layers": 5}
    config = _run(model, pipeline=stages, micro_batch_size=2, global_batch_size=2 * micro_batches)
    step = estimate_step(config, resolve_execution(DEVICE, config), DEVICE)
    uneven = stage_imbalance(config.model, stages, config.training.sequence_length)
    handing_over = 0.003 * micro_batches if stages > 1 else 0.0
    longest = uneven * (1 + (stages - 1) / micro_batches) * _busy(step)
    assert step.waiting + _busy(step) == pytest.approx(longest + handing_over)


@st.composite
def layouts(draw: st.DrawFn) -> RunConfig:
    """A small run over any ranks."""
    ranks = {name: draw(st.sampled_from([1, 2, 4])) for name in ("data_replicate", "data_shard")}
    every = ranks["data_replicate"] * ranks["data_shard"]
    micro, micro_batches = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    fitting = [expert for expert in (1, 2, 4) if every % expert == 0]  # powers of two: one divides the other
    return _run(
        **ranks,
        expert=draw(st.sampled_from(fitting)),
        pipeline=draw(st.integers(1, min(2, micro_batches))),
        micro_batch_size=micro,
        global_batch_size=micro * micro_batches * every,
        recomputation=draw(st.sampled_from(["none", "selective", "full"])),
        precision=draw(st.sampled_from(["bf16", "fp32"])),
    )


@given(layouts(), st.sampled_from(RATES), st.floats(1, 1000))
def test_a_device_that_does_anything_faster_is_never_slower(config: RunConfig, rate: str, factor: float) -> None:
    faster = DEVICE.model_copy(update={rate: factor * getattr(DEVICE, rate)})
    run = resolve_execution(DEVICE, config)
    usual, found = estimate_step(config, run, DEVICE), estimate_step(config, run, faster)
    assert found.total <= usual.total * (1 + 1e-12)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_known_devices_come_in_the_order_of_their_rates(path: Path) -> None:
    overrides = [f"parallel.{name}=1" for name in ("data_replicate", "data_shard", "expert", "pipeline")]
    config = load_config(path, [*overrides, "parallel.precision=bf16"])
    busy, whole = [], []
    for name in ("B200", "H200", "H100", "A100", "RTX 3090"):
        device = find_device(name)
        assert device is not None
        run = resolve_execution(device, config)
        rates = calibration(device).rates(run)
        busy.append(sum(compute_seconds(step_work(config, run), rates, run, device).values()))
        whole.append(estimate_step(config, run, device).total)
    assert busy == sorted(set(busy))
    assert whole == sorted(whole)  # tiny takes as long on all of them: its host launches it


def test_a_host_launches_small_steps_no_faster_than_large_ones() -> None:
    """A step of many small micro-batches takes the time of its launches, whatever the GPU."""
    device = find_device("H200")
    assert device is not None
    seconds = []
    for sequences in (1, 2):
        overrides = ["training.global_batch_size=64", f"parallel.micro_batch_size={sequences}"]
        one_device = [f"parallel.{name}=1" for name in ("data_replicate", "data_shard", "expert", "pipeline")]
        config = load_config(
            ROOT / "configs" / "deepseek_v3_tiny.yaml", [*overrides, *one_device, "parallel.precision=bf16"]
        )
        seconds.append(estimate_step(config, resolve_execution(device, config), device).total)
    assert seconds[0] == pytest.approx(2 * seconds[1])


@given(layouts())
def test_recomputation_costs_up_to_half_as_much_again(config: RunConfig) -> None:
    def total(**changes: str) -> float:
        changed = config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})
        return _busy(estimate_step(changed, resolve_execution(DEVICE, changed), DEVICE))

    # A fourth pass beside three; casts of weights, twice a micro-batch, become three.
    none, full = total(recomputation="none"), total(recomputation="full")
    assert none < full <= 1.5 * none
