"""Plans of sizes against the models they are made of, and recommendations against what was asked for."""

import math
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.advice.advisor import Advice, advise, launch_command
from deepseek_v3.planning.advice.request import PlanRequest
from deepseek_v3.planning.advice.size_plan import SizePlan, plan_size
from deepseek_v3.planning.counts import count_active_parameters, count_parameters
from deepseek_v3.planning.flops import training_flops_per_token
from deepseek_v3.planning.hardware import Device, find_device
from deepseek_v3.planning.layout_search import (
    MAX_DEVICES,
    estimate_layout,
    fastest_layout,
    fits_on,
    min_memory_layout,
)
from deepseek_v3.planning.scaling_laws import expected_loss
from deepseek_v3.planning.token_budget import budget_in_tokens, planned_steps, planned_tokens
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT
from helpers.runs import SEQUENCE_LENGTH, run_fields

SIZES = "tiny 1b 5b 10b 15b 20b base".split()
PATHS = {size: ROOT / "configs" / f"deepseek_v3_{size}.yaml" for size in SIZES}


def _device(name: str = "H100", **changes: Any) -> Device:
    device = find_device(name)
    assert device
    return device.model_copy(update=changes)


@cache
def _config(size: str) -> RunConfig:
    return load_config(PATHS[size])


@cache
def _advice(devices: int = 8, name: str = "H100", **limits: Any) -> Advice:
    request = PlanRequest(_device(name), devices, **limits)
    return advise(request, {PATHS[size]: _config(size) for size in SIZES})


def _rows(advice: Advice) -> dict[str, SizePlan]:
    return {row.name: row for row in advice.rows}


def _plan(size: str, device: Device, devices: int, **limits: Any) -> SizePlan:
    return plan_size(PATHS[size], _config(size), PlanRequest(device, devices, **limits))


def _small(folder: Path, total_tokens: object, **training: object) -> tuple[Path, RunConfig]:
    """A run that is planned quickly, with a vocabulary large enough to have an expected loss."""
    fields = run_fields(folder)
    fields["model"]["vocab_size"] = 50_000
    fields["training"] |= {"total_tokens": total_tokens, **training}
    path = folder / "deepseek_v3_small.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path, load_config(path)


@pytest.mark.parametrize("limits", [{}, {"budget_hours": 72.0}, {"objective": "fastest"}])
def test_a_plan_adds_up(limits: dict[str, Any]) -> None:
    advice = _advice(**limits)
    assert [row.name for row in advice.rows] == SIZES
    for row in advice.rows:
        if row.layout is None:
            assert row.cost is None
            continue
        assert row.cost
        training, devices = row.config.training, row.layout.devices
        assert row.cost.hours == pytest.approx(row.steps * row.layout.step.total / 3600)
        assert row.cost.device_hours == pytest.approx(row.cost.hours * devices)
        assert row.cost.dollars == pytest.approx(row.cost.device_hours * _device().dollars_per_hour)
        batch = training.global_batch_size * training.sequence_length
        assert row.steps == math.ceil(row.tokens / batch)
        per_second = training_flops_per_token(row.config.model, training.sequence_length) * batch
        per_second /= row.layout.step.total
        assert row.cost.mfu == pytest.approx(per_second / (devices * 989e12))
        assert 0 < row.cost.mfu < 1
        assert row.compute == pytest.approx(6 * count_active_parameters(row.config.model) * row.tokens)
        assert row.ratio == pytest.approx(row.tokens / count_active_parameters(row.config.model))
        assert sum(row.memory_parts.values()) == pytest.approx(row.needed_bytes)


def test_a_plan_is_of_the_config_that_it_names() -> None:
    for row in _advice(budget_hours=72.0).rows:
        assert row.given == load_config(row.path)
        assert row.config.model == row.given.model
        if row.layout:
            measured = estimate_layout(row.config, _device())
            assert row.layout.config == row.config
            assert row.needed_bytes == measured.needed_bytes
            assert row.layout.step == measured.step


def test_a_size_has_a_layout_or_says_how_many_devices_fit() -> None:
    device = _device()
    for row in _advice().rows:
        if row.layout:
            assert row.needed_bytes <= device.memory_bytes
            assert row.fits
            continue
        assert row.needed_bytes == min_memory_layout(row.given, device, 8).needed_bytes > device.memory_bytes
        [shortage] = row.shortages
        assert (shortage.limit, shortage.available) == ("devices", 8)
        assert shortage.needed
        enough = int(shortage.needed)
        assert fastest_layout(row.given, device, enough)
        assert enough == 16 or fastest_layout(row.given, device, enough // 2) is None
        assert f"needs {row.needed_bytes / 2**30:,.1f} GiB on each of 8 × H100, which has 79.2" in shortage.reason
        assert f"fits from {enough:,} on" in shortage.reason


def test_a_size_too_large_for_any_number_of_devices() -> None:
    plan = _plan("1b", _device(memory_gib=0.5), 2)
    [shortage] = plan.shortages
    assert shortage.needed is None
    assert not fits_on(_config("1b"), _device(memory_gib=0.5), 4096)
    assert "does not fit on 4,096 either" in shortage.reason


def test_losses_follow_the_law_except_for_small_vocabularies() -> None:
    for row in _advice(budget_hours=72.0).rows:
        assert (row.loss is None) == (row.name == "tiny")
        if row.loss:
            assert row.loss == expected_loss(row.config.model, row.tokens)


def test_without_limits_the_file_s_own_budget_is_planned() -> None:
    for row in _advice().rows:
        assert row.config.training == row.given.training
        assert row.ratio == 20


def test_limits_allow_20_to_26_tokens_per_active_parameter() -> None:
    ratios = set()
    for hours in (0.1, 1.0, 50.0, 60.0, 1000.0):
        for row in _advice(budget_hours=hours).rows:
            if not row.layout or not row.cost:
                continue
            ratios.add(round(row.ratio, 1))
            assert 20 <= row.ratio <= 26
            assert row.fits == (row.cost.hours <= hours * (1 + 1e-9))
            one_more_step = (row.steps + 1) * row.layout.step.total / 3600
            assert row.ratio in (20, 26) or one_more_step > hours
    assert {20.0, 26.0} < ratios


def test_the_corpus_size_limits_the_budget() -> None:
    rows = _rows(_advice(tokens=4_000_000_000))
    assert rows["1b"].tokens == 4_000_000_000
    assert rows["tiny"].ratio == 26
    [shortage] = rows["5b"].shortages
    assert shortage.reason == "needs 35.79B tokens, the corpus has 4.00B"
    assert (shortage.limit, shortage.needed, shortage.available) == ("tokens", 35_790_428_160, 4_000_000_000)
    assert not rows["base"].fits
    assert [shortage.limit for shortage in rows["base"].shortages] == ["devices", "tokens"]


def test_the_fastest_objective_trains_on_the_fewest_tokens() -> None:
    advice = _advice(objective="fastest", budget_hours=1000.0)
    assert all(row.ratio == 20 for row in advice.rows)
    serious = [row for row in advice.rows if row.fits and row.loss and row.cost]
    assert advice.recommended is min(serious, key=lambda row: row.cost.hours if row.cost else math.inf)
    assert advice.reason.startswith("the fastest to train of the ")


@pytest.mark.parametrize(
    ("total_tokens", "deliberate", "limits", "ratio"),
    [
        ("24x", False, {}, 24),
        ("24x", False, {"budget_hours": 1e6}, 26),
        ("24x", False, {"budget_hours": 1e6, "objective": "fastest"}, 20),
        ("30x", False, {}, 20),
        ("30x", True, {}, 30),
        ("30x", True, {"budget_hours": 1e6, "tokens": 10**12}, 30),
        ("30x", True, {"objective": "fastest"}, 30),
        ("2x", True, {}, 20),
    ],
)
def test_a_complying_or_deliberate_budget_is_kept(
    tmp_path: Path, total_tokens: str, deliberate: bool, limits: dict[str, Any], ratio: int
) -> None:
    path, config = _small(tmp_path, total_tokens, deliberate_overtraining=deliberate)
    plan = plan_size(path, config, PlanRequest(_device(), 1, **limits))
    assert plan.ratio == pytest.approx(ratio, abs=1e-3)


def test_a_batch_ramp_is_planned_within_budget_and_devices(tmp_path: Path) -> None:
    ramp = {"initial": 512, "fraction": 0.5}
    path, config = _small(tmp_path, "20x", batch_ramp=ramp, global_batch_size=1024)
    free = plan_size(path, config, PlanRequest(_device(), 8))
    assert free.layout
    assert free.layout.devices <= 8
    assert load_config(path, [f"parallel.{n}={v}" for n, v in free.config.parallel.model_dump().items()])
    assert free.cost
    full_steps = planned_tokens(free.config) / (1024 * SEQUENCE_LENGTH)
    assert free.cost.hours == pytest.approx(full_steps * free.layout.step.total / 3600)
    assert planned_steps(free.config) > full_steps
    tight = plan_size(path, config, PlanRequest(_device(), 8, budget_hours=1.1 * free.cost.hours))
    assert tight.fits
    assert 20 < tight.ratio < 26


@pytest.mark.parametrize("size", ["tiny", "1b", "5b", "15b"])
def test_more_devices_are_never_slower(size: str) -> None:
    plans = [_plan(size, _device(), 2**power) for power in range(9)]
    hours = [plan.cost.hours if plan.cost else math.inf for plan in plans]
    assert all(more <= fewer for fewer, more in pairwise(hours))
    assert all(plan.layout is None or plan.layout.devices <= 2**power for power, plan in enumerate(plans))


@pytest.mark.parametrize("size", ["1b", "10b"])
def test_more_memory_never_makes_a_size_slower_or_unfit(size: str) -> None:
    least = min_memory_layout(_config(size), _device(), 8).needed_bytes / 2**30
    plans = [_plan(size, _device(memory_gib=factor * least), 8) for factor in (0.99, 1.01, 2, 4, 8, 16)]
    hours = [plan.cost.hours if plan.cost else math.inf for plan in plans]
    assert all(larger <= smaller for smaller, larger in pairwise(hours))
    assert [plan.fits for plan in plans] == [False] + 5 * [True]


@pytest.mark.parametrize("limit", ["budget_hours", "budget_dollars"])
def test_a_lower_budget_recommends_no_costlier_size(limit: str) -> None:
    budgets = [0.001, 1.0, 20.0, 60.0, 100.0, 300.0, 1500.0, 2500.0]
    found = [_advice(**{limit: budget}).recommended for budget in budgets]
    costs = [row.cost.dollars if row and row.cost else 0 for row in found]
    losses = [row.loss.value if row and row.loss else math.inf for row in found]
    assert all(less <= more for less, more in pairwise(costs))
    assert all(less >= more for less, more in pairwise(losses))
    assert len(set(costs)) > 3
    if limit == "budget_dollars":
        assert all(cost <= budget * (1 + 1e-9) for cost, budget in zip(costs, budgets, strict=True))


def test_a_small_rent_budget_takes_fewer_devices() -> None:
    device = _device()
    all_of_them = _plan("5b", device, 512)
    assert all_of_them.layout
    assert all_of_them.cost
    budget = 0.8 * all_of_them.cost.dollars
    fewer = _plan("5b", device, 512, budget_dollars=budget)
    assert fewer.layout
    assert fewer.cost
    assert fewer.fits
    assert fewer.layout.devices < all_of_them.layout.devices
    assert fewer.cost.dollars <= budget
    assert fewer.cost.hours > all_of_them.cost.hours


def test_the_objectives() -> None:
    advice = _advice(budget_hours=72.0)
    fitting = [row for row in advice.rows if row.fits and row.loss]
    assert advice.recommended is min(fitting, key=lambda row: row.loss.value if row.loss else math.inf)
    assert advice.reason.startswith(f"the one with the lowest expected loss of the {len(fitting)} sizes")
    largest = _advice(budget_hours=72.0, objective="fit")
    assert largest.recommended is max(
        (row for row in largest.rows if row.fits), key=lambda row: count_parameters(row.config.model).total
    )
    assert largest.reason.startswith("the largest of the ")


def test_tiny_is_recommended_where_nothing_else_fits() -> None:
    sizes = {PATHS[size]: _config(size) for size in ("tiny", "1b", "5b")}
    for objective in ("best-loss", "fastest", "fit"):
        advice = advise(PlanRequest(_device("CPU"), 1, budget_hours=1.0, objective=objective), sizes)
        assert advice.recommended
        assert advice.recommended.name == "tiny"
        assert advice.reason.startswith("only tiny fits, which is only for trials; nearest is 1b: it takes ")
        unlimited = advise(PlanRequest(_device("CPU"), 1, objective=objective), sizes)
        assert unlimited.recommended
        assert unlimited.recommended.name == "tiny"
        assert "more than a year" in unlimited.reason
        patient = advise(PlanRequest(_device("CPU"), 1, budget_hours=1e5, objective=objective), sizes).recommended
        assert patient
        assert patient.name == "1b"


def test_nothing_fits_and_the_least_change_is_named() -> None:
    hours = _advice(budget_hours=1e-7)
    assert hours.recommended is None
    assert hours.reason.startswith("nothing fits; nearest is tiny: it takes ")
    assert hours.reason.endswith(" hours, the budget is 1e-07")
    tokens = _advice(tokens=1000)
    assert tokens.recommended is None
    assert tokens.reason == "nothing fits; nearest is tiny: it needs 4.53M tokens, the corpus has 1,000"
    request = PlanRequest(_device(), 1)
    memory = advise(request, {PATHS[size]: _config(size) for size in ("20b", "base")})
    assert memory.recommended is None
    assert memory.reason.startswith("nothing fits; nearest is 20b: it needs ")
    assert " on each of 1 × H100" in memory.reason


@pytest.mark.parametrize("devices", [1, 3, 7, 8, 24, 64, 500])
def test_the_command_starts_exactly_what_is_planned(monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.chdir(ROOT)
    advice = _advice(devices, budget_hours=100.0)
    assert advice.recommended
    for row in advice.rows:
        if row.layout is None:
            continue
        words = shlex.split(launch_command(row, devices_per_node=8))
        start, settings = words.index("--config"), words[words.index("--config") + 2 :]
        assert words[start - 1] == "src/training/train.py"
        assert settings[::2] == ["--set"] * (len(settings) // 2)
        assert load_config(words[start + 1], settings[1::2]) == row.config
        for setting in settings[1::2]:
            name, value = setting.split("=")
            section, field = name.split(".")
            assert str(getattr(getattr(row.given, section), field)) != value
        launcher = words[: start - 1]
        if row.layout.devices == 1:
            assert launcher == ["python"]
        else:
            options = dict(word.split("=") for word in launcher[1:])
            assert launcher[0] == "torchrun"
            assert int(options["--nproc_per_node"]) <= 8
            assert int(options["--nproc_per_node"]) * int(options.get("--nnodes", 1)) == row.layout.devices


def test_the_command_sets_only_what_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = _rows(_advice(1))["tiny"]
    monkeypatch.chdir(ROOT)
    assert launch_command(row, 8) == "python src/training/train.py --config tiny"
    monkeypatch.chdir(tmp_path)
    assert launch_command(row, 8).startswith(f"python {ROOT / 'src' / 'training' / 'train.py'} --config ")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"devices": 0}, "--gpus 0: expected at least 1"),
        ({"devices": -8}, "--gpus -8"),
        ({"budget_hours": 0.0}, "--budget-hours 0: expected a number above 0"),
        ({"budget_hours": math.nan}, "--budget-hours nan"),
        ({"budget_dollars": math.inf}, "--budget-dollars inf"),
        ({"budget_dollars": -1.0}, "--budget-dollars -1"),
        ({"tokens": 0}, "--tokens 0"),
        ({"objective": "cheapest"}, "--objective cheapest: expected best-loss, fastest, fit"),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        PlanRequest(**{"device": _device(), "devices": 1, **fields})


def test_free_devices_are_within_any_budget() -> None:
    plan = _plan("1b", _device(dollars_per_hour=0.0), 1, budget_dollars=0.01)
    assert plan.fits
    assert plan.cost
    assert plan.cost.dollars == 0
    assert plan.tokens == 26 * budget_in_tokens(_config("1b")) // 20


def test_a_plan_uses_no_more_devices_than_the_batch_allows() -> None:
    plan = _plan("1b", _device(), 10**9)
    assert plan.layout
    assert plan.layout.devices <= _config("1b").training.global_batch_size * 64
    assert plan.layout.devices <= MAX_DEVICES
