"""Estimated activation memory of a layer, compared with the storages that autograd and the compiler hold."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.mla.attention import AttentionMetadata
from deepseek_v3.mla.rotary import rotary_tables
from deepseek_v3.model.block import DecoderLayer
from deepseek_v3.model.mtp import MTPLayer
from deepseek_v3.moe.experts import FeedForward, RoutedExperts
from deepseek_v3.ops.fp8 import FP8_QUANTIZE
from deepseek_v3.ops.fp8.linear import Fp8Recipe
from deepseek_v3.ops.fp8_gemm import FP8_GEMM
from deepseek_v3.ops.layers import Linear
from deepseek_v3.ops.operation import Target
from deepseek_v3.planning.activations import saved_bytes
from deepseek_v3.planning.execution import FP8_WEIGHT, Execution, LayerKind
from deepseek_v3.training.parallel.fp8_layers import _set_products
from helpers.fp8_choices import EVERY_LAYER, NETWORKS, PROJECTIONS
from helpers.models import fill_with_noise, small_config

# Saved tensors of compiled layers, in autograd's order, as "shape type", and what allocated memory grew by.
RECORD = json.loads((Path(__file__).parent / "compiled_saved_tensors.json").read_text(encoding="utf-8"))
LAYERS = [(point, layer) for point in RECORD["points"] for layer in point["layers"]]

BLOCK_BYTES = 1 + 4 / 128  # of a number in FP8, with its share of a scale
KINDS: tuple[LayerKind, ...] = ("dense", "moe", "mtp")
SHAPES: dict[str, dict[str, Any]] = {
    "query rank, narrow values": {},
    "no query rank, two shared experts": {"q_lora_rank": None, "n_shared_experts": 2},
    "values as wide as keys": {"v_head_dim": 18},
    "wide, many heads, no query rank": {
        "hidden_size": 96,
        "intermediate_size": 352,
        "num_attention_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 48,
        "v_head_dim": 18,
        "n_shared_experts": 2,
        "moe_intermediate_size": 72,
    },
    "every expert for every token": {"topk_group": 4, "num_experts_per_tok": 8},
    "one expert per token, three shared": {"num_experts_per_tok": 1, "n_shared_experts": 3},
}
TOKENS = {"2 × 32": (2, 32), "1 × 7": (1, 7), "3 × 50": (3, 50)}


class _CastsOfParameters(TorchFunctionMode):
    """Records every copy of a parameter in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.to and isinstance(args[0], nn.Parameter) and result is not args[0]:
            self.copies.append(result)
        return result


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage of these tensors, by its address; each storage counts once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _layer(model: ModelConfig, kind: LayerKind) -> DecoderLayer:
    if kind == "mtp":
        return MTPLayer(model, model.num_hidden_layers)
    return DecoderLayer(model, 0 if kind == "dense" else model.first_k_dense_replace)


def _held(
    layer: DecoderLayer, model: ModelConfig, dtype: torch.dtype, batch: int, length: int
) -> tuple[float, int]:
    """Bytes per token of the activations that one layer on the CPU holds, and bytes of cast weights."""
    fill_with_noise(layer)
    positions_BS = torch.arange(length)[None]
    metadata = AttentionMetadata(positions_BS, *rotary_tables(positions_BS, model))
    inputs = [
        torch.randn(batch, length, model.hidden_size).to(dtype).requires_grad_()
        for _ in range(2 if isinstance(layer, MTPLayer) else 1)
    ]
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _CastsOfParameters() as casts:
        output, _ = layer(*inputs, metadata)
    given = _storages([*layer.parameters(), *inputs, *metadata[:3]])
    held = {place: size for place, size in _storages([*saved, output]).items() if place not in given}
    copies = {place: size for place, size in held.items() if place in _storages(casts.copies)}
    return (sum(held.values()) - sum(copies.values())) / (batch * length), sum(copies.values())


def _padding(model: ModelConfig, width: int) -> int:
    """What the CPU holds besides for values narrower than keys, in bytes per token.

    Its attention gets values padded to the keys' width, in place of those that lie in the expanded latent, and
    gives a padded output, held beside the one without padding.
    """
    if model.v_head_dim == model.qk_head_dim:
        return 0
    expanded = model.qk_nope_head_dim + model.v_head_dim
    return width * model.num_attention_heads * (model.qk_head_dim - expanded + model.qk_head_dim)


def _matrix_weights(model: ModelConfig, kind: LayerKind) -> int:
    """Number of weights that are cast to the dtype of activations: all matrices except the router's."""
    with torch.device("meta"):
        layer = _layer(model, kind)
    return sum(p.numel() for name, p in layer.named_parameters() if p.ndim >= 2 and name != "mlp.gate.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_eager_layers_save_the_estimated_bytes(
    changes: dict[str, Any], kind: LayerKind, tokens: tuple[int, int], dtype: torch.dtype
) -> None:
    model = small_config(**changes)
    found, copies = _held(_layer(model, kind), model, dtype, *tokens)
    expected = saved_bytes(model, kind, Execution(dtype.itemsize, compiled=False)) + _padding(model, dtype.itemsize)
    assert expected == pytest.approx(found, rel=0.006)
    assert copies == (2 * _matrix_weights(model, kind) if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_without_shared_experts_the_estimate_is_an_upper_bound(dtype: torch.dtype) -> None:
    model = small_config(n_shared_experts=0)
    found, _ = _held(_layer(model, "moe"), model, dtype, 2, 32)
    expected = saved_bytes(model, "moe", Execution(dtype.itemsize, compiled=False))
    assert 0.998 * found <= expected + _padding(model, dtype.itemsize) <= 1.03 * found


def _model(point: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(point["model"])


def _name(value: dict[str, Any]) -> str:
    return value["name"] if "name" in value else value["kind"]


def _tensors(layer: dict[str, Any]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the tensors that the layer saved, without parameters."""
    lines = [line.split() for line in layer["saved"] if not line.endswith(" parameter")]
    return [
        (() if shape == "scalar" else tuple(map(int, shape.split("x"))), getattr(torch, dtype))
        for shape, dtype in lines
    ]


def _observed(point: dict[str, Any], layer: dict[str, Any]) -> tuple[float, int, int]:
    """Bytes of activations with the layer's output, bytes of cast weights, and tokens, of a recorded layer.

    Left out are the layer's inputs and the rotary tables, which all layers share. The latent before its norm is
    part of a larger storage, which counts whole: of the projection that also holds the rotary key.
    """
    model, tensors = _model(point), _tensors(layer)
    batch, length, width = next(shape for shape, dtype in tensors if len(shape) == 3 and dtype == torch.bfloat16)
    tokens = batch * length
    widened = {(batch, length, model.kv_lora_rank): (batch, length, model.kv_lora_rank + model.qk_rope_head_dim)}
    inputs = 2 if layer["kind"] == "mtp" else 1
    activations = tokens * width * 2.0
    weights = 0
    for shape, dtype in tensors:
        if shape == (batch, length, width) and inputs:
            inputs -= 1
        elif shape[:1] == (1,):
            assert shape == (1, length, model.qk_rope_head_dim // 2)
        elif dtype == torch.bfloat16 and shape[0] not in (batch, tokens, tokens * model.num_experts_per_tok):
            weights += math.prod(shape) * dtype.itemsize
        else:
            activations += math.prod(widened.pop(shape, shape)) * dtype.itemsize
    assert not widened
    return activations, weights, tokens


@pytest.mark.parametrize(("point", "layer"), [at for at in LAYERS if at[0]["precision"] == "bf16"], ids=_name)
def test_compiled_layers_save_the_estimated_bytes(point: dict[str, Any], layer: dict[str, Any]) -> None:
    model, kind = _model(point), layer["kind"]
    activations, weights, tokens = _observed(point, layer)
    expected = saved_bytes(model, kind, Execution(2, compiled=True)) * tokens
    assert weights == 2 * _matrix_weights(model, kind)
    assert expected == pytest.approx(activations, rel=0.0005)


@pytest.mark.parametrize(("point", "layer"), LAYERS, ids=_name)
def test_allocated_memory_grew_by_the_estimate(point: dict[str, Any], layer: dict[str, Any]) -> None:
    model, kind, precision = _model(point), layer["kind"], point["precision"]
    tokens = point["sequences"] * (point["sequence_length"] - (kind == "mtp"))
    is_compiled = precision != "fp32"
    run = Execution(
        2 if is_compiled else 4,
        is_compiled,
        has_kernels=True,
        fp8=EVERY_LAYER if precision == "fp8" else frozenset(),
    )
    matrices, joining = _matrix_weights(model, kind), 2 * model.hidden_size**2 if kind == "mtp" else 0
    in_fp8 = FP8_WEIGHT * (matrices - joining) + 2 * joining
    weights = {"fp32": 0, "bf16": 2 * matrices, "fp8": in_fp8}[precision]
    estimate = saved_bytes(model, kind, run) * tokens + weights
    assert estimate == pytest.approx(layer["allocated_mib"] * 2**20, rel=0.003)


def test_the_record_covers_every_kind_and_both_attentions() -> None:
    assert {point["precision"] for point, _ in LAYERS} == {"bf16", "fp8", "fp32"}
    for precision in ("bf16", "fp8"):
        layers = [(point, layer) for point, layer in LAYERS if point["precision"] == precision]
        assert {layer["kind"] for _, layer in layers} == set(KINDS)
        assert {bool(point["model"].get("q_lora_rank")) for point, _ in layers} == {True, False}
    assert RECORD["device"]
    assert RECORD["versions"]["torch"]


# Layers in FP8: all, those of a run whose feed-forward parts alone are wide enough, and others.
CHOICES = {
    "every layer": EVERY_LAYER,
    "networks": NETWORKS,
    "routed experts, queries and output": frozenset(
        ("mlp.experts", "self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.o_proj")
    ),
    "latent": frozenset(("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("q_lora_rank", [128, None])
@pytest.mark.parametrize("in_fp8", CHOICES.values(), ids=CHOICES)
def test_eager_fp8_layers_save_the_estimated_bytes(
    kind: LayerKind, q_lora_rank: int | None, in_fp8: frozenset[str]
) -> None:
    """All widths are multiples of 128, so that no block is partly empty."""
    heads = {"num_attention_heads": 8, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48}
    ranks = {"q_lora_rank": q_lora_rank, "kv_lora_rank": 128}
    model = small_config(hidden_size=256, intermediate_size=512, moe_intermediate_size=128, **heads, **ranks)
    layer, sizes = _layer(model, kind), (4, 128)
    target = Target(torch.device("cpu"), torch.bfloat16)
    recipe = Fp8Recipe(FP8_QUANTIZE.select(target).run, FP8_GEMM.select(target).run)
    chosen = {
        name: module
        for name, module in layer.named_modules()
        if name in in_fp8 and isinstance(module, (Linear, FeedForward, RoutedExperts))
    }
    for name, module in chosen.items():
        _set_products(name, module, recipe)
    weights = sum(parameter.numel() for module in chosen.values() for parameter in module.parameters())
    found, copies = _held(layer, model, torch.bfloat16, *sizes)
    assert copies == 2 * (_matrix_weights(model, kind) - weights)
    expected = saved_bytes(model, kind, Execution(2, compiled=False, fp8=in_fp8))
    expected += FP8_WEIGHT * weights / math.prod(sizes)
    assert expected == pytest.approx(found, rel=0.002)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_replaces_inputs_of_linear_layers_and_rows(kind: LayerKind, compiled: bool) -> None:
    """The difference from bfloat16, tensor by tensor."""
    model = small_config()
    block, width, hidden = 1 + 4 / 128, model.hidden_size, model.moe_intermediate_size
    linear = width + model.q_lora_rank + model.kv_lora_rank
    twice = 0 if compiled else block * width  # the input of attention, by each of two projections
    network = 6 if compiled else 14  # bytes of one inner number: gate, up, product; eager also the activated gate
    expected = (block - 2) * linear + twice
    if kind == "dense":
        expected += block * (width + 2 * model.intermediate_size) - network * model.intermediate_size - 2 * width
    else:
        rows, shared = model.num_experts_per_tok, model.n_shared_experts * hidden
        expected += block * (width + 2 * shared) - network * shared
        expected += rows * (4 + block * 2 * hidden - 2 * width - (6 if compiled else 18) * hidden)
        expected += rows * (8 - 4 if compiled else 0)  # the tokens of the rows, and no second copy of the gates
    narrow, fp8 = (saved_bytes(model, kind, Execution(2, compiled, fp8=fp8)) for fp8 in (frozenset(), EVERY_LAYER))
    assert fp8 - narrow == pytest.approx(expected)


@pytest.mark.parametrize(
    ("names", "bytes_more"),
    [
        # Queries in FP8 save the attention's input in FP8, and the latent still saves it in bfloat16.
        (("q_a_proj",), {"hidden_size": BLOCK_BYTES}),
        (("q_a_proj", "kv_a_proj_with_mqa"), {"hidden_size": BLOCK_BYTES - 2}),
        (("q_b_proj", "kv_b_proj"), {"q_lora_rank": BLOCK_BYTES - 2, "kv_lora_rank": BLOCK_BYTES - 2}),
        (("o_proj",), {}),  # attention itself keeps its output
    ],
)
def test_compiled_projections_in_fp8_save_their_own_inputs(
    names: tuple[str, ...], bytes_more: dict[str, float]
) -> None:
    """The difference from bfloat16 by hand, in bytes of each number of a width."""
    model = small_config()
    in_fp8 = frozenset(f"self_attn.{name}" for name in names)
    narrow, mixed = (saved_bytes(model, "moe", Execution(2, True, fp8=fp8)) for fp8 in (frozenset(), in_fp8))
    expected = sum(getattr(model, width) * number for width, number in bytes_more.items())
    assert mixed - narrow == pytest.approx(expected)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_fp8_saves_add_up_over_the_layers(kind: LayerKind, compiled: bool) -> None:
    model = small_config()

    def difference(in_fp8: frozenset[str]) -> float:
        narrow, mixed = (saved_bytes(model, kind, Execution(2, compiled, fp8=fp8)) for fp8 in (frozenset(), in_fp8))
        return mixed - narrow

    each = [difference(frozenset((name,))) for name in NETWORKS]
    assert sum(each) + difference(PROJECTIONS) == pytest.approx(difference(EVERY_LAYER))
    assert sum(change != 0 for change in each) == (1 if kind == "dense" else 2)


def test_experts_of_several_ranks_save_the_tokens_received() -> None:
    model = small_config()
    one, several = (
        saved_bytes(model, "moe", Execution(2, True, fp8=EVERY_LAYER, received_bytes=n)) for n in (0.0, 3.5)
    )
    assert several - one == 3.5 * model.hidden_size


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_uneven_experts_count_in_proportion(compiled: bool) -> None:
    model = small_config()
    even, uneven = (saved_bytes(model, "moe", Execution(2, compiled, factor)) for factor in (1.0, 1.5))
    none = saved_bytes(model, "moe", Execution(2, compiled, 0.0))
    assert uneven - none == pytest.approx(1.5 * (even - none))
    assert saved_bytes(model, "dense", Execution(2, compiled, 1.5)) == saved_bytes(
        model, "dense", Execution(2, compiled)
    )
