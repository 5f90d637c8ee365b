"""Which layers compute in FP8: by their widths, and with `auto` by the table of measured speeds."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.planning import fp8_choice
from deepseek_v3.training.parallel import fp8_layers
from deepseek_v3.training.parallel.fp8_layers import compute_in_fp8, has_fp8
from deepseek_v3.utils.errors import ConfigError
from helpers.parallel_runs import run_config

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 144, "v_head_dim": 16}
EXPERTS, NETWORK = "mlp.experts 64×144", "mlp 64×128"
PROJECTIONS = "self_attn.q_a_proj 64×16, self_attn.o_proj 32×64"


def model_of(precision: str, **parallel: Any) -> tuple[DeepSeekV3, RunConfig]:
    config = run_config(1, {"precision": precision, **parallel}, {}, {"num_hidden_layers": 2, **WIDTHS})
    with torch.device("meta"):
        return DeepSeekV3(config.model), config


def log_of(precision: str, caplog: pytest.LogCaptureFixture, device: torch.device = CPU) -> str:
    """What is logged for a model; empty if no layer computes in FP8."""
    model, config = model_of(precision)
    with caplog.at_level(logging.INFO, logger="deepseek_v3"):
        compute_in_fp8(model, config, device, reshards_weights=False)
    text = "\n".join(caplog.messages)
    assert has_fp8(model) == ("layers in FP8" in text)
    return text


def write_table(path: Path, monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")
    speeds = tuple(fp8_choice.measured_speeds(path))
    monkeypatch.setattr(fp8_choice, "shipped_speeds", lambda: speeds)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_precisions_have_no_layer_in_fp8(precision: str, caplog: pytest.LogCaptureFixture) -> None:
    assert log_of(precision, caplog) == ""


def test_layers_are_named_with_the_reasons_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    chosen, *others = log_of("fp8", caplog).splitlines()[1:]
    assert chosen == f"layers in FP8: {PROJECTIONS}, {NETWORK}, {EXPERTS}"
    hidden, widths = sorted(others)
    assert hidden == "not in FP8, a hidden width that is no multiple of 128: mlp.shared_experts 64×144"
    assert widths.startswith("not in FP8, widths that are no multiples of 16: self_attn.q_b_proj 16×24")


@pytest.mark.parametrize(
    ("row", "is_chosen"),
    [
        ({}, True),
        ({"device": "NVIDIA"}, False),
        ({"rows": 9}, False),  # each of 32 tokens chooses 2 of 8 experts: 8 rows for each
        ({"width": 65}, False),
        ({"kind": "projection", "rows": 33}, False),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(
    row: dict[str, Any],
    is_chosen: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fp8_layers, "_name_of", lambda _: "A test device")
    measured = {"device": "A test", "kind": "experts", "rows": 8, "width": 64}
    write_table(tmp_path / "table.json", monkeypatch, measured | row)
    text = log_of("auto", caplog)
    assert (f"layers in FP8: {EXPERTS}\n" in text) == is_chosen
    others = f"not in FP8, not measured to be faster in FP8 on A test device: {PROJECTIONS}, {NETWORK}\n"
    assert (others in text) == is_chosen


def test_auto_says_why_it_takes_no_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    write_table(tmp_path / "table.json", monkeypatch)
    text = log_of("auto", caplog, CUDA)
    assert text.startswith("no layer in FP8: ")
    assert "not measured to be faster in FP8 on NVIDIA H100" in text


def test_experts_have_the_rows_of_all_ranks() -> None:
    """Twice the tokens go to each expert if two ranks hold half of the experts each."""
    for expert, rows in ((1, 8), (2, 16)):
        model, config = model_of("fp8", data_shard=2, expert=expert)
        layers = fp8_layers.fp8_layers(model, config)
        found = {layer.size.rows for layer in layers if layer.size.kind == "experts"}
        assert found == {rows}


def test_a_gpu_without_kernels_is_refused_by_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    model, config = model_of("fp8")
    with pytest.raises(ConfigError, match=r"parallel.precision = fp8: .*use --set parallel.precision=bf16"):
        compute_in_fp8(model, config, CUDA, reshards_weights=False)
    write_table(
        tmp_path / "table.json", monkeypatch, {"device": "NVIDIA", "kind": "experts", "rows": 1, "width": 1}
    )
    assert "no layer in FP8: " in log_of("auto", caplog, CUDA)


def test_the_reference_is_not_compiled() -> None:
    """Its compiled code may have no gradients. `auto` takes FP8 on no CPU, and leaves the choice to the experts."""
    model, config = model_of("fp8", compile=True)
    with pytest.raises(ConfigError, match=r"parallel.compile = true: FP8 .*use --set parallel.compile=auto"):
        compute_in_fp8(model, config, CPU, reshards_weights=False)
    assert not has_fp8(model)
    model, config = model_of("auto", compile=True)
    compute_in_fp8(model, config, CPU, reshards_weights=False)


def test_a_model_in_fp8_can_be_copied() -> None:
    model, config = model_of("fp8")
    compute_in_fp8(model, config, CPU, reshards_weights=False)
    assert has_fp8(copy.deepcopy(model))
