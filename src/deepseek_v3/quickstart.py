"""`dsv3 quickstart`: the whole path in minutes, from Python's own source text to a model that generates text."""

from __future__ import annotations

import json
import re
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
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.open_source import open_tokens_of
from deepseek_v3.evaluation.perplexity import Comparison, compare_with_ngrams, measure_saved
from deepseek_v3.inference.generator import Generator
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.interop.load_model import load_for_inference
from deepseek_v3.model.pretrained import LoadedModel
from deepseek_v3.training.metrics import plot_run
from deepseek_v3.training.train import train_run
from deepseek_v3.training.trainer import TrainingResult
from deepseek_v3.utils.command_line import override_options, print_next_steps
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import DataError, InUseError, UserError
from deepseek_v3.utils.files import atomic_write, refuse_address
from deepseek_v3.utils.logging import configure_logging, get_console, get_logger

_SUMMARY = "summary.json"
_PROMPTS = ("def main(", "import os\n", "class Node:\n", '"""Return ')


def quickstart(
    config: Annotated[Path, typer.Option(help="The config to train: a file, or a shipped size.")] = Path("tiny"),
    runs: Annotated[
        Path, typer.Option(help="Folder of the runs; an unfinished one is resumed, else a new one starts.")
    ] = Path("runs"),
) -> None:
    """Build a corpus, train a tokenizer and a small model, measure it, and let it write."""
    configure_logging()
    start, device = time.perf_counter(), select_device("auto")
    run, result = _train(config, runs)
    folder = run.logging.directory
    if not result.finished:
        get_logger("Quickstart").info(f"Stopped after step {result.step}; the same command resumes the run")
        print_next_steps(["dsv3", "quickstart", *_options(config, runs)])
        raise typer.Exit(130)
    tokens, saved = open_tokens_of(run.data), load_for_inference(result.checkpoint, device)
    held_out = result.validation or measure_saved(saved, tokens, run.training.evaluation.tokens, device)
    comparison = compare_with_ngrams(held_out, tokens, run, result.tokens)
    plot_run(folder, {"unigram": comparison.unigram, "bigram": comparison.bigram})
    get_console().print(comparison.table())
    get_logger("Quickstart").info(_verdict(comparison))
    _show_samples(saved)
    _write_summary(folder, comparison)
    get_logger("Quickstart").info(f"{time.perf_counter() - start:.0f} seconds in all; everything is in {folder}")
    _show_next_steps(config, run, result.checkpoint)


def _train(config: Path, runs: Path) -> tuple[RunConfig, TrainingResult]:
    """Resumes the newest unfinished run of this config, or starts a new one; returns its config and its result."""
    for folder in _unfinished(config, runs):
        with suppress(InUseError):  # another process works on it
            run = _load(config, folder, log=True)
            get_logger("Quickstart").info(f"Resuming {folder}")
            return run, train_run(run, select_device("auto"), resume="auto")
    with _new_folder(runs) as folder:
        run = _load(config, folder, log=True)
        return run, train_run(run, select_device("auto"))


def _load(config: Path, folder: Path, *, log: bool = False) -> RunConfig:
    """The config with every output in `folder`; the shipped config gets a token folder apart from the user's."""
    overrides = [f"logging.directory={folder}", f"checkpoint.directory={folder / 'checkpoints'}"]
    return load_config(config, [*overrides, *_own_tokens(config)], log=log)


def _own_tokens(config: Path) -> list[str]:
    return ["data.path=data/quickstart"] if config == Path("tiny") else []


def _unfinished(config: Path, runs: Path) -> Iterator[Path]:
    """Folders of unfinished runs of this config, the newest first."""
    folders = [folder for folder in runs.glob("quickstart*") if re.fullmatch(r"quickstart(-\d+)?", folder.name)]
    for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name), reverse=True):
        if folder.is_dir() and not (folder / _SUMMARY).exists() and _is_of(config, folder):
            yield folder


def _is_of(config: Path, folder: Path) -> bool:
    """Whether the run in a folder has this config, or has not started yet."""
    if not (folder / "config.yaml").exists():
        return all(path.name.startswith(".") for path in folder.iterdir())
    try:
        previous, wanted = load_config(folder / "config.yaml"), _load(config, folder)
    except UserError:
        return False
    return (previous.model, previous.training, previous.data) == (wanted.model, wanted.training, wanted.data)


def _options(config: Path, runs: Path) -> list[object]:
    named: list[object] = [] if config == Path("tiny") else ["--config", config]
    return [*named, *([] if runs == Path("runs") else ["--runs", runs])]


@contextmanager
def _new_folder(runs: Path) -> Iterator[Path]:
    """Creates runs/quickstart, or the first of quickstart-2, quickstart-3, … that does not exist.

    Removes the folder at the end of the block if it is empty.
    """
    for number in count(1):
        folder = runs / ("quickstart" if number == 1 else f"quickstart-{number}")
        try:
            refuse_address(folder)
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


def _write_summary(folder: Path, comparison: Comparison) -> None:
    """Writes the measured losses; this file also marks the run as finished."""
    model = comparison.model
    figures = {
        "nats_per_token": {"model": model.loss, "bigram": comparison.bigram, "unigram": comparison.unigram},
        "bits_per_byte": model.bits_per_byte,
    }
    with atomic_write(folder / _SUMMARY) as partial:
        partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _verdict(comparison: Comparison) -> str:
    gains = [
        f"{abs(baseline - comparison.model.loss):.2f} nats per token "
        f"{'better' if baseline > comparison.model.loss else 'worse'} than the {name}"
        for name, baseline in (("unigram", comparison.unigram), ("bigram", comparison.bigram))
    ]
    return f"on text it has never seen, the model is {' and '.join(gains)}"


def _show_samples(saved: LoadedModel) -> None:
    generator = Generator(saved.model, saved.tokenizer)
    sampling = SamplingConfig(max_new_tokens=60, temperature=0.7, top_p=0.9, seed=0)
    for completion in generator.generate(list(_PROMPTS), sampling):
        text = f"[dim]{escape(completion.prompt)}[/dim]{escape(completion.text)}"
        get_console().print(Panel(text, width=100, title="the model writes", title_align="left"))


def _show_next_steps(config: Path, run: RunConfig, checkpoint: Path) -> None:
    folder = run.logging.directory
    get_console().print(f"Losses: {folder}/loss.png")
    longer = override_options(["training.total_tokens=40x", *_own_tokens(config)])
    print_next_steps(
        ["dsv3", "generate", "--checkpoint", checkpoint, "--prompt", "def main("],
        ["dsv3", "eval", "--checkpoint", checkpoint],
        ["tensorboard", "--logdir", folder / "tensorboard"],
        ["dsv3", "train", "--config", config, *longer],
        ["dsv3", "tokenize", "--input", "FOLDER", "--vocab-size", 4096],
    )
