"""The comparison of FP8 with another precision: its statistics by hand, and a whole comparison of tiny runs."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from helpers import ROOT
from helpers.runs import run_fields, write_corpus

sys.path.insert(0, str(ROOT / "benchmarks"))
import typer
from fp8_loss import main
from loss_difference import compare, interval, relative_differences, table

from deepseek_v3.utils.errors import ConfigError


def test_an_interval_is_that_of_students_t() -> None:
    """Three values with mean 2 and deviation 1; t of 2 degrees of freedom is 4.3027 at 97.5%."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)


def result(losses: list[float], batches: list[float]) -> dict[str, Any]:
    curve = [[step, loss] for step, loss in enumerate(losses, start=1)]
    figures = {"tokens_per_second_median": 1.0, "seconds": 2.0}
    return {
        "train": curve,
        "held_out": curve[1:],
        "final_held_out": sum(batches) / len(batches),
        "final_held_out_in_the_other": 1.5 * sum(batches) / len(batches),
        "held_out_batches": batches,
        **figures,
    }


def test_differences_are_taken_within_pairs() -> None:
    results = {
        ("bf16", 0): result([4.0, 2.0], [2.0, 2.0]),
        ("fp8", 0): result([4.0, 2.002], [2.001, 2.003]),
        ("bf16", 1): result([5.0, 4.0], [4.0, 4.0]),
        ("fp8", 1): result([5.0, 4.0], [4.0, 4.0]),
    }
    found = compare(results, "bf16", "fp8")
    assert found["relative_difference_by_seed"] == pytest.approx([0.001, 0])
    assert found["relative_difference"] == pytest.approx(0.0005)
    assert found["relative_difference_of_running_alone"] == pytest.approx([0.5, 0.5])
    assert found["relative_difference_of_training_alone"] == pytest.approx([1.5 * 1.001 - 1, 0.5])
    assert found["difference_is_below_limit"]
    assert not found["interval_is_below_limit"]  # two seeds that differ by 0.1%: ± 12.7 × 0.05%
    low, high = found["relative_difference_of_batches_95"][0]
    assert (low + high) / 2 == pytest.approx(0.001)
    assert found["relative_difference_of_batches_95"][1] == [0, 0]
    assert found["baseline_seeds_range"] == pytest.approx(2 / 3)
    assert relative_differences(results, "bf16", "fp8") == {2: pytest.approx([0.001, 0])}
    assert table(results).splitlines()[:3] == [
        "step,seed,precision,train_loss,held_out_loss",
        "1,0,bf16,4.0,",
        "2,0,bf16,2.0,2.0",
    ]


def test_runs_are_compared_and_not_repeated(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=60)
    fields = run_fields(tmp_path, steps=4)
    fields["training"]["evaluation"]["interval_steps"] = 2
    fields["checkpoint"]["interval_steps"] = 0
    shape = tmp_path / "shape.yaml"
    shape.write_text(yaml.safe_dump(fields), encoding="utf-8")
    app = typer.Typer()
    app.command()(main)
    options = ["--folder", str(tmp_path / "work"), "--output", str(tmp_path / "out"), "--shape", str(shape)]
    options += ["--source", str(tmp_path / "text"), "--seeds", "0,1", "--baseline", "fp32", "--device", "cpu"]

    left = tmp_path / "work" / "checkpoints" / "checkpoint_step_1.pt"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a run that was interrupted")
    first = CliRunner().invoke(app, [*options, "--only-seeds", "0"])
    assert first.exception is None, first.output
    assert "fp32 with seed 1, fp8 with seed 1" in first.output
    (runs,) = (tmp_path / "work" / "runs").iterdir()
    kept = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert {path.name for path in kept} == {"fp32_seed0.json", "fp8_seed0.json"}

    second = CliRunner().invoke(app, options)
    assert second.exception is None, second.output
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    found = json.loads((tmp_path / "out" / "fp8_loss.json").read_text(encoding="utf-8"))["results"]
    before, after = found["held_out_losses"].values()
    assert before[0] != before[1]
    assert 0 < max(abs(a / b - 1) for a, b in zip(after, before, strict=True)) < 0.02
    alone = [found[f"relative_difference_of_{what}_alone"] for what in ("running", "training")]
    assert all(0 < abs(each) < 0.02 for values in alone for each in values)
    rows = list(csv.DictReader((tmp_path / "out" / "fp8_loss.csv").open(encoding="utf-8")))
    assert {(row["precision"], row["seed"]) for row in rows} == {(p, s) for p in ("fp32", "fp8") for s in "01"}
    assert (tmp_path / "out" / "fp8_loss.png").read_bytes().startswith(b"\x89PNG")
    assert CliRunner().invoke(app, [*options, "--merge"]).exception is None

    moved = runs / "fp8_seed1.json"
    run = json.loads(moved.read_text(encoding="utf-8"))
    run["environment"]["device"] = "another"
    moved.write_text(json.dumps(run), encoding="utf-8")
    merged = CliRunner().invoke(app, [*options, "--merge"])
    assert "another and " in str(merged.exception) or " and another" in str(merged.exception)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--seeds", "0,x", "--seeds 0,x: expected whole numbers with commas between them"),
        ("--seeds", "1,1", "--seeds 1,1: expected at least two seeds"),
        ("--only-seeds", "", "--only-seeds : expected whole numbers"),
        ("--precision", "fp9", "--precision fp9: expected bf16 or fp8"),
        ("--source", "nowhere", "--source nowhere: expected a folder with files of text"),
        ("--shape", "nowhere.yaml", "nowhere.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_corpus(tmp_path / "text", documents=60)  # some mistakes are found after all is tokenized
    app = typer.Typer()
    app.command()(main)
    found = CliRunner().invoke(app, ["--device", "cpu", "--source", str(source), option, value])
    assert isinstance(found.exception, ConfigError), found.output
    assert str(found.exception).startswith(expected)
