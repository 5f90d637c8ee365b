"""`dsv3 validate` and `scripts/validate_chinchilla.py`: their output and exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.counts import count_active_parameters
from helpers import ROOT
from helpers.runs import dsv3, message_of, run_fields

SCRIPT = ROOT / "scripts" / "validate_chinchilla.py"
SIZES = "tiny 1b 5b 10b 15b 20b base".split()


def _size_file(size: str) -> Path:
    return ROOT / "configs" / f"deepseek_v3_{size}.yaml"


def _write(folder: Path, name: str = "small", **training: object) -> Path:
    fields = run_fields(folder)
    fields["training"].update(training)
    path = folder / f"deepseek_v3_{name}.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def _script(*words: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_every_shipped_size_complies_in_order_of_size() -> None:
    result = dsv3("validate", "--strict", "--configs", ROOT / "configs")
    assert result.exit_code == 0, result.output
    names = re.findall(r"^deepseek_v3_(\w+)$", result.output, re.MULTILINE)
    assert [name for name in names if name in SIZES] == SIZES
    assert result.stdout.splitlines()[-1] == f"{len(names)} of {len(names)} configurations comply"


def test_the_block_of_a_config() -> None:
    result = dsv3("validate", "--config", _size_file("10b"))
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{'=' * 80}\ndeepseek_v3_10b\n{'=' * 80}\n"
        "Active params:              2.07B\n"
        "Target ratio:               20 T/P\n"
        "Required tokens (20 T/P):   41.40B\n"
        "Total tokens:               41.40B\n"
        "Actual ratio:               20.0 T/P\n"
        "✓ complies: 20 to 26 tokens per active parameter; 9,870 steps of 4,194,304 tokens\n"
        "\n1 of 1 configurations comply\n"
    )
    assert result.stderr == f"Next:\n  dsv3 plan --config {_size_file('10b')}\n"


@pytest.mark.parametrize(
    ("tokens", "marked", "line", "strict_code"),
    [
        ("19.5x", False, r"✗ undertrained: .*19\.5 tokens per active parameter, below 20", 1),
        ("19.5x", True, r"✗ undertrained: .*below 20", 1),
        ("20x", False, r"✓ complies: ", 0),
        ("26x", False, r"✓ complies: ", 0),
        ("27x", False, r"✗ overtrained: .*27\.0 tokens per active parameter, above 26", 1),
        ("404x", True, r"✓ deliberately overtrained: .*404\.0 tokens per active parameter", 0),
    ],
)
def test_verdicts_and_exit_codes(tmp_path: Path, tokens: str, marked: bool, line: str, strict_code: int) -> None:
    path = _write(tmp_path, total_tokens=tokens, deliberate_overtraining=marked)
    result = dsv3("validate", "--config", path)
    assert result.exit_code == 0, result.output
    assert re.search(f"^{line}", result.output, re.MULTILINE), result.output
    assert f"{1 - strict_code} of 1 configurations comply" in result.output
    assert dsv3("validate", "--strict", "--config", path).exit_code == strict_code


def test_the_summary_counts_deliberate_overtraining(tmp_path: Path) -> None:
    _write(tmp_path, "a", total_tokens="20x")
    _write(tmp_path, "b", total_tokens="30x", deliberate_overtraining=True)
    _write(tmp_path, "c", total_tokens="30x")
    result = dsv3("validate", "--configs", tmp_path)
    assert result.stdout.splitlines()[-1] == "2 of 3 configurations comply, 1 deliberately overtrained"


def test_overrides_change_the_named_config() -> None:
    path = _size_file("tiny")
    result = dsv3("validate", "--config", path, "--set", "training.total_tokens=1000")
    assert "training.total_tokens = 1,000 is 0.0 tokens per active parameter" in result.output
    assert "--config with the file" in message_of(dsv3("validate", "--set", "training.total_tokens=1000"))


def test_json_has_every_figure_and_nothing_else() -> None:
    result = dsv3("validate", "--json", "--config", _size_file("1b"))
    [entry] = json.loads(result.output)
    config = load_config(_size_file("1b"))
    active = count_active_parameters(config.model)
    reason = entry.pop("reason")
    assert reason.startswith("20 to 26 tokens per active parameter")
    assert entry == {
        "name": "deepseek_v3_1b",
        "active_parameters": active,
        "target_ratio": 20,
        "required_tokens": 20 * active,
        "total_tokens": 20 * active,
        "actual_ratio": 20.0,
        "steps": -(-20 * active // (config.training.global_batch_size * config.training.sequence_length)),
        "verdict": "complies",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "is not valid YAML"),
        ("", "model: missing"),
        ("model: 3\ntraining: 4", "model: "),
        ("- a list", "expected sections"),
    ],
)
def test_a_broken_file_is_an_error_beside_other_results(tmp_path: Path, text: str, expected: str) -> None:
    _write(tmp_path, "good", total_tokens="20x")
    broken = tmp_path / "deepseek_v3_broken.yaml"
    broken.write_text(text, encoding="utf-8")
    result = dsv3("validate", "--configs", tmp_path)
    assert result.exit_code == 1
    assert str(broken) in message_of(result)
    assert expected in message_of(result)
    assert "deepseek_v3_good" in result.output
    assert result.output.splitlines()[-1] == "1 of 2 configurations comply; 1 cannot be read"
    listed = dsv3("validate", "--json", "--configs", tmp_path)
    assert listed.exit_code == 1
    assert [entry["name"] for entry in json.loads(listed.output)] == ["deepseek_v3_good"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"total_tokens": "twenty"}, "training.total_tokens: found twenty"),
        ({"total_tokens": 0}, "training.total_tokens: found 0"),
        ({"deliberate_overtraining": "yes"}, "training.deliberate_overtraining"),
        ({"deliberate_overtrainig": True}, "did you mean deliberate_overtraining?"),
        ({"sequence_length": None}, "training.sequence_length"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, object], expected: str) -> None:
    result = dsv3("validate", "--config", _write(tmp_path, **change))
    assert result.exit_code == 1
    assert expected in message_of(result)


def test_impossible_requests_are_refused(tmp_path: Path) -> None:
    assert "cannot be read" in message_of(dsv3("validate", "--config", tmp_path / "nothing.yaml"))
    assert "is not a folder" in message_of(dsv3("validate", "--configs", tmp_path / "nothing"))
    assert "holds no deepseek_v3_*.yaml" in message_of(dsv3("validate", "--configs", tmp_path))
    both = dsv3("validate", "--configs", tmp_path, "--config", _size_file("tiny"))
    assert "not both" in message_of(both)


def test_the_script_finds_the_configs_here_or_beside_the_package(tmp_path: Path) -> None:
    away = _script(cwd=tmp_path)
    assert (away.returncode, away.stderr) == (0, "Next:\n  dsv3 plan\n")
    assert "deepseek_v3_base\n" in away.stdout
    (tmp_path / "configs").mkdir()
    shutil.copy(_size_file("tiny"), tmp_path / "configs")
    here = _script(cwd=tmp_path)
    assert here.stdout.splitlines()[-1] == "1 of 1 configurations comply"


def test_the_script_ends_a_mistake_in_one_line(tmp_path: Path) -> None:
    result = _script("--config", tmp_path / "nothing.yaml")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path / 'nothing.yaml'}: cannot be read: No such file or directory\n"


def test_a_terminal_without_the_marks_shows_words(tmp_path: Path) -> None:
    good = _write(tmp_path, "größe", total_tokens="20x")
    bad = _write(tmp_path, "bad", total_tokens="2x")
    result = _script("--config", good, "--config", bad, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr.splitlines()[0]) == (0, "Next:")
    assert "\nOK complies: " in result.stdout
    assert "\nX undertrained: " in result.stdout
    assert "\ndeepseek_v3_gr??e\n" in result.stdout


def test_small_and_large_counts_stay_readable(tmp_path: Path) -> None:
    result = dsv3("validate", "--config", _write(tmp_path, total_tokens=14_800_000_000_000))
    assert re.search(r"^Active params: +0\.0\dM$", result.output, re.MULTILINE)
    assert re.search(r"^Total tokens: +14\.80T$", result.output, re.MULTILINE)
    few = dsv3("validate", "--config", _write(tmp_path, total_tokens=768))
    assert re.search(r"^Total tokens: +768$", few.output, re.MULTILINE)


def test_the_next_plan_is_of_the_same_fields() -> None:
    words = ["--config", "1b", "--set", "parallel.precision=fp8"]
    result = dsv3("validate", *words)
    assert result.stderr == f"Next:\n  dsv3 plan {' '.join(words)}\n"
