"""Estimated memory of a step, compared with torch's allocations, counts by hand and measured steps."""

import gc
import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.ops.cross_entropy import chunked, linear_cross_entropy
from deepseek_v3.planning import execution, memory
from deepseek_v3.planning.activations import saved_bytes
from deepseek_v3.planning.calibration import calibration
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.planning.execution import Execution, resolve_execution
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.memory import MemoryEstimate, _Rank, estimate_memory, needed_bytes
from deepseek_v3.planning.pipeline_split import stage_layer_kinds
from deepseek_v3.planning.step_time import estimate_step
from deepseek_v3.training.loss import Objective, training_losses
from deepseek_v3.training.optimizer import AdamW
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.parallelize import build_model
from helpers import ROOT
from helpers.fp8_choices import EVERY_LAYER
from helpers.runs import WIDE_LAYERS, WIDE_RUNS, WideRun, run_fields

SHIPPED = sorted((ROOT / "configs").glob("deepseek_v3_*.yaml"))
RESULTS = ROOT / "benchmarks" / "results"
POINTS = [path.name for path in sorted(RESULTS.glob("planner_points_*.json"))]

# Values are as wide as keys, because the CPU pads narrower ones. The vocabulary is small, because the CPU's loss is
# not fused and would dominate.
SMALL_MODEL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 512,
}


# Many CPUs multiply bfloat16 slowly. A narrow model has more bytes of activations for each weight.
NARROW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 32,
}


def _device(name: str) -> Device:
    device = find_device(name)
    assert device is not None
    return device


H100, CPU = _device("H100"), _device("CPU")


def _run(model: dict[str, Any] | None = None, moments: str = "bfloat16", **changes: Any) -> RunConfig:
    """A small run; `changes` are fields of `parallel`, or of `training` where they are its."""
    fields = run_fields(Path("run"))
    del fields["data"]["corpus"]
    fields["model"] |= SMALL_MODEL | (model or {})
    fields["training"]["optimizer"]["moments"] = moments
    for name, value in changes.items():
        fields["training" if name in ("sequence_length", "global_batch_size") else "parallel"][name] = value
    return RunConfig.model_validate(fields, strict=False)


def _estimate(config: RunConfig, device: Device = H100) -> MemoryEstimate:
    return estimate_memory(config, resolve_execution(device, config))


@cache
def _shipped(path: Path) -> RunConfig:
    """A shipped run on one device, 32 sequences a step."""
    one_device = [f"parallel.{name}=1" for name in ("data_replicate", "data_shard", "expert", "pipeline")]
    return load_config(path, [*one_device, "training.global_batch_size=32", "training.batch_ramp=null"])


@cache
def _measured(file: str) -> tuple[Device, list[tuple[dict[str, Any], RunConfig]]]:
    """The device of a file of measurements, and each measurement with its run."""
    record = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    runs = [(point, load_config(ROOT / point["config"], point["overrides"])) for point in record["points"]]
    return _device(record["device"]), runs


def _built(config: RunConfig) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(config.model)


def _numbers(config: RunConfig, *parts: str) -> int:
    """Number of parameters of the built model with any of `parts` in their names, or of all."""
    return sum(
        parameter.numel()
        for name, parameter in _built(config).named_parameters()
        if not parts or any(part in name for part in parts)
    )


def _whole(config: RunConfig, *parts: str) -> int:
    """Weights of routers and norms, replicated on every rank; of all layers or those with `parts` in the name."""
    kept = ("norm.weight", "mlp.gate.weight")
    return sum(
        parameter.numel()
        for name, parameter in _built(config).named_parameters()
        if name.endswith(kept) and (not parts or any(part in name for part in parts))
    )


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Any valid run of a small shape, over any ranks."""
    layers, experts = draw(st.integers(1, 6)), draw(st.sampled_from([4, 8]))
    depth = draw(st.integers(0, 2))
    model = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_nextn_predict_layers": depth,
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "q_lora_rank": draw(st.none() | st.integers(1, 90)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank"):
        model[name] = draw(st.integers(1, 300))
    replicate, shard = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    micro, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    pipeline = draw(st.integers(1, min(layers, micro_batches)))
    schedules = ["1f1b"]
    if 2 * pipeline <= layers:
        schedules += ["zero_bubble"]
        schedules += ["dualpipe_v"] if 2 * pipeline <= micro_batches else []
        schedules += ["interleaved"] if micro_batches % pipeline == 0 else []
    return _run(
        model,
        moments=draw(st.sampled_from(["bfloat16", "float32"])),
        sequence_length=draw(st.integers(3, 300)),
        global_batch_size=micro * micro_batches * replicate * shard,
        micro_batch_size=micro,
        data_replicate=replicate,
        data_shard=shard,
        expert=draw(st.sampled_from([e for e in (1, 2, 4, 8) if experts % e == 0 and replicate * shard % e == 0])),
        pipeline=pipeline,
        pipeline_schedule=draw(st.sampled_from(schedules)),
        precision=draw(st.sampled_from(["bf16", "fp32"])),
        recomputation=draw(st.sampled_from(["none", "selective", "full"])),
        compile=draw(st.sampled_from(["auto", False])),
    )


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    """The run with changed fields, named as in `_run`, validated again."""
    fields = config.model_dump(mode="json")
    for name, value in changes.items():
        section = next(s for s in ("training", "parallel", "model") if name in fields[s])
        fields[section][name] = value
    return RunConfig.model_validate(fields, strict=False)


@given(runs())
def test_every_part_is_finite_and_parts_sum_to_the_total(config: RunConfig) -> None:
    estimate = _estimate(config)
    parts = estimate.parts()
    assert all(math.isfinite(size) and size >= 0 for size in parts.values())
    assert estimate.total == pytest.approx(sum(parts.values()))
    assert estimate.total > 0
    assert set(parts) >= {"weights", "moments", "gradients", "activations"}
    assert estimate.moment


@given(runs())
def test_float32_moments_cost_four_bytes_more_for_each_parameter(config: RunConfig) -> None:
    narrow, wide = (
        _with(config, optimizer={**config.training.optimizer.model_dump(), "moments": moments}, pipeline=1)
        for moments in ("bfloat16", "float32")
    )
    assert _estimate(wide).total - _estimate(narrow).total == pytest.approx(_estimate(narrow).weights)
    assert _estimate(wide).moments == 2 * _estimate(narrow).moments == 2 * _estimate(narrow).weights


@given(runs(), st.integers(2, 3))
def test_more_sequences_at_once_never_need_less(config: RunConfig, factor: int) -> None:
    more = _with(
        config,
        micro_batch_size=factor * config.parallel.micro_batch_size,
        global_batch_size=factor * config.training.global_batch_size,
    )
    assert _estimate(more).total >= _estimate(config).total


@given(runs(), st.sampled_from(["sequence_length", "num_hidden_layers", "vocab_size", "intermediate_size"]))
def test_more_of_anything_never_needs_less(config: RunConfig, field: str) -> None:
    config = _with(config, pipeline=1)
    section = config.training if field == "sequence_length" else config.model
    more = _with(config, **{field: getattr(section, field) + 1})
    assert _estimate(more).total >= _estimate(config).total


@given(runs())
def test_accumulation_keeps_all_gradients(config: RunConfig) -> None:
    config = _with(
        config, pipeline=1, global_batch_size=config.parallel.micro_batch_size * config.parallel.data_ranks
    )
    again = _with(config, global_batch_size=2 * config.training.global_batch_size)
    once, twice = _estimate(config), _estimate(again)
    assert twice.gradients == twice.weights >= once.gradients
    assert once.total <= twice.total


@given(runs())
def test_one_device_holds_all_states_of_every_parameter(config: RunConfig) -> None:
    config = _with(config, pipeline=1, data_replicate=1, data_shard=1, expert=1)
    estimate, parameters = _estimate(config), count_parameters(config.model).with_prediction
    assert estimate.weights == 4 * parameters
    assert estimate.total >= (16 if config.training.optimizer.moments == "float32" else 12) * parameters
    assert estimate.communication == 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_doubling_the_micro_batch_needs_more_memory(path: Path, recomputation: str, precision: str) -> None:
    totals = [
        _estimate(
            _with(_shipped(path), micro_batch_size=micro, recomputation=recomputation, precision=precision)
        ).total
        for micro in (1, 2, 4, 8, 16)
    ]
    assert totals == sorted(set(totals))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_recomputation_never_needs_more_in_shipped_runs(path: Path, precision: str) -> None:
    for micro in (1, 4, 32):
        none, full = (
            _with(_shipped(path), micro_batch_size=micro, recomputation=recomputation, precision=precision)
            for recomputation in ("none", "full")
        )
        assert _estimate(full).total < _estimate(none).total


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_sharding_divides_weights_moments_and_gradients(ranks: int) -> None:
    config = _run({"tie_word_embeddings": True}, data_shard=ranks, micro_batch_size=2, global_batch_size=4 * ranks)
    estimate, whole = _estimate(config), _whole(config)
    own = whole + (_numbers(config) - whole) / ranks
    assert estimate.weights == estimate.gradients == estimate.moments == 4 * own


@pytest.mark.parametrize(
    ("replicate", "shard", "expert", "expert_ranks"),
    [(2, 1, 2, 2), (8, 1, 4, 4), (1, 4, 2, 4), (2, 2, 4, 4), (1, 8, 8, 8)],
)
def test_expert_parallelism_divides_the_experts(replicate: int, shard: int, expert: int, expert_ranks: int) -> None:
    config = _run(
        data_replicate=replicate,
        data_shard=shard,
        expert=expert,
        micro_batch_size=2,
        global_batch_size=4 * replicate * shard,
    )
    routed = _numbers(config, ".mlp.experts.")
    whole = _whole(config)
    others = _numbers(config) - routed - whole
    assert routed > others / 2
    assert _estimate(config).weights == 4 * (routed / expert_ranks + whole + others / shard)


@given(runs())
def test_pipeline_stages_divide_all_parameters(config: RunConfig) -> None:
    config = _with(config, data_replicate=1, data_shard=1, expert=1)
    parallel, run = config.parallel, resolve_execution(H100, config)
    number = parallel.pipeline * parallel.stages_per_rank
    stages = stage_layer_kinds(config.model, number, config.training.sequence_length)
    found = sum(_Rank(config, run, stages, rank).parameters for rank in range(parallel.pipeline))
    vocabulary = config.model.vocab_size * config.model.hidden_size
    model = config.model
    shared = model.tie_word_embeddings or model.num_nextn_predict_layers > 0
    again = vocabulary if shared and len(stages) > 1 else 0  # the embedding, on the first and the last stage
    assert found == count_parameters(config.model).with_prediction + again


def test_the_first_rank_of_a_v_holds_both_ends() -> None:
    model = {"num_hidden_layers": 8, "num_nextn_predict_layers": 1, "vocab_size": 5000}
    sizes = {"pipeline": 2, "micro_batch_size": 1, "global_batch_size": 8, "sequence_length": 64}
    run = partial(_run, model, **sizes)
    stages = stage_layer_kinds(run().model, 4, 64)

    def ends(schedule: str, rank: int) -> int:
        config = run(pipeline_schedule=schedule)
        return _Rank(config, resolve_execution(H100, config), stages, rank).ends

    assert [ends("interleaved", rank) for rank in (0, 1)] == [1, 2]
    assert [ends("zero_bubble", rank) for rank in (0, 1)] == [3, 0]
    assert [ends("dualpipe_v", rank) for rank in (0, 1)] == [3, 0]
    weights = {schedule: _estimate(run(pipeline_schedule=schedule)).weights for schedule in ("1f1b", "zero_bubble")}
    assert weights["zero_bubble"] > weights["1f1b"]


def test_a_stage_holds_one_micro_batch_per_later_stage() -> None:
    config = _run({"vocab_size": 32}, pipeline=4, micro_batch_size=2, global_batch_size=20, sequence_length=64)
    run, stages = resolve_execution(H100, config), stage_layer_kinds(config.model, 4, 64)
    assert stages == [["dense", "moe"], ["moe"], ["moe"], ["mtp"]]
    tokens, width = 2 * 64, config.model.hidden_size
    kept = tokens * (2 * width + saved_bytes(config.model, "moe", run))

    def backward(number: int) -> MemoryEstimate:
        moments = _Rank(config, run, stages, number).moments()
        return next(moment for moment in moments if moment.moment.startswith("backward"))

    earlier, later = backward(1), backward(2)
    assert earlier.activations - later.activations == pytest.approx(kept)
    assert earlier.weight_copies / later.weight_copies == pytest.approx(3 / 2)


def test_gathered_layers_and_exchanged_rows_are_communication() -> None:
    sharded = _run(data_shard=4, micro_batch_size=2, global_batch_size=16, sequence_length=64)
    layers = [f".layers.{layer}." for layer in range(5)]
    largest = max(_numbers(sharded, layer) - _whole(sharded, layer) for layer in layers)
    assert _estimate(sharded).communication == 2 * 2 * largest
    spread = _run(data_replicate=4, expert=4, micro_batch_size=2, global_batch_size=16, sequence_length=64)
    rows = 2 * 64 * 3 * resolve_execution(H100, spread).expert_imbalance
    assert _estimate(spread).communication == pytest.approx(2 * 2 * rows * 128)
    assert _estimate(sharded).weight_copies == 0


def test_layers_save_bfloat16_copies_of_all_but_routers() -> None:
    config = _run({"num_hidden_layers": 8}, micro_batch_size=4, global_batch_size=4, sequence_length=256)
    estimate = _estimate(_with(config, precision="bf16"))
    matrices = sum(
        parameter.numel()
        for name, parameter in _built(config).named_parameters()
        if ".layers." in name and parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")
    )
    assert estimate.moment == "backward pass of the last norm"  # no layer has freed its copies yet
    assert estimate.weight_copies == 2 * matrices
    assert _estimate(_with(config, precision="fp32")).weight_copies == 0


def test_fp8_layers_save_their_weights_in_fp8() -> None:
    config = _run({"num_hidden_layers": 8}, micro_batch_size=4, global_batch_size=4, sequence_length=256)
    fp8 = replace(resolve_execution(H100, _with(config, precision="bf16")), fp8=EVERY_LAYER)
    named = [
        (name, parameter.numel()) for name, parameter in _built(config).named_parameters() if ".layers." in name
    ]
    kept = [(name, size) for name, size in named if "norm" not in name and not name.endswith("mlp.gate.weight")]
    joining = sum(size for name, size in kept if "eh_proj" in name)
    expected = 2 * joining + (1 + 4 / 128**2) * (sum(size for _, size in kept) - joining)
    assert estimate_memory(config, fp8).weight_copies == pytest.approx(expected)
    # Weights that are gathered for each pass are quantized again; gathered once, they stay in FP8 too.
    batch = {"micro_batch_size": 4, "global_batch_size": 8}
    for ranks, stage, keeps in (("data_shard", 3, False), ("data_shard", 2, True), ("data_replicate", 3, False)):
        layout = {ranks: 2, "zero_stage": stage, **batch}
        sharded = _run({"num_nextn_predict_layers": 0}, precision="bf16", **layout)
        run = replace(resolve_execution(H100, sharded), fp8=EVERY_LAYER)
        assert run.keeps_fp8_weights == keeps
        assert (estimate_memory(sharded, run).weight_copies > 0) == keeps


def test_each_layer_saves_its_weights_in_its_own_precision() -> None:
    config = _run({"num_hidden_layers": 8}, micro_batch_size=4, global_batch_size=4, sequence_length=256)
    in_fp8 = frozenset(("self_attn.o_proj", "mlp.experts"))
    mixed = replace(resolve_execution(H100, _with(config, precision="bf16")), fp8=in_fp8)
    narrow = _numbers(config, "o_proj", "mlp.experts")
    matrices = sum(
        parameter.numel()
        for name, parameter in _built(config).named_parameters()
        if ".layers." in name and parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")
    )
    expected = 2 * (matrices - narrow) + (1 + 4 / 128**2) * narrow
    assert estimate_memory(config, mixed).weight_copies == pytest.approx(expected)


@pytest.mark.parametrize("run", [run for run in WIDE_RUNS if run.measured_bytes], ids=lambda run: run.name)
def test_layers_chosen_by_auto_need_what_was_measured(run: WideRun, tmp_path: Path) -> None:
    """The feed-forward parts are in FP8, and the projections, which are narrow, in bf16."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_fields(tmp_path)), encoding="utf-8")
    config = load_config(path, [*WIDE_LAYERS, *run.overrides])
    execution = resolve_execution(_device("NVIDIA H200"), config)
    assert {"mlp", "mlp.experts", "mlp.shared_experts"} >= execution.fp8 >= {"mlp"}
    assert estimate_memory(config, execution).total == pytest.approx(run.measured_bytes, rel=0.05)


@pytest.mark.parametrize(("dispatched", "number"), [("activations", 2), ("fp8", 1 + 4 / 128)])
def test_a_rank_receives_a_token_once_for_all_its_experts(dispatched: str, number: float) -> None:
    config = _run(expert=4, data_replicate=4, global_batch_size=8, precision="bf16", dispatch_precision=dispatched)
    chosen = config.model.num_experts_per_tok
    share = 1 - (3 / 4) ** chosen  # of the tokens of each of four ranks, those with an expert on this rank
    assert resolve_execution(H100, config).received_bytes == pytest.approx(1.2 * 4 * share * number)
    assert resolve_execution(H100, _run()).received_bytes == 0


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_fp8_needs_less_memory_in_shipped_runs(path: Path, recomputation: str) -> None:
    config = _with(_shipped(path), recomputation=recomputation, precision="bf16", micro_batch_size=4)
    run = resolve_execution(H100, config)
    fp8, narrow = (estimate_memory(config, replace(run, fp8=fp8)).total for fp8 in (EVERY_LAYER, frozenset()))
    assert 0.5 * narrow < fp8 <= narrow
    assert fp8 < narrow or recomputation == "full"  # the peak may then be the end, when only gradients are left


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_each_loss_holds_gradients_and_a_chunk_of_logits(depth: int, precision: str) -> None:
    sequences, length, words, width = 2, 256, 4096, 128
    config = _run(
        {"vocab_size": words, "num_nextn_predict_layers": depth},
        micro_batch_size=sequences,
        global_batch_size=sequences,
        sequence_length=length,
        precision=precision,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tokens = sequences * length
    hidden_TD = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight_VD = nn.Parameter(torch.randn(words, width))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear_cross_entropy(hidden_TD, weight_VD, torch.randint(words, (tokens,)))
    logits = tokens * words * dtype.itemsize
    cast = weight_VD.numel() * 2 if precision == "bf16" else 0
    estimate = _estimate(config)
    assert estimate.moment == "loss"
    assert estimate.head == (1 + depth) * sum(tensor.nbytes for tensor in saved) + logits + cast
    for chunks in (2, 4):  # of 512 tokens; a chunk has at least 256
        run = replace(resolve_execution(H100, config), logits_per_chunk=tokens * words // chunks)
        assert estimate.head - estimate_memory(config, run).head == logits / 2


@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_real_step_leaves_the_estimated_bytes(moments: str, tied: bool) -> None:
    config = _run(
        {"tie_word_embeddings": tied}, moments, micro_batch_size=1, global_batch_size=2, sequence_length=16
    )
    model = _prepared(config)
    optimizer = AdamW(dict(model.named_parameters()), config.training.optimizer)
    _backward(model, config)
    estimate = _estimate(config, CPU)
    assert estimate.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    assert estimate.moments == sum(moment.nbytes for state in optimizer.state.values() for moment in state.values())


def _prepared(config: RunConfig) -> DeepSeekV3:
    return build_model(config, torch.device("cpu"), ParallelMesh(config.parallel), Objective).model


def _backward(model: DeepSeekV3, config: RunConfig) -> None:
    """The forward and backward passes of one step."""
    sequences, length = config.parallel.micro_batch_size, config.training.sequence_length
    for _ in range(config.training.global_batch_size // sequences):
        tokens_BX = torch.randint(config.model.vocab_size, (sequences, length + 1))
        training_losses(model, tokens_BX, 0.3, 1e-4).total.backward()


def _allocated_at_most(config: RunConfig) -> int:
    """Peak bytes of torch's CPU allocator in a step, including weights and moments."""
    model = _prepared(config)
    optimizer = AdamW(dict(model.named_parameters()), config.training.optimizer)
    now = sum(parameter.nbytes for parameter in model.parameters())
    now += sum(moment.nbytes for state in optimizer.state.values() for moment in state.values())
    gc.collect()  # what earlier tests left must not be freed while this one is measured
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _backward(model, config)
    finally:
        gc.enable()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = now
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(
    ("model", "changes", "tolerance"),
    [
        ({}, {"precision": "fp32"}, 0.02),
        ({}, {"precision": "fp32", "global_batch_size": 8}, 0.02),
        ({}, {"precision": "fp32", "recomputation": "full"}, 0.02),
        (
            NARROW | {"num_hidden_layers": 8},
            {"precision": "fp32", "recomputation": "full", "global_batch_size": 8},
            0.02,
        ),
        ({"num_nextn_predict_layers": 0, "q_lora_rank": None}, {"precision": "fp32"}, 0.02),
        (
            {"hidden_size": 256, "n_routed_experts": 32, "moe_intermediate_size": 128},
            {"precision": "fp32"},
            0.05,
        ),
        ({}, {"precision": "fp32", "sequence_length": 32}, 0.03),
        (
            {"hidden_size": 256, "n_routed_experts": 32, "moe_intermediate_size": 128},
            {"precision": "fp32", "sequence_length": 8},
            0.02,
        ),
        (
            {"vocab_size": 2048},
            {"precision": "fp32", "micro_batch_size": 1, "sequence_length": 32, "global_batch_size": 1},
            0.002,
        ),
        (NARROW, {"precision": "bf16"}, 0.02),
        (
            NARROW | {"num_hidden_layers": 8},
            {"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 4},
            0.02,
        ),
        (NARROW, {"precision": "bf16", "recomputation": "full"}, 0.08),
    ],
    ids=[
        "float32",
        "float32, accumulated",
        "float32, recomputed",
        "float32, 8 layers, recomputed, accumulated",
        "float32, no prediction, no query rank",
        "float32, many wide experts",
        "float32, few tokens",
        "float32, few tokens, many wide experts",
        "float32, few tokens, many words",
        "bfloat16",
        "bfloat16, 8 layers, accumulated",
        "bfloat16, recomputed",
    ],
)
def test_the_cpu_allocates_what_is_estimated(
    model: dict[str, Any], changes: dict[str, Any], tolerance: float
) -> None:
    config = _run(model, **{"micro_batch_size": 4, "global_batch_size": 4, "sequence_length": 256, **changes})
    estimate = _estimate(config, CPU)
    assert estimate.total - estimate.workspace == pytest.approx(_allocated_at_most(config), rel=tolerance)


def test_needed_bytes_include_allocator_and_driver() -> None:
    estimate = _estimate(_run())
    fit = calibration(H100)
    held = estimate.total * (1 + fit.allocator_overhead)
    assert needed_bytes(estimate, H100) == held + fit.context_bytes
    assert held <= needed_bytes(estimate, CPU) <= held + 2**30
    assert fit.allocator_overhead >= 0
    assert fit.context_bytes > 0


@pytest.mark.parametrize("file", POINTS)
def test_estimates_are_near_the_measurements(file: str) -> None:
    device, measured = _measured(file)
    errors = {}
    for point, config in measured:
        run = resolve_execution(device, config)
        memory = estimate_memory(config, run).total / 2**30 / point["measured_gib"] - 1
        time = estimate_step(config, run, device).total / point["measured_seconds"] - 1
        if abs(memory) > 0.05 or abs(time) > 0.15:
            errors[point["name"]] = f"memory {memory:+.1%}, time {time:+.1%}"
    assert not errors


def test_the_last_norm_s_backward_pass_holds_seven_wide_tensors() -> None:
    """The saved float32 input and product of the norm, and five tensors of its backward pass."""
    config = _run({"vocab_size": 32}, micro_batch_size=4, global_batch_size=4, sequence_length=256)
    narrow = _with(config, precision="bf16", compile=False)
    run = resolve_execution(H100, narrow)
    stage = _Rank(narrow, run, stage_layer_kinds(config.model, 1, 256), 0)
    moments = {moment.moment: moment for moment in stage.moments()}
    kept = stage._kept(len(stage.kinds))
    states = 4 * 256 * config.model.hidden_size
    assert moments["backward pass of the last norm"].activations - kept == 7 * 4 * states
    assert moments["loss"].activations - kept == (2 + 2 * 4) * states


def test_an_mtp_layer_compiled_in_parts_saves_wide_norms() -> None:
    model = _run({"num_nextn_predict_layers": 1}).model
    whole = saved_bytes(model, "mtp", Execution(2, compiled=True))
    parts = saved_bytes(model, "mtp", Execution(2, compiled=True, compiled_in_parts=True))
    eager = 2 * (4 + 4) + 2 * 2 + 8  # bytes per channel: two norms, joined states, last norm
    statistics = 3 * 4  # of norms whose output is not kept
    assert parts - whole == (eager - 2 * (2 + 1 + 1)) * model.hidden_size - statistics
    for kind in ("dense", "moe"):
        assert saved_bytes(model, kind, Execution(2, True, compiled_in_parts=True)) == saved_bytes(
            model, kind, Execution(2, True)
        )


def test_measurements_differ_in_what_matters() -> None:
    configs = [config for _, config in _measured("planner_points_h200.json")[1]]
    assert {config.parallel.precision for config in configs} == {"bf16", "fp8", "fp32"}
    assert {config.parallel.recomputation for config in configs} == {"none", "full"}
    assert {config.data.mask_documents for config in configs} == {False, True}
    assert {config.training.optimizer.moments for config in configs} == {"bfloat16", "float32"}
    assert len({config.parallel.micro_batch_size * config.training.sequence_length for config in configs}) >= 4
    assert len({(config.model.hidden_size, config.model.num_hidden_layers) for config in configs}) >= 6


def test_the_documentation_prints_the_measurements() -> None:
    page = (ROOT / "docs" / "measurements" / "planning.md").read_text(encoding="utf-8").splitlines()
    for file in POINTS:
        device, measurements = _measured(file)
        for point, config in measurements:
            run = resolve_execution(device, config)
            gib, seconds = estimate_memory(config, run).total / 2**30, estimate_step(config, run, device).total
            measured_gib, measured = point["measured_gib"], point["measured_seconds"]
            row = (
                f"| {point['name']} | {measured_gib:.2f} | {gib:.2f} | {gib / measured_gib - 1:+.1%} "
                f"| {measured * 1e3:.1f} | {seconds * 1e3:.1f} | {seconds / measured - 1:+.1%} |"
            )
            assert any(line.startswith(row) for line in page), row


def test_the_planner_s_chunks_are_those_of_the_loss() -> None:
    """Planning cannot import the loss, which needs torch."""
    assert {"gpu": chunked._CHUNK_LOGITS["cuda"], "cpu": chunked._CHUNK_LOGITS["cpu"]} == execution._LOGITS_AT_ONCE
    assert memory._MIN_CHUNK_TOKENS == chunked._LEAST_ROWS
