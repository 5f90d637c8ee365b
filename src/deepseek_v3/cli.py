"""`dsv3`: every command of the project under one name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperGroup
from typer.main import get_command

from deepseek_v3 import __version__
from deepseek_v3.config.loading import config_to_yaml, load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts_command import counts
from deepseek_v3.utils.command_line import override_options, run_app
from deepseek_v3.utils.errors import translate_os_errors
from deepseek_v3.utils.machine import wait_passively
from deepseek_v3.utils.redaction import redact

Command: TypeAlias = "Callable[..., None] | typer.Typer"

# A command is imported only when it is run, so that planning does not wait for torch.


def _plan() -> Command:
    from deepseek_v3.planning.plan_command import plan

    return plan


def _validate() -> Command:
    from deepseek_v3.planning.validate_command import validate

    return validate


def _preprocess() -> Command:
    from deepseek_v3.data.pipeline.command import preprocess

    return preprocess


def _quality() -> Command:
    from deepseek_v3.data.quality_filtering.command import quality_app

    return quality_app


def _tokenize() -> Command:
    from deepseek_v3.data.tokens.command import tokenize

    return tokenize


def _train() -> Command:
    from deepseek_v3.training.train import train

    return train


def _generate() -> Command:
    from deepseek_v3.inference.generate import generate

    return generate


def _eval() -> Command:
    from deepseek_v3.evaluation.perplexity import evaluate

    return evaluate


def _quickstart() -> Command:
    from deepseek_v3.quickstart import quickstart

    return quickstart


# Name -> the function that imports the command, and its line of help.
COMMANDS: dict[str, tuple[Callable[[], Command], str]] = {
    "plan": (_plan, "Say what a budget can train: fit, time, cost and expected loss of every size."),
    "validate": (_validate, "Check token budgets: 20 to 26 tokens per active parameter."),
    "preprocess": (
        _preprocess,
        "Clean, deduplicate and filter raw text, with a reason for every document that goes.",
    ),
    "quality": (_quality, "Train and try the models of the quality stage."),
    "tokenize": (_tokenize, "Turn text into token shards, with a hold-out split."),
    "train": (_train, "Train a model, from the first step or from a checkpoint."),
    "generate": (_generate, "Continue text with a trained model."),
    "eval": (_eval, "Measure a checkpoint's held-out loss, beside a unigram and a bigram model."),
    "quickstart": (
        _quickstart,
        "Build a corpus, train a tokenizer and a small model, measure it, and let it write.",
    ),
}


class _LazyGroup(TyperGroup):
    """Knows the commands of `COMMANDS` by name and help alone, and imports the one that is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = _import_command(name)
        return name, command, rest

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _usage_errors_masked():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with translate_os_errors(), _usage_errors_masked():
            return super().invoke(ctx)


@contextmanager
def _usage_errors_masked() -> Iterator[None]:
    """Takes secrets out of what Typer says of the words of a command line, before it breaks that into lines."""
    try:
        yield
    except Exception as error:
        # Click's errors carry their message there; Typer has its own copy of Click in some versions.
        if isinstance(message := getattr(error, "message", None), str):
            error.message = redact(message)  # type: ignore[attr-defined]
        raise


def _import_command(name: str) -> Any:
    found = COMMANDS[name][0]()
    if isinstance(found, typer.Typer):  # a group of commands
        return get_command(found)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(found)
    return get_command(single)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepseek_v3 {__version__}")
        raise typer.Exit


def _stand_in() -> None:
    """Stands for a command that is not imported yet."""


app = typer.Typer(
    name="dsv3",
    cls=_LazyGroup,
    help="From raw text to a trained, exported and generating DeepSeek-V3-style model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """From raw text to a trained, exported and generating DeepSeek-V3-style model."""


for _name, (_, _help) in COMMANDS.items():
    app.command(_name, help=_help)(_stand_in)

config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def show(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or a shipped size such as 1b.")],
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
) -> None:
    """Print a config as a run would use it, every default spelled out."""
    typer.echo(config_to_yaml(load_config(config, override or [])), nl=False)
    words = ["dsv3", "train", "--config", str(config), *override_options(override)]
    typer.echo(f"# Next: {shlex.join(words)}")  # a comment, so that the output stays a config


config_app.command("counts")(counts)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run's YAML file, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def main() -> None:
    """Runs `dsv3` with the words of the command line."""
    wait_passively()
    run_app(app)
