"""`dsv3 preprocess`, its script and the smoke test on the command line."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_v3.data.pipeline import resources, run, smoke_test
from helpers import ROOT
from helpers.pipeline import SHEET, write_lines
from helpers.runs import dsv3, message_of


@pytest.fixture
def config(tmp_path: Path) -> Path:
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": f"Text number {n}."} for n in range(5)] + [{"body": "x"}])
    fields = {"input_path": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "pipeline": SHEET}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def test_the_command_prints_the_counts_of_records(config: Path) -> None:
    result = dsv3("preprocess", "--config", str(config), "--set", "workers=1")
    assert result.exit_code == 0, result.output
    assert "6 records = " in result.output
    assert "1 quarantined" in result.output


def test_tokenize_is_not_suggested_if_nothing_is_kept(config: Path) -> None:
    result = dsv3("preprocess", "--config", str(config), "--set", "heuristic_filters.rules=[gopher_quality]")
    assert result.exit_code == 0, result.output
    assert "warning: no document is left to tokenize; " in result.output
    assert "Next:" not in result.output


def test_shards_then_merge(config: Path) -> None:
    assert "run again with --merge" in dsv3("preprocess", "--config", str(config), "--shard", "0/1").output
    assert "6 records = " in dsv3("preprocess", "--config", str(config), "--merge").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "1"], "--shard 1: expected I/N, such as 0/8"),
        (["--set", "pipeline=[cleaning]"], "pipeline"),
        (["--set", "pipeline=[pii,pii]"], "pii is named twice"),
        (["--set", "pipeline=[mixing,pii]"], "mixing repeats documents, so it must be the last stage"),
        (
            ["--set", "heuristic_filters.rules=[x]"],
            "x: expected gopher_repetition, gopher_quality, c4, fineweb or code",
        ),
        (
            ["--set", "heuristic_filters.rules=[]"],
            "found []: expected a list of at least 1",
        ),
        (["--set", "input_path=5"], "input_path: found 5: expected text"),
        (["--set", "output_dir=[a]"], "output_dir: found [a]: expected a path"),
        (["--set", "output_dir=s3://u:hidden@b/o"], "'s3://***@b/o': expected a local path, not an address"),
        (["--set", "keep_keys=maybe"], "keep_keys: found maybe: expected true or false"),
        (["--set", "memory=lots"], "expected a size such as 4GB"),
        (["--set", "mixing.tokens=many"], "expected a whole number such as"),
        (["--set", "input_path=nowhere"], "nowhere"),
        (["--set", "ray_address=auto"], "needs engine: ray"),
        (["--set", "previous_runs=[x]", "--set", "pipeline=[pii]"], "needs exact_deduplication or deduplication"),
        (["--set", "deduplicaton.threshold=0.7"], "did you mean deduplication?"),
    ],
)
def test_a_mistake_is_one_line(config: Path, arguments: list[str], message: str) -> None:
    assert message in message_of(dsv3("preprocess", "--config", str(config), *arguments))


def test_ctrl_c_tells_what_is_kept_and_how_to_resume(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_shard", _interrupt)
    words = ["preprocess", "--config", str(config), "--set", "workers=1"]
    result = dsv3(*words)
    assert result.exit_code == 130
    output = config.parent / "out"
    assert f"Stopped; 1 finished parts are kept in {output}; the same command resumes the run" in result.output
    assert f"dsv3 {' '.join(words)}" in result.output
    monkeypatch.undo()
    assert "resuming unfinished work" in dsv3(*words).output


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none/x", "/dev/full", "n" * 300])
def test_an_impossible_output_folder_is_one_line(config: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    output = tmp_path / place
    result = dsv3("preprocess", "--config", str(config), "--set", f"output_dir={output}", "--set", "workers=1")
    assert str(output) in message_of(result)


@pytest.mark.parametrize(
    "setting",
    [
        "workers=1e6",
        "workers=1e12",
        "work_unit_size=1",
        "memory=1",
        "shard_size=0",
        "bytes_per_token=1e-320",
        "mixing.max_epochs=1e300",
    ],
)
def test_absurd_sizes_are_one_line(config: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_MAX_WORK_UNITS", 100)
    assert setting.partition("=")[0] in message_of(dsv3("preprocess", "--config", str(config), "--set", setting))


def test_the_script_ends_with_one_line_for_a_missing_config(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "preprocess_data.py"), "--config", str(tmp_path / "no.yaml")]
    result = subprocess.run(script, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_smoke_test_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(smoke_test, "_DOCUMENTS", 600)
    monkeypatch.setattr(sys, "argv", ["run_data_tests.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "run_data_tests.py"), run_name="__main__")
    assert not ended.value.code
    assert capsys.readouterr().out.count(": yes") == 6
