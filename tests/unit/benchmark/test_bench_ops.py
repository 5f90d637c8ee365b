"""`dsv3 bench ops`: every back end is compared with its reference first, and one that is wrong has no time."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3.benchmark import ops_benchmark
from deepseek_v3.benchmark.ops_benchmark import OPERATIONS, measure_operations
from deepseek_v3.benchmark.ops_cases.case import Case, Prepared, Work, relative_error
from deepseek_v3.benchmark.ops_cases.deep_gemm import load_deep_gemm
from deepseek_v3.ops.moe_permute import MOE_PERMUTE, reference
from deepseek_v3.ops.operation import Backend
from helpers.runs import dsv3, message_of

CPU = torch.device("cpu")


class OffByOne:
    """A back end that forgets the last copy of every row."""

    def gather_rows(self, x_TD: Tensor, copies: Any) -> Tensor:
        return reference.gather_rows(x_TD, copies)

    def sum_rows(self, rows_XD: Tensor, slots_TM: Tensor) -> Tensor:
        return reference.sum_rows(rows_XD, slots_TM[:, :-1])


def test_every_operation_is_checked_and_timed(tmp_path: Path) -> None:
    output = tmp_path / "ops.json"
    result = dsv3("bench", "ops", "--device", "cpu", "--output", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text(encoding="utf-8"))
    assert {each["operation"] for each in found["operations"]} == set(OPERATIONS)
    for each in found["operations"]:
        assert each["failed"] is None
        assert 0 <= each["error"] <= each["bound"]
        assert each["seconds"] > 0
        assert each["floor_seconds"] > 0
    assert found["ceilings"]["copy_gb_per_s"] > 0
    assert "figures of a CPU" in result.output
    assert "dsv3 bench train" in result.output


def test_a_wrong_back_end_has_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Backend("faulty", OffByOne)
    monkeypatch.setattr(MOE_PERMUTE, "backends", {"faulty": faulty, **MOE_PERMUTE.backends})
    output = tmp_path / "ops.json"
    result = dsv3("bench", "ops", "--op", "moe_permute", "--device", "cpu", "--output", output)
    assert result.exit_code == 1
    message = message_of(result)
    assert message.startswith("no speed is shown for moe_permute sum_rows")
    assert "faulty: its relative error is" in message
    found = json.loads(output.read_text(encoding="utf-8"))["operations"]
    timed = {(each["function"], each["system"]): each["seconds"] is not None for each in found}
    assert timed == {
        ("gather_rows", "faulty"): True,
        ("gather_rows", "reference"): True,
        ("sum_rows", "faulty"): False,
        ("sum_rows", "reference"): True,
    }


def test_failures_of_peers_are_only_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: int) -> Sequence[Tensor]:
        raise RuntimeError("no kernel\nfor this device")

    def prepare(_: torch.device) -> Prepared:
        one = torch.ones(2)
        systems = {"ours": lambda _: [one], "DeepGEMM": broken, "F.scaled_mm": "not installed"}
        return Prepared(systems, lambda: [one], 0.0)

    case = Case("add", "forward", "2", Work(num_bytes=8.0), prepare)
    monkeypatch.setitem(ops_benchmark.OPERATIONS, "add", lambda _: iter([case]))
    result = measure_operations(["add"], CPU)
    assert result.problems == []
    assert [each.failed for each in result.measurements] == [
        None,
        "RuntimeError: no kernel for this device",
        "not installed",
    ]
    assert "F.scaled_mm: no figures: not installed" in result.explanations()


def test_a_case_that_cannot_be_prepared_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(_: torch.device) -> Prepared:
        raise torch.OutOfMemoryError("out of memory")

    case = Case("add", "forward", "2", Work(num_bytes=8.0), prepare)
    monkeypatch.setitem(ops_benchmark.OPERATIONS, "add", lambda _: iter([case]))
    assert measure_operations(["add"], CPU).problems == [
        "add forward 2, reference: OutOfMemoryError: out of memory"
    ]


def test_what_is_measured_outlives_a_stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: torch.device) -> Prepared:
        raise KeyboardInterrupt

    first = Case("add", "forward", "2", Work(num_bytes=8.0), lambda _: Prepared({}, lambda: [torch.ones(2)], 0.0))
    monkeypatch.setitem(ops_benchmark.OPERATIONS, "add", lambda _: iter([first, replace(first, prepare=stop)]))
    output = tmp_path / "ops.json"
    assert dsv3("bench", "ops", "--op", "add", "--device", "cpu", "--output", output).exit_code != 0
    assert json.loads(output.read_text(encoding="utf-8"))["ceilings"]["copy_gb_per_s"] > 0


def test_an_unknown_operation_is_refused() -> None:
    result = dsv3("bench", "ops", "--op", "softmax")
    assert result.exit_code == 1
    assert "--op softmax: expected grouped_gemm" in message_of(result)


@pytest.mark.parametrize("command", ["train", "ops", "decode"])
def test_every_command_has_help(command: str) -> None:
    result = dsv3("bench", command, "--help")
    assert result.exit_code == 0, result.output
    assert "--output" in result.output


def test_errors_are_relative() -> None:
    ones = torch.ones(64, 64)
    one_wrong = ones.clone()
    one_wrong[5, 5] = 2.0
    assert relative_error([ones], [ones.double()]) == 0
    assert relative_error([1.5 * ones], [ones]) == pytest.approx(0.5)
    assert relative_error([one_wrong], [ones]) == pytest.approx(1 / 20)  # of the norm only 1 / 64
    assert relative_error([torch.full((2,), torch.nan)], [torch.ones(2)]) == float("inf")
    assert relative_error([ones[:2]], [ones]) == float("inf")
    assert relative_error([torch.empty(0)], [torch.empty(0)]) == 0
    assert relative_error([ones, 1.1 * ones], [ones, ones]) == pytest.approx(0.1)


def test_a_missing_deep_gemm_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("deep_gemm", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert load_deep_gemm().startswith("not installed (")
    monkeypatch.setitem(sys.modules, "deep_gemm", math)
    assert load_deep_gemm() is math
