"""`dsv3`: every command of the project under one name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deepseek_v3.config.loading import config_to_yaml, load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenize import tokenize
from deepseek_v3.evaluation.perplexity import evaluate
from deepseek_v3.inference.generate import generate
from deepseek_v3.quickstart import quickstart
from deepseek_v3.training.train import train
from deepseek_v3.utils.commands import run_app

app = typer.Typer(
    name="dsv3",
    help="From raw text to a trained, exported and generating DeepSeek-V3-style model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("tokenize")(tokenize)
app.command("train")(train)
app.command("generate")(generate)
app.command("eval")(evaluate)
app.command("quickstart")(quickstart)

config_app = typer.Typer(no_args_is_help=True, help="Look at configurations.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def show(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    override: Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE")] = None,
) -> None:
    """Print a config as a run would use it, every default spelled out."""
    typer.echo(config_to_yaml(load_config(config, override or [])), nl=False)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a run's YAML file, for editors."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def main() -> None:
    """Entry point of the console script."""
    run_app(app)
