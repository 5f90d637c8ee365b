"""The range of 20 to 26 tokens per active parameter, at its bounds and for the shipped sizes."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.chinchilla import Verdict, check_compliance, format_ratio
from deepseek_v3.planning.counts import count_active_parameters
from deepseek_v3.training.schedule import TrainingSchedule
from helpers import ROOT
from helpers.runs import run_fields

CONFIGS = sorted((ROOT / "configs").glob("deepseek_v3_*.yaml"))


def _run(**training: object) -> RunConfig:
    fields = run_fields(Path("run"))
    fields["training"].update(training)
    return RunConfig.model_validate(fields, strict=False)


ACTIVE = count_active_parameters(_run().model)


@pytest.mark.parametrize(
    ("tokens", "verdict", "verdict_when_marked"),
    [
        (1, Verdict.UNDERTRAINED, Verdict.UNDERTRAINED),
        (20 * ACTIVE - 1, Verdict.UNDERTRAINED, Verdict.UNDERTRAINED),
        ("19.999x", Verdict.UNDERTRAINED, Verdict.UNDERTRAINED),
        (20 * ACTIVE, Verdict.COMPLIES, Verdict.COMPLIES),
        ("20x", Verdict.COMPLIES, Verdict.COMPLIES),
        ("26x", Verdict.COMPLIES, Verdict.COMPLIES),
        (26 * ACTIVE, Verdict.COMPLIES, Verdict.COMPLIES),
        (26 * ACTIVE + 1, Verdict.OVERTRAINED, Verdict.DELIBERATELY_OVERTRAINED),
        ("404x", Verdict.OVERTRAINED, Verdict.DELIBERATELY_OVERTRAINED),
    ],
)
def test_verdicts(tokens: int | str, verdict: Verdict, verdict_when_marked: Verdict) -> None:
    assert check_compliance("run", _run(total_tokens=tokens)).verdict is verdict
    marked = check_compliance("run", _run(total_tokens=tokens, deliberate_overtraining=True))
    assert marked.verdict is verdict_when_marked


def test_undertrained_and_unmarked_overtrained_runs_fail() -> None:
    assert {verdict for verdict in Verdict if not verdict.accepted} == {Verdict.UNDERTRAINED, Verdict.OVERTRAINED}


@pytest.mark.parametrize("tokens", [1000, 20 * ACTIVE - 1, 26 * ACTIVE + 1, 10**12])
def test_the_reason_names_the_field_and_a_budget_that_complies(tokens: int) -> None:
    reason = check_compliance("run", _run(total_tokens=tokens)).reason
    assert f"training.total_tokens = {tokens:,}" in reason
    multiple, number = re.search(
        r"training\.total_tokens to (?:at most )?(\d+x) \(([\d,]+) tokens\)", reason
    ).groups()
    for advice in (multiple, int(number.replace(",", ""))):
        assert check_compliance("run", _run(total_tokens=advice)).verdict is Verdict.COMPLIES


def test_the_reason_mentions_deliberate_overtraining() -> None:
    reasons = {
        multiple: check_compliance("run", _run(total_tokens=multiple, deliberate_overtraining=True)).reason
        for multiple in ("5x", "20x", "404x")
    }
    assert "training.deliberate_overtraining has no effect" in reasons["5x"]
    assert "training.deliberate_overtraining is not needed" in reasons["20x"]
    assert "marked as deliberate" in reasons["404x"]
    unmarked = check_compliance("run", _run(total_tokens="404x")).reason
    assert "set training.deliberate_overtraining to true" in unmarked


def test_the_reason_gives_the_steps() -> None:
    constant = _run(total_tokens="20x", global_batch_size=6, sequence_length=50)
    steps = math.ceil(20 * ACTIVE / 300)
    assert f"{steps:,} steps of 300 tokens" in check_compliance("run", constant).reason
    ramp = _run(total_tokens="20x", global_batch_size=6, sequence_length=50, batch_ramp={"initial": 2})
    assert "steps of up to 300 tokens" in check_compliance("run", ramp).reason


@given(active=st.integers(1, 10**12), excess=st.integers(-(10**6), 10**6), bound=st.sampled_from([20, 26]))
def test_a_shown_ratio_equals_a_bound_only_if_it_is_one(active: int, excess: int, bound: int) -> None:
    tokens = max(0, bound * active + excess)
    shown = format_ratio(tokens, active)
    assert (float(shown) == bound) == (tokens == bound * active)
    assert float(shown) == pytest.approx(tokens / active, abs=0.051)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_sizes_comply_and_plan_the_real_steps(path: Path) -> None:
    config = load_config(path)
    result = check_compliance(path.stem, config)
    plan = TrainingSchedule(config)
    assert result.verdict is Verdict.COMPLIES
    assert 20 <= result.actual_ratio <= 26
    assert result.total_tokens == plan.total_tokens
    assert result.required_tokens == 20 * result.active_parameters <= result.total_tokens
    assert result.steps == plan.total_steps
    tokens_per_step = config.training.global_batch_size * config.training.sequence_length
    if config.training.batch_ramp is None:
        assert result.steps == math.ceil(result.total_tokens / tokens_per_step)


def test_seven_sizes_are_shipped() -> None:
    assert {path.stem.removeprefix("deepseek_v3_") for path in CONFIGS} >= set(
        "tiny 1b 5b 10b 15b 20b base".split()
    )
