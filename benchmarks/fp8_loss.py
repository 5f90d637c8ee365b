"""Compares the loss of FP8 training with that of bfloat16: `python benchmarks/fp8_loss.py`.

Trains `fp8_loss.yaml` in both precisions with each seed, by the trainer that users run: the same tokens, order and
initial weights in both. The tokens are the source text and documents of the Python packages of this machine, or
the files of `--source`. Every finished run leaves a file in `FOLDER/runs` and is not repeated, so the runs may be
divided over several calls with `--only-seeds` and `--precision`. When all are there, the script writes
`fp8_loss.json`, `fp8_loss.csv` and `fp8_loss.png`: the difference of the held-out losses, with its interval, beside
the spread of the seeds in bfloat16.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from environment import RESULTS, environment
from loss_difference import compare, draw, table

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.planning.counts import count_active_parts, count_parameters
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.training.validation import ValidationWindows
from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.distributed.launch import select_device
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.monitoring import read_metrics

SHAPE = Path(__file__).with_suffix(".yaml")
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
HELD_OUT_TOKENS = 2_097_152  # after the last step
LONGEST = 1_000_000  # bytes of a file; longer ones hold data rather than text

_log = get_logger("Loss")


def installed_files() -> list[Path]:
    """The text files of this Python and its packages."""
    roots = {Path(json.__file__).parents[1], Path(torch.__file__).parents[1]}
    found = {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    return sorted(found)


def write_corpus(source: Path | None, output: Path, megabytes: int) -> None:
    """Writes documents to `output`, one JSON line each: those with the smallest hashes, up to a size, once each."""
    paths = installed_files() if source is None else sorted(path for path in source.rglob("*") if path.is_file())
    if not paths:
        raise ConfigError(f"--source {source}: expected a folder with files of text")
    texts = {blake2b(text.encode(), digest_size=16).digest(): text for text in _texts(paths)}
    output.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with atomic_write(output) as partial, partial.open("w", encoding="utf-8") as lines:
        for name in sorted(texts):
            if written > megabytes * 10**6:
                break
            written += lines.write(json.dumps({"text": texts[name]}) + "\n")
    _log.info(f"{output}: {written / 1e6:,.0f} MB of the text of {len(paths):,} files")


def _texts(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.stat().st_size <= LONGEST:
            text = path.read_bytes().decode("utf-8", errors="ignore")
            if text.strip() and "\0" not in text:  # which binary files have
                yield text


def prepare_tokens(config: RunConfig, source: Path | None, folder: Path, megabytes: int) -> None:
    """Writes and tokenizes the corpus, unless its tokens are there."""
    corpus = config.data.corpus
    assert corpus is not None
    if config.data.path.exists():
        return
    begin, text = time.perf_counter(), folder / "text" / "corpus.jsonl"
    if not text.exists():
        write_corpus(source, text, megabytes)
    summary = tokenize_corpus(
        str(text),
        config.data.path,
        vocab_size=corpus.vocab_size,
        tokenizer=None,
        holdout=corpus.holdout,
        fim_rate=corpus.fim_rate,
        seed=corpus.seed,
        sequence_length=config.training.sequence_length,
    )
    _log.info(
        f"{summary.train.tokens:,} tokens to train on and {summary.holdout.tokens:,} held out, "
        f"in {time.perf_counter() - begin:.0f} s"
    )


def run(config: RunConfig, other: RunConfig, device: torch.device) -> dict[str, Any]:
    """Trains once; returns the losses by step, and the held-out loss of every batch at the end.

    The final weights are also judged in the precision of `other`: rounding harms what weights say, and may harm
    what they learn.
    """
    begin = time.perf_counter()
    trainer = Trainer(config, device)
    trainer.run()
    losses = batch_losses(trainer, config, device)
    (model,) = trainer.engine.models
    judge = Trainer(other, device)
    judge.engine.models[0].load_state_dict(model.state_dict())
    records = list(read_metrics(config.logging.directory / "metrics.jsonl"))
    rates = sorted(record["tokens_per_second"] for record in records[1:] if "tokens_per_second" in record)
    return {
        "train": [[record["step"], record["loss"]] for record in records if "loss" in record],
        "held_out": [[record["step"], record["holdout_loss"]] for record in records if "holdout_loss" in record],
        "final_held_out": fmean(losses),
        "final_held_out_in_the_other": fmean(batch_losses(judge, other, device)),
        "held_out_tokens": len(losses) * config.parallel.micro_batch_size * config.training.sequence_length,
        "held_out_batches": losses,
        "tokens_per_second_median": rates[len(rates) // 2] if rates else None,
        "seconds": time.perf_counter() - begin,
    }


def batch_losses(trainer: Trainer, config: RunConfig, device: torch.device) -> list[float]:
    """The mean loss of each batch of held-out windows, the same windows for every run."""
    length, size = config.training.sequence_length, config.parallel.micro_batch_size
    source = trainer.tokens.parts[0].source
    windows = ValidationWindows(source, length, HELD_OUT_TOKENS)
    starts = range(0, len(windows.numbers) - size + 1, size)
    batches = (torch.from_numpy(windows.read(windows.numbers[first : first + size])).to(device) for first in starts)
    return trainer.engine.evaluate(batches).losses_G.tolist()


def trained(
    config: RunConfig, other: RunConfig, file: Path, device: torch.device, commit: str | None
) -> dict[str, Any]:
    """The result in `file`; trains first, as `run` does, if it is not there."""
    if not file.exists():
        torch._dynamo.reset()  # each run compiles its own layers, as a process of its own would
        for left in (config.logging.directory, config.checkpoint.directory):  # of a run that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        where = environment("torch", "numpy", commit=commit)
        result = {"environment": where, **run(config, other, device)}
        shutil.rmtree(config.checkpoint.directory)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(result), encoding="utf-8")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return dict(json.loads(file.read_text(encoding="utf-8")))


def main(
    folder: Annotated[Path, typer.Option(help="Where tokens and finished runs are kept.")] = Path("data/fp8_loss"),
    output: Annotated[Path, typer.Option(help="Where the comparison is written.")] = RESULTS,
    shape: Annotated[Path, typer.Option(help="The run to compare.")] = SHAPE,
    seeds: Annotated[str, typer.Option(help="Seeds to compare, one pair of runs each.")] = "0,1,2",
    baseline: Annotated[str, typer.Option(help="The precision to compare with.")] = "bf16",
    candidate: Annotated[str, typer.Option(help="The precision to judge.")] = "fp8",
    precision: Annotated[str | None, typer.Option(help="Run only this precision in this call.")] = None,
    only_seeds: Annotated[str | None, typer.Option(help="Run only these seeds in this call.")] = None,
    source: Annotated[Path | None, typer.Option(help="A folder of text, instead of installed packages.")] = None,
    megabytes: Annotated[int, typer.Option(min=1, help="The size of the corpus at most.")] = 120,
    merge: Annotated[bool, typer.Option("--merge", help="Run nothing; compare the finished runs.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."),
    ] = None,
    commit: Annotated[str | None, typer.Option(help="Where the code has no history beside it.")] = None,
) -> None:
    """Train in two precisions with several seeds, and compare the held-out losses."""
    configure_logging()
    place = select_device(device)
    places = [f"data.path={folder}/tokens", f"checkpoint.directory={folder}/checkpoints"]
    places += [f"logging.directory={folder}/run", f"data.corpus.source={folder}/text/corpus.jsonl"]
    overrides = [*places, *(override or [])]

    def config_of(name: str, seed: int, *more: str) -> RunConfig:
        return load_config(shape, [*overrides, f"parallel.precision={name}", f"training.seed={seed}", *more])

    if precision not in (None, baseline, candidate):
        raise ConfigError(f"--precision {precision}: expected {baseline} or {candidate}, which are compared")
    if len(set(_numbers("--seeds", seeds))) < 2:
        raise ConfigError(f"--seeds {seeds}: expected at least two seeds, whose spread is the measure")
    chosen_seeds = _numbers("--only-seeds", seeds if only_seeds is None else only_seeds)
    pairs = [(name, seed) for seed in _numbers("--seeds", seeds) for name in (baseline, candidate)]
    first = config_of(*pairs[0])
    # A changed recipe must not reuse the runs of another one.
    others = {"data": True, "checkpoint": True, "logging": True}
    recipe = first.model_dump_json(exclude={**others, "training": {"seed"}, "parallel": {"precision"}})
    runs = folder / "runs" / blake2b(recipe.encode(), digest_size=4).hexdigest()
    if not merge:
        prepare_tokens(first, source, folder, megabytes)
    results, missing = {}, []
    for name, seed in pairs:
        file = runs / f"{name}_seed{seed}.json"
        chosen = precision in (None, name) and seed in chosen_seeds
        if file.exists() or (chosen and not merge):
            other = candidate if name == baseline else baseline
            judge = [f"{each}.directory={folder}/judge_{each}" for each in ("checkpoint", "logging")]
            judged = config_of(other, seed, *judge)
            results[name, seed] = trained(config_of(name, seed), judged, file, place, commit)
        else:
            missing.append(f"{name} with seed {seed}")
    if missing:
        typer.echo(f"To be compared when these are finished, too: {', '.join(missing)}")
        return
    where = results[pairs[0]]["environment"]
    devices = {str(result["environment"]["device"]) for result in results.values()}
    if len(devices) > 1:
        raise ConfigError(f"{runs}: runs of {' and '.join(sorted(devices))}; expected those of one kind of device")
    parts = count_active_parts(first.model)
    figures = {
        "active_parameters": parts.total,
        "active_besides_embeddings": parts.total - parts.head,
        "parameters": count_parameters(first.model).total,
        "steps": results[pairs[0]]["train"][-1][0],
        "tokens_per_step": first.tokens_per_step,
        "held_out_tokens": results[pairs[0]]["held_out_tokens"],
        **compare(results, baseline, candidate),
    }
    text = json.dumps({**where, "results": figures}, indent=2)
    output.mkdir(parents=True, exist_ok=True)
    (output / "fp8_loss.json").write_text(text + "\n", encoding="utf-8")
    (output / "fp8_loss.csv").write_text(table(results), encoding="utf-8")
    draw(results, baseline, candidate, output / "fp8_loss.png")
    typer.echo(text)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: expected whole numbers with commas between them, such as 0,1,2"
        ) from None


if __name__ == "__main__":
    run_command(main)
