"""The seven shipped configs match their names, their headers and docs/CONFIGURATIONS.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.planning.counts import (
    active_conventions,
    count_active_parameters,
    count_active_parts,
    count_parameters,
)
from deepseek_v3.planning.flops import flops_per_token, forward_flops, mtp_forward_flops
from deepseek_v3.planning.hardware import find_device
from deepseek_v3.planning.layout_search import estimate_layout
from deepseek_v3.training.schedule import TrainingSchedule
from helpers import ROOT

PAGE = (ROOT / "docs" / "CONFIGURATIONS.md").read_text(encoding="utf-8")
FIELDS = (ROOT / "docs" / "reference" / "config_fields.md").read_text(encoding="utf-8")

# Total parameters by name, and the recipe: active parameters and tokens in billions, sequences a step, steps.
SIZES: dict[str, tuple[float, float, float, int, int]] = {
    "1b": (1e9, 0.187, 3.75, 80, 11_444),
    "5b": (5e9, 1.79, 35.8, 256, 34_133),
    "10b": (10e9, 2.07, 41.4, 1024, 9_870),
    "15b": (15e9, 2.425, 48.5, 2048, 5_783),
    "20b": (20e9, 3.232, 64.6, 3072, 5_137),
    "base": (671.03e9, 36.63, 732.5, 4096, 43_662),
}
ALL = ["tiny", *SIZES]


def _path(size: str) -> Path:
    return ROOT / "configs" / f"deepseek_v3_{size}.yaml"


def _header(size: str) -> list[str]:
    lines = _path(size).read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def _law(config: RunConfig, factor: float, power: float) -> float:
    """A law of DeepSeek LLM (arXiv:2401.02954, eq. 1) at this run's compute, 6 × active × tokens."""
    return factor * (6 * count_active_parameters(config.model) * TrainingSchedule(config).total_tokens) ** power


def test_the_table_lists_all_devices() -> None:
    shipped = {path.stem.removeprefix("deepseek_v3_") for path in (ROOT / "configs").glob("deepseek_v3_*.yaml")}
    assert shipped == set(ALL)


@pytest.mark.parametrize("size", ALL)
def test_the_header_states_the_counts_and_the_budget(size: str) -> None:
    config = load_config(_path(size))
    counts, plan = count_parameters(config.model), TrainingSchedule(config)
    active, step = count_active_parameters(config.model), plan.tokens_after(1)
    assert config.model.num_nextn_predict_layers == 1
    assert _header(size)[-2:] == [
        f"# Parameters: {counts.total:,} in all, {active:,} active, {counts.prediction:,} more for one MTP layer",
        f"# Budget: {plan.total_tokens:,} tokens ({plan.total_tokens / active:g} per active parameter) "
        f"in {plan.total_steps:,} steps of {step:,} tokens",
    ]


@pytest.mark.parametrize("size", SIZES)
def test_size_and_recipe(size: str) -> None:
    total, active, tokens, batch, steps = SIZES[size]
    config = load_config(_path(size))
    plan = TrainingSchedule(config)
    assert count_parameters(config.model).total == pytest.approx(total, rel=1e-5 if size == "base" else 0.05)
    assert count_active_parameters(config.model) == pytest.approx(active * 1e9, rel=5e-3)
    assert plan.total_tokens == 20 * count_active_parameters(config.model) == pytest.approx(tokens * 1e9, rel=5e-3)
    assert (config.training.global_batch_size, config.training.sequence_length) == (batch, 4096)
    assert plan.total_steps == pytest.approx(steps, rel=5e-3)


@pytest.mark.parametrize("size", SIZES)
def test_learning_rate_and_warmup_follow_the_law(size: str) -> None:
    config = load_config(_path(size))
    rate = config.training.optimizer.learning_rate
    assert rate == (pytest.approx(_law(config, 0.3118, -0.125), rel=0.03) if size != "base" else 2.2e-4)
    assert config.training.schedule.warmup_steps <= min(
        2000, 0.053 * TrainingSchedule(config).total_steps
    )  # 5%, rounded


# tiny is exempt: its widths suit a laptop and are never divided into FP8 or tensor-core tiles.
@pytest.mark.parametrize("size", SIZES)
def test_every_matrix_comes_in_blocks_of_128(size: str) -> None:
    config = load_config(_path(size)).model
    with torch.device("meta"):
        model = DeepSeekV3(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            continue
        rows, columns = parameter.shape[-2:]
        assert columns % 128 == 0, name
        if name.endswith("kv_a_proj_with_mqa.weight"):
            assert rows == config.kv_lora_rank + 64 == 576, name  # four and a half blocks, as published
        elif name.endswith("mlp.gate.weight"):
            assert rows == config.n_routed_experts, name  # one row per expert; never in FP8
        else:
            assert rows % 128 == 0, name


@pytest.mark.parametrize("size", ALL)
def test_experts_divide_by_eight_and_share_a_vocabulary(size: str) -> None:
    config = load_config(_path(size)).model
    assert config.n_routed_experts % 8 == 0
    assert config.vocab_size == (512 if size == "tiny" else 129_280)


def test_base_has_the_published_shape() -> None:
    published = {
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "intermediate_size": 18_432,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
    }
    assert load_config(_path("base")).model.model_dump(include=set(published)) == published


def test_the_header_of_base_gives_the_run_of_the_report() -> None:
    overrides = re.findall(r"--set (\S+)", " ".join(_header("base")))
    assert all(f"--set {override}" in PAGE for override in overrides)
    config = load_config(_path("base"), overrides)
    training, plan = config.training, TrainingSchedule(config)
    assert training.deliberate_overtraining
    assert plan.total_tokens == 14_800_000_000_000
    assert round(plan.total_tokens / count_active_parameters(config.model)) == 404
    assert plan.step(1).num_samples == 3072
    assert plan.step(plan.total_steps).num_samples == 15_360
    grown = next(n for n in range(1, plan.total_steps) if plan.step(n).num_samples == 15_360)
    assert plan.tokens_after(grown) == pytest.approx(469e9, rel=5e-3)
    assert f"in {plan.total_steps:,} steps" in PAGE


def _row(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"


def _shape(model: ModelConfig) -> tuple[object, ...]:
    return (
        f"{model.num_hidden_layers} ({model.first_k_dense_replace})",
        model.hidden_size,
        model.num_attention_heads,
        f"{model.q_lora_rank or '–'} / {model.kv_lora_rank}",
        f"{model.n_routed_experts} + {model.n_shared_experts}, {model.num_experts_per_tok}",
        f"{model.moe_intermediate_size} / {model.intermediate_size}",
    )


def shape_row(size: str, config: RunConfig) -> str:
    model = config.model
    total, active = count_parameters(model).total, count_active_parameters(model)
    return _row(size, *_shape(model), _billions(total), _billions(active), f"{active / total:.0%}")


def parts_row(size: str, config: RunConfig) -> str:
    counts, active = count_parameters(config.model), count_active_parts(config.model)
    parts = (
        counts.embedding,
        counts.head,
        counts.attention,
        counts.dense_ffn,
        counts.routed_experts,
        active.routed_experts,
        counts.shared_experts,
        counts.gates,
        counts.norms,
        counts.prediction,
        active.prediction,
    )
    return _row(size, *(f"{part / 1e6:,.2f}" for part in parts))


def recipe_row(size: str, config: RunConfig) -> str:
    plan, training = TrainingSchedule(config), config.training
    warmup = training.schedule.warmup_steps
    return _row(
        size,
        _billions(plan.total_tokens),
        f"{training.global_batch_size} × {training.sequence_length}",
        round(_law(config, 0.2920, 0.3271) / training.sequence_length),
        f"{plan.total_steps:,}",
        f"{training.optimizer.learning_rate:.1e}",
        f"{_law(config, 0.3118, -0.125):.2e}",
        f"{warmup} ({warmup / plan.total_steps:.1%})",
    )


def plan_row(size: str, config: RunConfig) -> str:
    device = find_device("CPU" if size == "tiny" else "H100")
    assert device is not None
    layout, parallel = estimate_layout(config, device), config.parallel
    return _row(
        size,
        f"{layout.devices:,} × {device.name}",
        f"{parallel.data_replicate} × {parallel.data_shard}",
        parallel.expert,
        parallel.pipeline,
        parallel.micro_batch_size,
        parallel.recomputation,
        f"{layout.needed_bytes / 2**30:.1f}",
        f"{layout.step.total:.2f}",
    )


def conventions_row(size: str, config: RunConfig) -> str:
    return _row(size, *(_billions(count) for count in active_conventions(config.model).values()))


def flops_row(size: str, config: RunConfig) -> str:
    model, length = config.model, config.training.sequence_length
    main, prediction = forward_flops(model, length), mtp_forward_flops(model, length)
    none, full = flops_per_token(model, length), flops_per_token(model, length, "full")
    operations = (
        main.attention_projections,
        main.attention_scores,
        main.dense_ffn,
        main.routed_experts,
        main.shared_experts,
        main.gates,
        main.head,
        prediction.total,
        none.forward,
        none.total,
        full.total,
    )
    return _row(size, *(f"{flops / 1e6:,.0f}" if flops >= 1e8 else f"{flops / 1e6:.3g}" for flops in operations))


# Active parameters, in billions, that the original sheet of sizes asked for.
SHEET = {"10b": 8.81, "15b": 15.81, "20b": 32.74, "base": 150.46}


def sheet_row(size: str) -> str:
    config = load_config(_path(size))
    total, active = count_parameters(config.model).total, count_active_parameters(config.model)
    return _row(
        size,
        _billions(total),
        f"{SHEET[size]:.2f}B",
        f"{SHEET[size] * 1e9 / total:.0%}",
        _billions(active),
        f"{active / total:.0%}",
        _billions(TrainingSchedule(config).total_tokens),
    )


@pytest.mark.parametrize("size", SHEET)
def test_the_page_sets_the_original_sheet_beside_the_configs(size: str) -> None:
    assert sheet_row(size) in PAGE.splitlines()


ROWS = [shape_row, parts_row, recipe_row, plan_row, conventions_row, flops_row]


@pytest.mark.parametrize("size", ALL)
@pytest.mark.parametrize("row", ROWS, ids=[row.__name__ for row in ROWS])
def test_the_page_states_what_the_code_computes(row: Any, size: str) -> None:
    assert row(size, load_config(_path(size))) in PAGE.splitlines()


def _public(
    layers: int,
    width: int,
    heads: int,
    q_rank: int | None,
    experts: tuple[int, int, int],
    widths: tuple[int, int],
    vocabulary: int,
    head_widths: tuple[int, int, int] = (128, 64, 128),
    tied: bool = False,
) -> ModelConfig:
    """A public model of the same parts; `experts` routed, shared, chosen; `widths` of experts, of dense layers."""
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        q_lora_rank=q_rank,
        kv_lora_rank=512,
        n_routed_experts=experts[0],
        n_shared_experts=experts[1],
        num_experts_per_tok=experts[2],
        moe_intermediate_size=widths[0],
        intermediate_size=widths[1],
        first_k_dense_replace=1,
        vocab_size=vocabulary,
        qk_nope_head_dim=head_widths[0],
        qk_rope_head_dim=head_widths[1],
        v_head_dim=head_widths[2],
        tie_word_embeddings=tied,
    )


NEIGHBOURS = {
    "OpenSeek-Small": _public(6, 1280, 10, None, (64, 2, 6), (896, 7168), 151_851, tied=True),
    "DeepSeek-V2-Lite": _public(27, 2048, 16, None, (64, 2, 6), (1408, 10_944), 102_400),
    "Moonlight": _public(27, 2048, 16, None, (64, 2, 6), (1408, 11_264), 163_840),
    "GLM-4.7-Flash": _public(47, 2048, 20, 768, (64, 1, 4), (1536, 10_240), 154_880, (192, 64, 256)),
    "JoyAI-Flash": _public(40, 2048, 32, 1536, (256, 1, 8), (768, 7168), 129_280),
    "DeepSeek-V2": _public(60, 5120, 128, 1536, (160, 2, 6), (1536, 12_288), 102_400),
}


def neighbour_row(name: str) -> str:
    """The row of a public model in the page, followed by the published figures."""
    model = NEIGHBOURS[name]
    counts = (count_parameters(model).total, *list(active_conventions(model).values())[:3])
    return _row(name, *_shape(model), model.vocab_size, *(_billions(count) for count in counts))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_the_page_counts_public_models_by_the_same_code(name: str) -> None:
    assert any(line.startswith(neighbour_row(name).removesuffix(" |")) for line in PAGE.splitlines())


def _fields(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every field below a section by its dotted path, with its default, or `required`."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = next(
            (kind for kind in (field.annotation, *_arguments(field.annotation)) if _is_section(kind)), None
        )
        default = field.get_default(call_default_factory=True)
        default = str(default) if isinstance(default, Path) else default
        default = list(default) if isinstance(default, tuple) else default  # as YAML writes it
        found[f"{prefix}{name}"] = "required" if field.is_required() else default
        if inner is not None:
            del found[f"{prefix}{name}"]
            found |= _fields(inner, f"{prefix}{name}.")
    return found


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _documented(section: str) -> dict[str, Any]:
    """The field reference: dotted paths below the section and their defaults, one for all or each."""
    found: dict[str, Any] = {}
    text = FIELDS.split(f"### `{section}`")[1].split("\n#")[0]
    for names, cell in re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", text, re.MULTILINE):
        fields, defaults = re.findall(r"`([^`]+)`", names), yaml.safe_load(f"[{cell}]")
        found |= zip(fields, defaults * len(fields) if len(defaults) == 1 else defaults, strict=True)
    return found


@pytest.mark.parametrize("section", RunConfig.model_fields)
def test_the_page_names_every_field_and_its_default(section: str) -> None:
    fields = _fields(RunConfig.model_fields[section].annotation)  # type: ignore[arg-type]
    documented = _documented(section)
    assert documented.keys() == fields.keys()
    for name, default in documented.items():
        assert fields[name] == (pytest.approx(default, rel=5e-3) if isinstance(default, float) else default), name
