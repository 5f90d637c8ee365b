"""`dsv3`: every command of the project under one name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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


@dataclass(frozen=True)
class Command:
    """A command's line of help, and `load`, which imports it: a function, or a Typer app with several commands."""

    help: str
    load: Callable[[], Callable[..., Any] | typer.Typer]


COMMANDS: dict[str, Command] = {}


def _command(name: str, help_line: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Adds a command. Its module is imported only when it runs, so that planning does not wait for torch."""

    def add(load: Callable[[], Any]) -> Callable[[], Any]:
        COMMANDS[name] = Command(help_line, load)
        return load

    return add


@_command("plan", "Say what a budget can train: fit, time, cost and expected loss of every size.")
def _plan() -> Any:
    from deepseek_v3.planning.plan_command import plan

    return plan


@_command("validate", "Check token budgets: 20 to 26 tokens per active parameter.")
def _validate() -> Any:
    from deepseek_v3.planning.validate_command import validate

    return validate


@_command("preprocess", "Clean, deduplicate and filter raw text, with a reason for every document that is dropped.")
def _preprocess() -> Any:
    from deepseek_v3.data.pipeline.command import preprocess

    return preprocess


@_command("quality", "Train and apply the models of the quality filter.")
def _quality() -> Any:
    from deepseek_v3.data.quality_filtering.command import quality_app

    return quality_app


@_command("tokenize", "Turn text into token ids, in a training and a hold-out split.")
def _tokenize() -> Any:
    from deepseek_v3.data.tokens.command import tokenize

    return tokenize


@_command("tokenizer", "Measure tokenizers on a corpus: bytes per token, unused ids, whether text survives.")
def _tokenizer() -> Any:
    from deepseek_v3.evaluation.tokenizer_command import tokenizer

    return tokenizer


@_command("train", "Train a model, from the first step or from a checkpoint.")
def _train() -> Any:
    from deepseek_v3.training.train import train

    return train


@_command("report", "Show the metrics of runs beside each other: a table, or one page with charts.")
def _report() -> Any:
    from deepseek_v3.training.report.command import report

    return report


@_command("watch", "Follow runs in the terminal while they train; Ctrl-C ends it and not the runs.")
def _watch() -> Any:
    from deepseek_v3.training.report.command import watch

    return watch


@_command(
    "torture", "Kill, stop and damage real training runs, and check that each goes on without losing anything."
)
def _torture() -> Any:
    from deepseek_v3.training.torture.command import torture

    return torture


@_command("generate", "Continue text with a trained model.")
def _generate() -> Any:
    from deepseek_v3.inference.generate import generate

    return generate


@_command("chat", "Talk with a model in the terminal.")
def _chat() -> Any:
    from deepseek_v3.inference.chat import chat

    return chat


@_command("serve", "Serve a model over HTTP, with OpenAI's API and a page to try it.")
def _serve() -> Any:
    from deepseek_v3.inference.server.command import serve

    return serve


@_command("checkpoint", "List, verify, remove, average and consolidate the checkpoints of a run.")
def _checkpoint() -> Any:
    from deepseek_v3.training.checkpoint_command import checkpoint_app

    return checkpoint_app


@_command("eval", "Measure a model's loss on held-out tokens or on any text, by source.")
def _eval() -> Any:
    from deepseek_v3.evaluation.eval_command import evaluate

    return evaluate


@_command("import", "Turn a Hugging Face directory into a checkpoint.")
def _import() -> Any:
    from deepseek_v3.interop.huggingface.import_command import import_model

    return import_model


@_command("export", "Write a checkpoint as a Hugging Face directory.")
def _export() -> Any:
    from deepseek_v3.interop.huggingface.export_command import export_model

    return export_model


@_command("bench", "Measure training, operations and generation, checked first, beside peers and what is possible.")
def _bench() -> Any:
    from deepseek_v3.benchmark.command import bench_app

    return bench_app


@_command("quickstart", "Build a corpus, train a tokenizer and a small model, measure it, and let it write.")
def _quickstart() -> Any:
    from deepseek_v3.quickstart import quickstart

    return quickstart


class _LazyGroup(TyperGroup):
    """Lists `COMMANDS` by name and help alone, and loads only the command that runs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = _load(name)
        return name, command, rest

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _usage_errors_masked():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with translate_os_errors(), _usage_errors_masked():
            return super().invoke(ctx)


@contextmanager
def _usage_errors_masked() -> Iterator[None]:
    """Removes secrets from Typer's messages about the command line, before Typer wraps their lines."""
    try:
        yield
    except Exception as error:
        # Click's errors have this attribute; Typer may hold its own copy of Click, so their class is not known.
        if isinstance(message := getattr(error, "message", None), str):
            error.message = redact(message)  # type: ignore[attr-defined]
        raise


def _load(name: str) -> Any:
    """The command of that name, as Click runs it."""
    loaded = COMMANDS[name].load()
    if isinstance(loaded, typer.Typer):
        return get_command(loaded)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(loaded)
    return get_command(single)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepseek_v3 {__version__}")
        raise typer.Exit


def _placeholder() -> None:
    """Registers the name and the help of a command that `_LazyGroup` loads when it runs."""


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
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """From raw text to a trained, exported and generating DeepSeek-V3-style model."""


for _name, _entry in COMMANDS.items():
    app.command(_name, help=_entry.help)(_placeholder)

config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def show(
    config: Annotated[Path, typer.Argument(help="A run's YAML file, or a shipped size such as 1b.")],
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
) -> None:
    """Print a config as a run would use it, with every default written out."""
    typer.echo(config_to_yaml(load_config(config, override or [])), nl=False)
    words = ["dsv3", "train", "--config", str(config), *override_options(override)]
    typer.echo(f"# Next: {shlex.join(words)}")  # a comment, so that the output stays a config


config_app.command("counts")(counts)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run's YAML file, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def main() -> None:
    """Runs `dsv3` with the arguments of the command line."""
    wait_passively()
    run_app(app)
