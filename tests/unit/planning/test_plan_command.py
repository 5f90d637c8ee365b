"""`dsv3 plan` and `scripts/select_config.py`: output, questions and errors."""

import json
import os
import re
import shlex
import subprocess
import sys
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from deepseek_v3.cli import app
from deepseek_v3.config.loading import list_config_files, load_config
from deepseek_v3.planning import plan_command as plan_module
from deepseek_v3.planning.advice.advisor import ESTIMATE_ONLY, advise
from deepseek_v3.planning.advice.output_json import advice_as_json
from deepseek_v3.planning.advice.request import PlanOptions, PlanRequest, parse_tokens
from deepseek_v3.planning.hardware import known_devices
from deepseek_v3.utils import text
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.text import dollars, format_count, format_distinct, three_figures
from helpers import ROOT
from helpers.runs import dsv3, message_of

CONFIG_1B = ROOT / "configs" / "deepseek_v3_1b.yaml"

SCRIPT = ROOT / "scripts" / "select_config.py"
SIZES = "tiny 1b 5b 10b 15b 20b base".split()

OWN_DEVICE = {
    "name": "Own",
    "memory_gib": 60.0,
    "bfloat16_tflops": 100.0,
    "float32_tflops": 50.0,
    "memory_gb_per_s": 1000.0,
    "link_gb_per_s": 50.0,
    "dollars_per_hour": 1.25,
    "source": "measured here",
}


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def _json(*words: object) -> dict[str, Any]:
    result = dsv3("plan", "--json", *words)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def _script(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def _line_of(name: str, output: str) -> list[str]:
    """The cells of a size in all tables, in their order."""
    return [word for line in output.splitlines() if line.split(" ")[0] == name for word in line.split()]


def _without_refusals(number: object) -> None:
    raise AssertionError(f"{number} is no number of JSON")


def test_every_size_and_every_figure_is_printed() -> None:
    words = ("--gpus", 8, "--gpu-memory", 80, "--budget-hours", 72)
    result = dsv3("plan", *words)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("8 × H100, 79.2 GiB each, $3.00 an hour each (")
    assert "\nWithin 72 hours; the aim is the lowest expected loss (--objective best-loss)\n" in result.output
    assert "…" not in result.output
    assert max(map(len, result.output.splitlines()[:-1])) <= 110
    found = _json(*words)
    for row in found["rows"]:
        cells = _line_of(row["name"], result.output)
        assert format_count(row["total_parameters"]) in cells
        assert format_count(row["active_parameters"]) in cells
        assert ("✓" in cells) == row["fits"]
        assert f"{row['memory']['needed_bytes'] / 2**30:,.1f}" in cells
        assert format_count(row["tokens"]) in cells
        assert f"{row['steps']:,}" in cells
        for shortage in row["shortages"]:
            assert shortage["reason"] in result.output.replace("\n", " ")
        if row["cost"]:
            assert dollars(row["cost"]["dollars"]) in cells
            assert three_figures(row["step_seconds"]["total"]) in cells
        if row["loss"]:
            loss = row["loss"]
            assert f"{loss['value']:.2f}{'*' if loss['extrapolated'] else ''}" in cells
            assert f"({loss['low']:.2f}–{loss['high']:.2f})" in cells


def test_the_memory_of_every_size_is_printed_by_part() -> None:
    output, found = dsv3("plan", "--gpus", 8).output, _json("--gpus", 8)
    for row in found["rows"]:
        parts = row["memory"]["parts"]
        assert sum(parts.values()) == pytest.approx(row["memory"]["needed_bytes"])
    for part in found["rows"][0]["memory"]["parts"]:
        gib = [f"{row['memory']['parts'][part] / 2**30:,.1f}" for row in found["rows"]]
        assert re.search(rf"^{part.replace('_', ' ')} +{' +'.join(map(re.escape, gib))}( |$)", output, re.MULTILINE)


def test_a_plan_names_the_layers_that_auto_has_in_fp8() -> None:
    words = ("--gpus", 8, "--gpu", "H200", "--config", "tiny", "--config", "1b", "--set", "parallel.precision=auto")
    output, (tiny, larger) = dsv3("plan", *words).output, _json(*words)["rows"]
    assert tiny["fp8_layers"] == []
    assert larger["fp8_layers"] == ["mlp", "mlp.experts", "mlp.shared_experts"]
    assert "bf16" in _line_of("tiny", output)
    assert "fp8+bf16" in _line_of("1b", output)
    named = "FP8 layers of 1b: dense networks, shared experts, routed experts; the others compute in bf16."
    assert output.splitlines().count(named) == output.count("FP8 layers of") == 1
    whole = dsv3("plan", *words, "--set", "parallel.precision=fp8").output
    assert "fp8" in _line_of("1b", whole)
    assert "FP8 layers of 1b" not in whole


def test_the_recommended_size_has_step_parts_and_a_command() -> None:
    output, found = dsv3("plan", "--budget-hours", 72).output, _json("--budget-hours", 72)
    [row] = [row for row in found["rows"] if row["name"] == found["recommendation"]["name"]]
    for name, seconds in row["step_seconds"]["parts"].items():
        assert re.search(rf"    {name} +{re.escape(three_figures(seconds))}$", output, re.MULTILINE), name
    assert sum(row["step_seconds"]["parts"].values()) == pytest.approx(row["step_seconds"]["total"])
    assert f"\nRecommended: {row['name']} (" in output
    assert output.splitlines()[-1] == f"  {found['recommendation']['command']}"


def test_only_several_processes_are_marked_as_an_estimate() -> None:
    several, one = dsv3("plan", "--gpus", 8), dsv3("plan", "--gpus", 1)
    assert f"\nNote: {ESTIMATE_ONLY}.\nNext:\n  dsv3 tokenize " in several.output
    assert "\n  torchrun --nproc_per_node=8 src/training/train.py" in several.output
    assert ESTIMATE_ONLY not in one.output
    assert "\n  python src/training/train.py --config configs/deepseek_v3_5b.yaml --set parallel." in one.output


def test_json_is_the_advice_and_valid_for_everyone() -> None:
    words = ("--gpus", "2", "--gpu", "A100", "--price", "2.5", "--budget-dollars", "900", "--tokens", "40B")
    result = dsv3("plan", "--json", *words)
    found = json.loads(result.stdout, parse_constant=_without_refusals)
    request = PlanOptions(2, "A100", price=2.5, budget_dollars=900.0, tokens="40B").request()
    expected = advice_as_json(advise(request, {path: load_config(path) for path in list_config_files(None)}))
    assert found == json.loads(json.dumps(expected))
    assert found["request"] == {
        "devices": 2,
        "budget_hours": None,
        "budget_dollars": 900.0,
        "tokens": 40_000_000_000,
        "objective": "best-loss",
    }
    assert found["device"]["name"] == "A100"
    assert found["device"]["dollars_per_hour"] == 2.5
    assert [row["name"] for row in found["rows"]] == SIZES
    assert found["sources"].keys() == {"loss", "memory and time"}


def test_the_recommended_overrides_load_to_the_planned_layout() -> None:
    found = _json("--gpus", 8, "--budget-hours", 10)
    recommended = found["recommendation"]
    [row] = [row for row in found["rows"] if row["name"] == recommended["name"]]
    words = shlex.split(recommended["command"])
    path = words[words.index("--config") + 1]
    settings = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert (path, settings) == (row["config"], recommended["overrides"])
    config = load_config(path, settings)
    assert config.parallel.model_dump() == row["parallel"]
    assert recommended["note"] == ESTIMATE_ONLY


def test_no_fitting_size_is_reported_without_an_error() -> None:
    words = ("--gpus", 1, "--tokens", "1000")
    assert (
        dsv3("plan", *words).output.splitlines()[-1].startswith("Recommended: none; nothing fits; nearest is tiny")
    )
    recommended = _json(*words)["recommendation"]
    assert recommended["name"] is recommended["command"] is recommended["note"] is None
    assert recommended["reason"].startswith("nothing fits")


def test_without_options_eight_default_gpus_are_assumed() -> None:
    assert dsv3("plan").output == dsv3("plan", "--gpus", 8, "--gpu", "H100").output
    assert "\nNo limits; " in dsv3("plan").output
    assert dsv3("plan", "--gpu", "CPU", "--config", "tiny").output.startswith("1 × CPU, ")


def test_a_device_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(OWN_DEVICE), encoding="utf-8")
    words = ("--config", "tiny", "--hardware", path)
    given = dsv3("plan", *words)
    assert given.output.startswith("8 × Own, 60 GiB each, $1.25 an hour each (measured here)")
    priced = dsv3("plan", *words, "--price", 0.5)
    assert priced.output.startswith("8 × Own, 60 GiB each, $0.50 an hour each (rent as given)")
    path.write_text(yaml.safe_dump({**OWN_DEVICE, "memory_gib": -1}), encoding="utf-8")
    assert f"{path}:" in message_of(dsv3("plan", "--hardware", path))


def test_the_known_gpus_are_listed_with_their_sources() -> None:
    output = dsv3("plan", "--list-gpus").output
    for device in known_devices():
        [line] = [line for line in output.splitlines() if line.startswith(f"{device.name}  ")]
        assert f"{device.float32_tflops:,g}" in line
        assert device.fp8_tflops is None or f" {device.fp8_tflops:,g} " in line
        assert line.endswith(f"{device.dollars_per_hour:.2f}")
        assert device.source in output.replace("\n", " ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpus", "0"], "--gpus 0: expected at least 1"),
        (["--gpus", "-4"], "--gpus -4: expected at least 1"),
        (["--gpu", "Voodoo"], "--gpu Voodoo: unknown device; known are B200, "),
        (["--gpu", ""], "--gpu : unknown device"),
        (["--gpu-memory", "55"], "--gpu-memory 55: no known GPU has that much"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: expected a number above 0"),
        (["--gpu-memory", "-80"], "--gpu-memory -80: expected a number above 0"),
        (["--gpu", "H100", "--gpu-memory", "80"], "--gpu H100 and --gpu-memory 80: expected one way"),
        (["--gpu", "H100", "--hardware", "own.yaml"], "expected one way to name the device, not several"),
        (["--hardware", "nothing.yaml"], "nothing.yaml: cannot be read"),
        (["--price", "-1"], "--price -1: expected dollars per hour"),
        (["--price", "inf"], "--price inf"),
        (["--budget-hours", "0"], "--budget-hours 0: expected a number above 0"),
        (["--budget-hours", "nan"], "--budget-hours nan"),
        (["--budget-dollars", "-5"], "--budget-dollars -5"),
        (["--budget-dollars", "inf"], "--budget-dollars inf"),
        (["--tokens", "many"], "--tokens many: expected a whole number"),
        (["--tokens", "-1B"], "--tokens -1B"),
        (["--objective", "cheapest"], "--objective cheapest: expected best-loss, fastest, fit"),
        (["--configs", "nowhere"], "nowhere: is not a folder"),
        (["--plot", "plan.pdf"], "--plot plan.pdf: expected a file name that ends in .png"),
    ],
)
def test_an_invalid_option_is_one_line(words: list[str], expected: str) -> None:
    result = dsv3("plan", *words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert expected in message_of(result)
    assert "\n" not in message_of(result)


@pytest.mark.parametrize("words", [["--gpus", "eight"], ["--gpus", "1.5"], ["--budget-hours", "x"], ["--unknown"]])
def test_invalid_numbers_are_usage_errors(words: list[str]) -> None:
    assert dsv3("plan", *words).exit_code == 2


def test_another_folder_with_a_broken_file(tmp_path: Path) -> None:
    text = (ROOT / "configs" / "deepseek_v3_1b.yaml").read_text(encoding="utf-8")
    (tmp_path / "deepseek_v3_mine.yaml").write_text(text, encoding="utf-8")
    [row] = _json("--configs", tmp_path)["rows"]
    assert (row["name"], row["config"]) == ("mine", str(tmp_path / "deepseek_v3_mine.yaml"))
    (tmp_path / "deepseek_v3_broken.yaml").write_text("model: [", encoding="utf-8")
    assert "deepseek_v3_broken.yaml:1: is not valid YAML" in message_of(dsv3("plan", "--configs", tmp_path))


def test_the_script_is_the_same_command_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--gpus", "1", "--budget-hours", "24")
    away = _script(*words, cwd=tmp_path)
    assert (away.returncode, away.stderr) == (0, "")
    launcher = ROOT / "src" / "training" / "train.py"
    assert f"\n  python {launcher} --config 1b " in away.stdout
    monkeypatch.chdir(tmp_path)
    assert away.stdout == dsv3("plan", *words).output
    wrong = _script("--gpus", "0")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (1, "", "error: --gpus 0: expected at least 1\n")


def test_a_terminal_without_the_signs_shows_plain_ones() -> None:
    result = _script("--gpus", "1", LC_ALL="C", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    assert "?" not in result.stdout
    assert result.stdout.startswith("1 x H100, ")
    assert "OK" in _line_of("1b", result.stdout)
    assert "X" in _line_of("base", result.stdout)


def test_a_narrow_terminal_gets_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = dsv3("plan", "--gpus", 2048, "--budget-hours", 100).output
    monkeypatch.setattr(text, "output_width", lambda: 80)
    narrow = dsv3("plan", "--gpus", 2048, "--budget-hours", 100).output
    assert all(len(line) <= 80 for line in narrow.splitlines()[:-1])
    for size in SIZES:
        assert sorted(_line_of(size, narrow)) == sorted(_line_of(size, wide))
    assert narrow.splitlines()[-1] == wide.splitlines()[-1]


def test_a_picture_is_drawn_where_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.png"
    result = dsv3("plan", "--config", "1b", "--json", "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert result.stderr == f"Drawn: {path}\n"
    assert json.loads(result.stdout)["rows"]
    (tmp_path / "taken.png").mkdir()
    refused = dsv3("plan", "--config", "1b", "--plot", tmp_path / "taken.png")
    assert message_of(refused).startswith(f"--plot {tmp_path / 'taken.png'}: cannot be written: ")


def _answering(monkeypatch: pytest.MonkeyPatch, *answers: str) -> Result:
    monkeypatch.setattr(plan_module, "_in_a_terminal", lambda: True)
    return CliRunner().invoke(app, ["plan"], input="".join(f"{answer}\n" for answer in answers))


def test_in_a_terminal_it_asks_and_prints_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _answering(monkeypatch, "RTX 4090", "1", "100", "$1,000", "10B", "fit")
    assert result.exit_code == 0, result.output
    last = result.output.splitlines()[-1]
    command = last.removeprefix("The same without questions: ")
    expected = (
        "dsv3 plan --gpus 1 --gpu 'RTX 4090' --budget-hours 100 --budget-dollars 1000 --tokens 10B --objective fit"
    )
    assert command == expected
    repeated = dsv3(*shlex.split(command)[1:])
    assert repeated.exit_code == 0
    assert repeated.output in result.output


def test_empty_answers_keep_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _answering(monkeypatch, "", "", "", "", "", "")
    assert dsv3("plan", "--gpus", 8).output in result.output
    assert result.output.endswith("\nThe same without questions: dsv3 plan\n")


def test_a_bad_answer_is_asked_again_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["H7", "4", "0", "two", "2", "-1", "inf", "", "none", "5", "12Q", "1e9", "best", "best-loss"]
    result = _answering(monkeypatch, *answers)
    assert result.exit_code == 0, result.output
    for reason in (
        "  --gpu H7: unknown device",
        "  --gpus 0: expected at least 1",
        "  two: expected a whole number",
        "  --budget-hours -1: expected a number above 0",
        "  --budget-hours inf: expected a number above 0",
        "  none: expected a number",
        "  --tokens 12Q: expected a whole number",
        "  --objective best: expected best-loss, fastest, fit",
    ):
        assert f"\n{reason}" in result.output, reason
    chosen = known_devices()[3].name
    command = (
        f"dsv3 plan --gpus 2 --gpu {shlex.quote(chosen)} --budget-dollars 5 --tokens 1e9 --objective best-loss"
    )
    assert result.output.endswith(f"\nThe same without questions: {command}\n")


def test_a_device_may_be_answered_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _answering(monkeypatch, "24", "1", "", "", "", "")
    assert "--gpus 1 --gpu-memory 24\n" in result.output
    assert "\n1 × RTX 4090, " in result.output


def test_the_end_of_the_input_ends_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _answering(monkeypatch, "H100").exit_code == 1


def test_options_leave_no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_in_a_terminal", lambda: True)
    assert "Which GPU?" not in dsv3("plan", "--gpus", 1).output


@given(tokens=st.integers(1, 10**18), unit=st.sampled_from(["", "k", "K", "M", "b", "B", "T", " B"]))
def test_every_way_to_write_tokens_reads_the_same(tokens: int, unit: str) -> None:
    size = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}[unit.strip().upper()]
    assert parse_tokens(f"{Decimal(tokens).scaleb(-size):f}{unit}") == tokens
    assert parse_tokens(f"{tokens:_}") == parse_tokens(f"{tokens:,}") == parse_tokens(f" {tokens} ") == tokens


@given(digits=st.integers(1, 9999), exponent=st.integers(3, 14))
def test_tokens_with_an_exponent(digits: int, exponent: int) -> None:
    expected = digits * 10 ** (exponent - 3)
    text = f"{Decimal(digits).scaleb(-3)}"
    assert parse_tokens(f"{text}e{exponent}") == parse_tokens(f"{text}E+{exponent}") == expected


@given(text=st.text(max_size=12))
def test_anything_else_is_a_named_error(text: str) -> None:
    try:
        tokens, message = parse_tokens(text), None
    except ConfigError as error:
        tokens, message = 1, str(error)
    assert 1 <= tokens <= 10**18
    assert message is None or message.startswith(f"--tokens {text}: expected a whole number")


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "1e-3", "1e19", "1e99", "2000000T", "0.0000000001B", "1__0", "1,", "10X", "٣", "nan"],
)
def test_impossible_numbers_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError, match="--tokens"):
        parse_tokens(text)


def test_options_give_a_request_and_their_command() -> None:
    options = PlanOptions(gpus=3, gpu="A100 40GB", budget_dollars=12.5, objective="fit")
    request = options.request()
    assert (request.device.name, request.devices, request.objective) == ("A100 40GB", 3, "fit")
    assert request.budget_dollars == 12.5
    assert options.command() == "dsv3 plan --gpus 3 --gpu 'A100 40GB' --budget-dollars 12.5 --objective fit"
    assert PlanOptions().request() == PlanRequest(PlanOptions(gpu="H100").request().device, 8)


def test_similar_numbers_are_shown_with_all_digits() -> None:
    assert format_distinct(72.0001, 72.0, three_figures) == ("72.0001", "72.0")
    assert format_distinct(3_749_248_000, 3_749_000_000, format_count) == ("3,749,248,000", "3,749,000,000")
    assert format_distinct(1200.0, 24.0, three_figures) == ("1,200", "24")


def test_a_picture_goes_to_the_file_named_or_to_the_usual_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert dsv3("plan", "--config", "1b", "--plot").exit_code == 0
    assert dsv3("plan", "--plot", "mine.png", "--config", "1b").exit_code == 0
    for name in ("plan.png", "mine.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "--plot other.png draws to it" in message_of(dsv3("plan", "other.png"))


def test_given_configs_are_planned_instead_of_the_sizes(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(CONFIG_1B.read_text(encoding="utf-8").replace("total_tokens: 20x", "total_tokens: 24x"))
    found = _json("--gpus", 1, "--config", mine, "--config", CONFIG_1B)
    assert {row["name"]: row["tokens_per_active_parameter"] for row in found["rows"]} == {"mine": 24.0, "1b": 20.0}
    assert f"--config {mine}" in _json("--gpus", 1, "--config", mine)["recommendation"]["command"]
    refused = dsv3("plan", "--config", mine, "--configs", tmp_path)
    assert "expected either --config files or a --configs folder" in message_of(refused)
    assert "cannot be read" in message_of(dsv3("plan", "--config", tmp_path / "none.yaml"))


def test_the_command_of_a_plan_repeats_overrides() -> None:
    """One that the planner has changed itself is said once, with the planner's value."""
    given = ["parallel.precision=fp8", "model.num_hidden_layers=9", "parallel.micro_batch_size=1"]
    words = [word for override in given for word in ("--set", override)]
    found = _json("--gpu", "H100", "--gpus", 1, "--config", "1b", *words)
    command = shlex.split(found["recommendation"]["command"])
    settings = [word for before, word in pairwise(command) if before == "--set"]
    assert settings[:2] == given[:2]
    assert [setting.split("=")[0] for setting in settings].count("parallel.micro_batch_size") == 1
    planned = load_config(CONFIG_1B, settings)
    assert planned.parallel.model_dump(mode="json") == found["rows"][0]["parallel"]
    assert planned.parallel.precision == "fp8"
    assert message_of(dsv3("plan", "--config", "1b", "--set", "parallel.precision=fp9")).startswith(
        "--set parallel.p"
    )
