"""`dsv3 preprocess`, its script and the smoke test, as people type them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline_helpers import SHEET, write_lines
from run_helpers import dsv3, message_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": f"Text number {n}."} for n in range(5)] + [{"body": "x"}])
    fields = {"input_path": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "pipeline": SHEET}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_the_command_says_what_became_of_the_records(config: Path) -> None:
    result = dsv3("preprocess", "--config", str(config), "--set", "workers=1")
    assert result.exit_code == 0, result.output
    assert "6 records = " in result.output
    assert "1 quarantined" in result.output


def test_shards_then_merge(config: Path) -> None:
    assert "run again with --merge" in dsv3("preprocess", "--config", str(config), "--shard", "0/1").output
    assert "6 records = " in dsv3("preprocess", "--config", str(config), "--merge").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "1"], "--shard 1: expected I/N, such as 0/8"),
        (["--set", "pipeline=[cleaning]"], "pipeline"),
        (["--set", "pipeline=[pii,pii]"], "pii stands there twice"),
        (["--set", "pipeline=[mixing,pii]"], "mixing repeats documents, so it must be the last stage"),
        (["--set", "memory=lots"], "expected a size such as 4GB"),
        (["--set", "mixing.tokens=many"], "expected a whole number such as"),
        (["--set", "input_path=nowhere"], "nowhere"),
        (["--set", "ray_address=auto"], "needs engine: ray"),
        (["--set", "earlier=[x]", "--set", "pipeline=[pii]"], "needs exact_deduplication or deduplication"),
        (["--set", "deduplicaton.threshold=0.7"], "did you mean deduplication?"),
    ],
)
def test_a_mistake_is_one_line(config: Path, arguments: list[str], message: str) -> None:
    assert message in message_of(dsv3("preprocess", "--config", str(config), *arguments))


def test_the_script_ends_with_one_line_for_a_missing_config(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "preprocess_data.py"), "--config", str(tmp_path / "no.yaml")]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_smoke_test_passes() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "run_data_tests.py")]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(": yes") == 6
