"""`dsv3`: all commands are listed at once, and each is imported only when it is run."""

import inspect
import json
import subprocess
import sys

import pytest
import typer

from deepseek_v3 import __version__
from deepseek_v3.cli import COMMANDS
from helpers import ROOT
from helpers.runs import dsv3

TINY = ROOT / "configs" / "deepseek_v3_tiny.yaml"
HEAVY = ("torch", "matplotlib", "transformers", "tokenizers", "tensorboard", "numpy")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_line_of_help(name: str) -> None:
    command = COMMANDS[name].load()
    described = command.info.help if isinstance(command, typer.Typer) else inspect.getdoc(command)
    assert described.splitlines()[0] == COMMANDS[name].help


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("validate", "--strict"),
        ("plan", "--gpus"),
        ("preprocess", "--merge"),
        ("quality", "score"),
        ("tokenize", "--fim-rate"),
        ("train", "--resume"),
        ("generate", "--prompt"),
        ("chat", "--plain"),
        ("serve", "--api-key-file"),
        ("eval", "--checkpoint"),
        ("bench", "ops"),
        ("quickstart", "--runs"),
    ],
)
def test_a_command_s_own_help_has_its_options(name: str, option: str) -> None:
    result = dsv3(name, "--help")
    assert result.exit_code == 0, result.output
    assert f" {name} [OPTIONS]" in result.output
    assert option in result.output


def test_help_lists_every_command() -> None:
    result = dsv3("--help")
    assert result.exit_code == 0, result.output
    for name in (*COMMANDS, "config"):
        assert f" {name} " in result.output


def test_the_version_is_printed() -> None:
    result = dsv3("--version")
    assert (result.exit_code, result.output) == (0, f"deepseek_v3 {__version__}\n")


def test_an_unknown_command_is_refused() -> None:
    result = dsv3("no-such-command")
    assert result.exit_code == 2
    assert "No such command" in result.output


def test_planning_imports_no_torch() -> None:
    """One process runs all these commands, because each would take a new Python otherwise."""
    lines = [
        ["--help"],
        ["validate"],
        ["validate", "--help"],
        ["plan", "--gpus", "1"],
        ["config", "show", str(TINY)],
        ["config", "schema"],
    ]
    program = (
        "import sys\n"
        "from deepseek_v3.cli import app\n"
        f"for words in {lines!r}:\n"
        "    app(words, standalone_mode=False)\n"
        f"    print(words, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=TINY.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert found == [f"{words} []" for words in lines]


def test_counts_are_printed_whole_and_as_json() -> None:
    base = TINY.with_name("deepseek_v3_base.yaml")
    found = json.loads(dsv3("config", "counts", base, "--json").output)
    parameters, operations = found["parameters"], found["operations_per_token"]
    assert parameters.pop("total") == 671_026_404_352
    assert parameters.pop("with_prediction") == sum(parameters.values())
    assert found["active_parameters"]["total"] == found["active_by_convention"]["with_head"] == 36_625_603_584
    assert operations["total"] == operations["forward"] + operations["backward"] + operations["recomputation"]
    assert operations["forward"] == sum(sum(part.values()) for part in found["forward_operations"].values())
    printed = dsv3("config", "counts", base).output
    for count in (*parameters.values(), *found["active_by_convention"].values(), *operations.values()):
        assert f"{count:,}" in printed
    without = json.loads(dsv3("config", "counts", base, "--set", "parallel.recomputation=none", "--json").output)
    assert without["operations_per_token"]["recomputation"] == 0
