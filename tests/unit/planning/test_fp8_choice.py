"""Which layers the planner has in FP8: those that the trainer builds in FP8, on the devices that are measured."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.experts import FeedForward
from deepseek_v3.ops.fp8 import BLOCK
from deepseek_v3.ops.layers import Linear
from deepseek_v3.planning import fp8_choice
from deepseek_v3.planning.execution import resolve_execution
from deepseek_v3.planning.fp8_choice import (
    LayerSize,
    MeasuredSpeed,
    describe_layers,
    has_all_in_fp8,
    layer_sizes,
    measured_speeds,
)
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.training.parallel.fp8_layers import _choose, fp8_layers
from helpers import ROOT
from helpers.fp8_choices import EVERY_LAYER, NETWORKS

SHIPPED = sorted((ROOT / "configs").glob("deepseek_v3_*.yaml"))
BASE, TINY = ROOT / "configs" / "deepseek_v3_base.yaml", ROOT / "configs" / "deepseek_v3_tiny.yaml"
LAYOUTS = [{"micro_batch_size": 1}, {"micro_batch_size": 16}, {"expert": 4, "data_replicate": 4}]


def _device(name: str) -> Device:
    device = find_device(name)
    assert device is not None
    return device


def _with(path: Path, **parallel: Any) -> RunConfig:
    one_device = {"data_replicate": 1, "data_shard": 1, "expert": 1, "pipeline": 1}
    settings = [f"parallel.{name}={value}" for name, value in {**one_device, **parallel}.items()]
    return load_config(path, [*settings, "training.global_batch_size=128", "training.batch_ramp=null"])


@cache
def _built(path: Path) -> DeepSeekV3:
    """One decoder layer of each kind is enough, because equal layers have equal names."""
    model = load_config(path).model
    few = {"num_hidden_layers": model.first_k_dense_replace + 1}
    with torch.device("meta"):
        return DeepSeekV3(model.model_copy(update=few))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_sizes_are_those_of_the_built_layers(path: Path) -> None:
    layers = list(fp8_layers(_built(path), _with(path)))
    assert {layer.name for layer in layers} == layer_sizes(_with(path)).keys()
    for layer in layers:
        if isinstance(layer.module, Linear):
            assert layer.size.widths == tuple(reversed(layer.module.weight.shape))
        elif isinstance(layer.module, FeedForward):
            assert layer.size.widths == tuple(layer.module.down_proj.weight.shape)
        else:
            assert layer.size.widths == tuple(layer.module.down_proj.shape[1:])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("precision", ["auto", "fp8", "bf16"])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_planner_has_in_fp8_what_the_trainer_builds(path: Path, precision: str, layout: dict[str, int]) -> None:
    config = _with(path, precision=precision, **layout)
    planned = resolve_execution(_device("H200"), config).fp8
    if precision == "bf16":
        assert not planned
    else:
        chosen, _ = _choose(list(fp8_layers(_built(path), config)), precision, "NVIDIA H200")
        assert planned == {layer.name for layer in chosen}


def test_auto_takes_the_wide_projections_of_the_published_model() -> None:
    """The latent has 512 numbers, the compressed queries 1536; each expert gets 128 of 4096 tokens."""
    planned = resolve_execution(_device("H200"), _with(BASE, precision="auto", micro_batch_size=1)).fp8
    wide = {f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "o_proj")}
    assert planned == wide | {"mlp", "mlp.shared_experts"}
    over_ranks = _with(BASE, precision="auto", micro_batch_size=1, data_replicate=8, expert=8)
    assert resolve_execution(_device("H200"), over_ranks).fp8 == planned | {"mlp.experts"}


def test_layers_with_an_obstacle_are_in_bf16() -> None:
    """The latent of the smallest config has 24 numbers, and its shared experts are 32 wide."""
    config = _with(TINY, precision="fp8")
    planned = resolve_execution(_device("H200"), config).fp8
    assert layer_sizes(config).keys() - planned == {"self_attn.kv_b_proj", "mlp.shared_experts"}
    assert not has_all_in_fp8(config, planned)
    assert has_all_in_fp8(config, frozenset(layer_sizes(config)))


@pytest.mark.parametrize(
    ("name", "is_measured"),
    [
        ("NVIDIA H200", True),
        ("NVIDIA H200 NVL", True),
        ("H200 of our cluster", True),
        ("H100", False),
        ("NVIDIA H100 80GB HBM3", False),
        ("B200", False),
        ("ours", False),
        ("A100", False),
        ("CPU", False),
    ],
)
def test_auto_has_fp8_on_measured_devices_only(name: str, is_measured: bool) -> None:
    device = (find_device(name) or _device("H200")).model_copy(update={"name": name})
    config = _with(BASE, precision="auto")
    assert bool(resolve_execution(device, config).fp8) == is_measured
    without = device.model_copy(update={"fp8_tflops": None})
    assert not resolve_execution(without, config).fp8


def test_a_name_of_the_driver_that_the_planner_shortens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the driver's names: a plan for the H100 takes the rows of its full name, others do not."""
    rows = (
        MeasuredSpeed("NVIDIA H100 80GB HBM3", "feed_forward", 1, 16),
        MeasuredSpeed("A card", "experts", 1, 16),
    )
    monkeypatch.setattr(fp8_choice, "shipped_speeds", lambda: rows)
    monkeypatch.setattr("deepseek_v3.planning.execution.shipped_speeds", lambda: rows)
    config = _with(BASE, precision="auto")
    assert resolve_execution(_device("H100"), config).fp8 == {"mlp", "mlp.shared_experts"}
    for other in ("H100 PCIe", "H200"):
        assert not resolve_execution(_device(other), config).fp8
    unknown = _device("H200").model_copy(update={"name": "A card of ours"})
    assert resolve_execution(unknown, config).fp8 == {"mlp.experts"}


def test_the_table_has_rows_of_known_kinds() -> None:
    assert {row.kind for row in measured_speeds()} <= {"projection", "feed_forward", "experts"}


def test_a_speed_covers_layers_of_its_kind_from_its_sizes_on() -> None:
    speed = MeasuredSpeed("NVIDIA H", "projection", rows=4096, width=1024)
    assert speed.covers(LayerSize("projection", 4096, (1024, 2048)), "NVIDIA H200")
    assert not speed.covers(LayerSize("projection", 4096, (1024, 2048)), "NVIDIA B200")
    assert not speed.covers(LayerSize("projection", 4095, (1024, 2048)), "NVIDIA H200")
    assert not speed.covers(LayerSize("projection", 4096, (2048, 1023)), "NVIDIA H200")
    assert not speed.covers(LayerSize("feed_forward", 4096, (1024, 2048)), "NVIDIA H200")


def test_the_planner_s_block_is_that_of_the_kernels() -> None:
    """Planning cannot import the kernels, which need torch."""
    assert fp8_choice._BLOCK == BLOCK


def test_layers_are_described_in_words() -> None:
    assert describe_layers(NETWORKS) == "dense networks, shared experts, routed experts"
    assert describe_layers(frozenset(("mlp.experts", "self_attn.o_proj"))) == "self_attn.o_proj, routed experts"
    assert describe_layers(EVERY_LAYER).startswith("self_attn.kv_a_proj_with_mqa, self_attn.kv_b_proj, ")
