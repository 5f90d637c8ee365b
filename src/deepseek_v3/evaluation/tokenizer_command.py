"""The command `dsv3 tokenizer`: measures and compares tokenizers on a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_v3.config.data_config import TokenFiles
from deepseek_v3.config.text_files import printable_path
from deepseek_v3.data.tokens.open_source import open_source
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_stats import SourceCounts, TokenizerStats
from deepseek_v3.evaluation.results_file import check_output, write_results
from deepseek_v3.evaluation.text_sources import (
    ReadingRules,
    TextSource,
    is_tokenized,
    labelled_batches,
    parse_sources,
)
from deepseek_v3.model.pretrained import checkpoint_tokenizer
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, is_checkpoint
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.command_line import print_next_steps
from deepseek_v3.utils.errors import CheckpointError, DataError
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.progress import ProgressDisplay
from deepseek_v3.utils.text import format_value, pluralize, printable, table

_MARKERS_SHOWN = 8

_log = get_logger("Tokenizer")


def tokenizer(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...", help="A tokenizer.json, a folder with one, token shards, or a checkpoint."
        ),
    ],
    data: Annotated[
        list[str], typer.Option(metavar="[NAME=]PATH", help="Text to encode and decode; may be repeated.")
    ],
    text_field: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    source_field: Annotated[
        str | None, typer.Option(help="Field of a record that names its source, instead of the file.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the results to this new file, as JSON.")] = None,
) -> None:
    """Measure tokenizers on a corpus: bytes per token, unused ids, whether text survives."""
    configure_logging()
    check_output(output)
    sources = parse_sources(data)
    for source in sources:
        if source.is_tokenized:
            raise DataError(f"--data {source.path}: holds tokens, expected text; give the files they came from")
    stats = [TokenizerStats(path, open_tokenizer(Path(path))) for path in dict.fromkeys(paths)]
    _measure(stats, sources, ReadingRules(text_field, source_field))
    typer.echo(printable("\n".join(_report(stats))))
    if output is not None:
        write_results(output, {"tokenizers": [each.as_json() for each in stats]})
    print_next_steps(_next(stats, sources[0], text_field))


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, a folder with one, token shards, or a checkpoint or a folder of them.

    Of a checkpoint only the list of contents is read. Raises DataError or CheckpointError if there is none.
    """
    if not path.exists():
        raise DataError(
            f"{printable_path(path)}: does not exist; expected a tokenizer.json, a folder or a checkpoint"
        )
    if (path / "tokenizer.json").exists():
        return (
            open_source(TokenFiles(path=path), verify=False).load_tokenizer()
            if is_tokenized(path)
            else Tokenizer.load(path)
        )
    if path.is_file() and path.suffix != ".pt":
        return Tokenizer.load(path)
    if is_checkpoint(path):
        return _of_checkpoint(path)
    checkpoints = CheckpointDirectory(path, keep=1)
    found = checkpoints.newest_first()
    if not found:
        raise DataError(
            f"{printable_path(path)}: holds no tokenizer.json and no checkpoint; name the folder that holds one"
        )
    return checkpoints.first_usable(found, _of_checkpoint)[1]


def _of_checkpoint(path: Path) -> Tokenizer:
    plain: dict[str, Any] = open_checkpoint(path).plain
    if not isinstance(plain.get("tokenizer"), str):
        raise CheckpointError(f"{path}: has no tokenizer; expected a checkpoint that this project saved")
    return checkpoint_tokenizer(plain, path)


def _measure(stats: Sequence[TokenizerStats], sources: Sequence[TextSource], rules: ReadingRules) -> None:
    with ProgressDisplay() as display, display.task("Encoding", None, "bytes", _log) as progress:
        for source in sources:
            for batch in labelled_batches(source, rules):
                for each in stats:
                    each.add(batch)
                progress.advance(sum(len(document.text.encode()) for _, document in batch), len(batch))


def _report(stats: Sequence[TokenizerStats]) -> list[str]:
    """The tables, then a line on the special tokens of each tokenizer, then those that change text."""
    header = ["tokenizer", "ids", "tokens", "bytes per token", "characters per token", "unused ids", "MB/s"]
    numbers = [f"{number} " if len(stats) > 1 else "" for number in range(1, len(stats) + 1)]
    rows = [_row(number, each) for number, each in zip(numbers, stats, strict=True)]
    lines = table([*header, "texts kept"], rows)
    if len(stats[0].sources) > 1:
        columns = ["source", "documents", "bytes", *(f"bytes per token {number}".rstrip() for number in numbers)]
        rows = [_source_row(name, [each.sources[name] for each in stats]) for name in stats[0].sources]
        lines += ["", *table(columns, rows)]
    changes = [_changes(each) for each in stats if each.total.changed]
    return [*lines, "", *map(_special, stats), *changes]


def _row(number: str, stats: TokenizerStats) -> list[str]:
    total, unused = stats.total, len(stats.unused_ids())
    kept = total.documents - total.changed
    return [
        f"{number}{stats.name}",
        f"{stats.vocabulary:,}",
        f"{total.tokens:,}",
        f"{total.bytes_per_token:.3f}",
        f"{total.characters_per_token:.3f}",
        f"{unused:,} ({unused / stats.vocabulary:.0%})",
        f"{stats.bytes_per_second / 1e6:.1f}",
        f"{kept:,} of {total.documents:,}",
    ]


def _source_row(name: str, counts: Sequence[SourceCounts]) -> list[str]:
    shown = name if name.isprintable() else format_value(name)
    ratios = [f"{each.bytes_per_token:.3f}" for each in counts]
    return [shown, f"{counts[0].documents:,}", f"{counts[0].num_bytes:,}", *ratios]


def _special(stats: TokenizerStats) -> str:
    markers, ends = stats.tokenizer.markers, stats.tokenizer.ends
    end = ", ".join(f"{stats.tokenizer.token(id_)} ({id_})" for id_ in ends)
    others = [f"{name} ({id_})" for id_, name in markers.items() if id_ not in ends]
    more = f" and {len(others) - _MARKERS_SHOWN:,} more" if len(others) > _MARKERS_SHOWN else ""
    listed = f"{', '.join(others[:_MARKERS_SHOWN])}{more}" if others else "none"
    return f"{stats.name}: end of text {end}; other special tokens: {listed}"


def _changes(stats: TokenizerStats) -> str:
    changed = stats.total.changed
    return f"{stats.name}: {pluralize(changed, 'document')} not kept, the first in {stats.first_change}"


def _next(stats: Sequence[TokenizerStats], source: TextSource, text_field: str) -> list[str]:
    """Tokenizing with the tokenizer that needs the fewest tokens among those that keep all text."""
    best = min(stats, key=lambda each: (each.total.changed, each.total.tokens))
    folder = Path(best.name)
    if folder.suffix == ".pt" or (folder.is_dir() and not (folder / "tokenizer.json").exists()):
        words = ["dsv3", "eval", best.name, "--data", source.path]
    else:
        words = ["dsv3", "tokenize", "--input", source.path, "--tokenizer", best.name]
    return words if text_field == "text" else [*words, "--text-field", text_field]
