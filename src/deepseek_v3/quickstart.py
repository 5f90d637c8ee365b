"""`dsv3 quickstart`: the whole path in minutes, from the text inside Python to a model that writes some."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.panel import Panel

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.shards import TokenShards
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.perplexity import Comparison, compare_with_ngrams
from deepseek_v3.inference.engine import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.model.saved import load_model
from deepseek_v3.training.reporting import plot_run
from deepseek_v3.training.train import train_run
from deepseek_v3.utils.distributed import select_device
from deepseek_v3.utils.errors import DataError, UserError
from deepseek_v3.utils.logging import configure_logging, get_console, get_logger

_PROMPTS = ("def main(", "import os\n", "class Node:\n", '"""Return ')


def quickstart(
    config: Annotated[Path, typer.Option(help="The config to train.")] = Path("configs/deepseek_v3_tiny.yaml"),
    runs: Annotated[Path, typer.Option(help="Folder for the run; each start gets a new one inside.")] = Path(
        "runs"
    ),
) -> None:
    """Build a corpus, train a tokenizer and a small model, measure it, and let it write."""
    configure_logging()
    start = time.perf_counter()
    with _new_folder(runs) as folder:
        run = load_config(config, [f"logging.directory={folder}", f"checkpoint.directory={folder / 'checkpoints'}"])
        result = train_run(run, select_device("auto"))
    if not result.finished or result.held_out is None:
        raise UserError(f"stopped after step {result.step}; start again for another run, this one is in {folder}")
    comparison = compare_with_ngrams(result.held_out, TokenShards.open(run.data.path), run, result.tokens)
    baselines = {"unigram": comparison.unigram, "bigram": comparison.bigram}
    plot_run(folder, baselines)
    get_console().print(comparison.table())
    get_logger("Quickstart").info(_verdict(comparison))
    _show_samples(result.checkpoint)
    get_logger("Quickstart").info(f"{time.perf_counter() - start:.0f} seconds in all; everything is in {folder}")
    _show_next_steps(config, folder, result.checkpoint)


@contextmanager
def _new_folder(runs: Path) -> Iterator[Path]:
    """Makes runs/quickstart, or the first of quickstart-2, quickstart-3, … that does not exist yet.

    Where nothing has been written to it at the end of the block it goes away again.
    """
    for number in count(1):
        folder = runs / ("quickstart" if number == 1 else f"quickstart-{number}")
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise DataError(f"{folder}: cannot be written: {error.strerror}; choose another --runs") from error
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


def _verdict(comparison: Comparison) -> str:
    gains = [
        f"{abs(baseline - comparison.model.loss):.2f} nats per token "
        f"{'better' if baseline > comparison.model.loss else 'worse'} than the {name}"
        for name, baseline in (("unigram", comparison.unigram), ("bigram", comparison.bigram))
    ]
    return f"on text it has never seen, the model is {' and '.join(gains)}"


def _show_samples(checkpoint: Path) -> None:
    saved = load_model(checkpoint, select_device("auto"))
    generator = Generator(saved.model, Tokenizer.from_json(saved.tokenizer_json))
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.7, top_p=0.9, seed=0)
    for completion in generator.generate(list(_PROMPTS), sampling):
        text = f"[dim]{escape(completion.prompt)}[/dim]{escape(completion.text)}"
        get_console().print(Panel(text, width=100, title="the model writes", title_align="left"))


def _show_next_steps(config: Path, folder: Path, checkpoint: Path) -> None:
    commands = (
        f'dsv3 generate --checkpoint {checkpoint} --prompt "def main("',
        f"dsv3 eval --checkpoint {checkpoint}",
        f"tensorboard --logdir {folder}/tensorboard",
        f"dsv3 train --config {config} --set training.total_tokens=40x",
        "dsv3 tokenize --input FOLDER --vocab-size 1024 --output data/mine",
    )
    get_console().print(f"Losses: {folder}/loss.png\nTry next (after: source .venv/bin/activate):")
    for command in commands:
        get_console().print(f"  {command}", highlight=False, soft_wrap=True, markup=False)
