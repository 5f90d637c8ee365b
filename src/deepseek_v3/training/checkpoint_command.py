"""`dsv3 checkpoint`: what a run has saved, whether it is undamaged, which of it may go, and new ones made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from deepseek_v3.utils.checkpointing.directory import (
    CheckpointDirectory,
    is_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)
from deepseek_v3.utils.checkpointing.reader import CheckpointReader, open_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import unflatten
from deepseek_v3.utils.command_line import integer_option, print_next_steps
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from deepseek_v3.utils.files import new_file_problem
from deepseek_v3.utils.logging import configure_logging, get_logger
from deepseek_v3.utils.progress import ProgressDisplay
from deepseek_v3.utils.text import format_si, pluralize, printable, table

checkpoint_app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="List, verify, remove, average and consolidate the checkpoints of a run.",
)

_FOLDER = typer.Argument(help="A folder of checkpoints.")
_PATHS = typer.Argument(help="Checkpoints, or folders of them.")
_OUTPUT = typer.Option(metavar="FILE.pt", help="The new checkpoint.")

_WEIGHTS = "model."
_OF_RESUMING = (
    "optimizer",
    "random",
    "corpus",
    "skipped_in_a_row",
    "recent_steps",
)  # entries that only resume a run

_log = get_logger("Checkpoint")


@dataclass(frozen=True)
class Found:
    """A checkpoint and what its list of contents says; `problem`: why that cannot be read, None if it can.

    `num_bytes` of all its files; `saved`: when the last of them was written; `tokens`: the run's, so far.
    """

    path: Path
    num_bytes: int
    saved: datetime
    step: int | None = None
    tokens: int | None = None
    num_tensors: int | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "path": str(self.path),
            "bytes": self.num_bytes,
            "saved": self.saved.isoformat(timespec="seconds"),
            "step": self.step,
            "tokens": self.tokens,
            "tensors": self.num_tensors,
            "problem": self.problem,
        }


@checkpoint_app.command("list")
def list_checkpoints(
    folder: Annotated[Path, _FOLDER] = Path("checkpoints"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the checkpoints of a run, the newest first. Reads their lists of contents, and no tensors."""
    configure_logging(stderr=as_json)
    found = [describe(path) for path in _checkpoints([folder])]
    if as_json:
        typer.echo(json.dumps([each.as_json() for each in found], indent=2))
        return
    header = ["checkpoint", "step", "tokens", "size", "saved", "tensors"]
    typer.echo(printable("\n".join(table(header, [_row(each) for each in found]))))
    for each in found:
        if each.problem is not None:
            _log.warning(each.problem)
    total = format_si(sum(each.num_bytes for each in found), "B")
    typer.echo(f"\n{pluralize(len(found), 'checkpoint')}, {total}")
    print_next_steps(["dsv3", "checkpoint", "verify", folder])


@checkpoint_app.command()
def verify(paths: Annotated[list[Path], _PATHS]) -> None:
    """Compare the checksum of every file of checkpoints with its bytes; fails if one is damaged."""
    configure_logging()
    found = _checkpoints(paths)
    problems = [problem for problem in verified(found) if problem is not None]
    for problem in problems:
        _log.warning(problem)
    if problems:
        raise CheckpointError(
            f"{len(problems)} of {pluralize(len(found), 'checkpoint')} damaged; `dsv3 train --resume latest` takes "
            "the newest of the others"
        )
    typer.echo(f"{pluralize(len(found), 'checkpoint')} undamaged")
    print_next_steps(["dsv3", "eval", "--checkpoint", found[0]])


@checkpoint_app.command()
def prune(
    folder: Annotated[Path, _FOLDER],
    keep: Annotated[
        int, typer.Option(metavar="NUMBER", parser=integer_option(at_least=1), help="Undamaged ones to keep.")
    ],
    every: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS",
            parser=integer_option(at_least=1),
            help="Also keep those whose step is a multiple of this.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove all but the newest undamaged checkpoints of a run. Damaged ones that are newer stay."""
    configure_logging()
    outdated = outdated_checkpoints(folder, keep, every)
    freed = sum(_size_and_time(path)[0] for path in outdated)
    for path in outdated:
        _log.info(f"{'would remove' if dry_run else 'removing'} {path}")
        if not dry_run:
            remove_checkpoint(path)
    done = "would be removed" if dry_run else "removed"
    typer.echo(f"{pluralize(len(outdated), 'checkpoint')} {done}, {format_si(freed, 'B')}")
    print_next_steps(["dsv3", "checkpoint", "list", folder])


@checkpoint_app.command()
def average(paths: Annotated[list[Path], _PATHS], output: Annotated[Path, _OUTPUT]) -> None:
    """Average the weights of checkpoints of one run, for generation, evaluation and export; it resumes no run."""
    configure_logging()
    _require_new(output)
    found = _checkpoints(paths)
    if len(found) < 2:
        raise ConfigError(f"{paths[0]}: is one checkpoint; name two or more to average, or a folder of them")
    save_checkpoint(output, averaged(found))
    typer.echo(f"{output}: the mean of {', '.join(path.name for path in found)}")
    print_next_steps(["dsv3", "eval", "--checkpoint", output])


@checkpoint_app.command()
def consolidate(
    path: Annotated[
        Path, typer.Argument(help="A checkpoint that several ranks wrote, or a folder of checkpoints.")
    ],
    output: Annotated[Path, _OUTPUT],
) -> None:
    """Write a checkpoint as one file, with all that a run needs to resume; of a folder the newest undamaged one.

    The memory of this machine must hold it.
    """
    configure_logging()
    _require_new(output)
    (newest, *_) = found = _checkpoints([path])
    if len(found) == 1:
        source, state = newest, load_checkpoint(newest)
    else:
        source, state = CheckpointDirectory(path, 1).latest()
    save_checkpoint(output, state)
    typer.echo(f"{output}: all of {source}")
    print_next_steps(["dsv3", "checkpoint", "verify", output])


def averaged(paths: Sequence[Path]) -> dict[str, Any]:
    """The state of a checkpoint whose weights are the means of those of these ones, summed in float64.

    All else but what resumes a run is that of the last step's. Raises CheckpointError for a checkpoint that is
    damaged, or has other weights or another tokenizer.
    """
    readers = sorted((open_checkpoint(path) for path in paths), key=lambda each: _count(each, "step") or 0)
    newest = readers[-1]
    names = sorted(name for name in newest.tensors if name.startswith(_WEIGHTS))
    for reader in readers:
        reader.verify()
        _require_same_model(reader, newest)
    weights = {name: _mean([reader.read(name) for reader in readers]) for name in names}
    plain = {name: value for name, value in newest.plain.items() if name not in _OF_RESUMING}
    return unflatten(weights, plain)


def _require_same_model(reader: CheckpointReader, newest: CheckpointReader) -> None:
    names = {name for one in (reader, newest) for name in one.tensors if name.startswith(_WEIGHTS)}
    different = [name for name in sorted(names) if reader.tensors.get(name) != newest.tensors.get(name)]
    if different:
        found, expected = (one.tensors.get(different[0], "nothing") for one in (reader, newest))
        problem = f"has {found} as {different[0]!r}, and {newest.path} has {expected}"
    elif reader.plain.get("tokenizer") != newest.plain.get("tokenizer"):
        problem = f"has another tokenizer than {newest.path}"
    else:
        return
    raise CheckpointError(f"{reader.path}: {problem}; average checkpoints of one run")


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """In the type of the first one, which every type of weights and routing biases can be."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)


def _require_new(output: Path) -> None:
    if problem := new_file_problem(output):
        raise ConfigError(f"--output {output}: {problem}")


def describe(path: Path) -> Found:
    """What is known of a checkpoint without reading its tensors."""
    num_bytes, saved = _size_and_time(path)
    try:
        reader = open_checkpoint(path)
    except CheckpointError as error:
        return Found(path, num_bytes, saved, problem=str(error))
    step, tokens = (_count(reader, name) for name in ("step", "tokens"))
    return Found(path, num_bytes, saved, step, tokens, len(reader.tensors))


def verified(paths: Sequence[Path]) -> list[str | None]:
    """For each checkpoint, what is wrong with its bytes; None if nothing is."""
    total = sum(_size_and_time(path)[0] for path in paths)
    problems: list[str | None] = []
    with ProgressDisplay() as display, display.task("Comparing checksums", total, "bytes", _log) as task:
        for path in paths:
            try:
                open_checkpoint(path).verify()
            except CheckpointError as error:
                problems.append(str(error))
            else:
                problems.append(None)
            task.advance(_size_and_time(path)[0])
    return problems


def outdated_checkpoints(folder: Path, keep: int, every: int | None = None) -> list[Path]:
    """The checkpoints that are older than the newest `keep` undamaged ones, and of no multiple of `every` steps.

    Raises CheckpointError if none is undamaged.
    """
    directory, newest = CheckpointDirectory(folder, keep, every or 0), _checkpoints([folder])
    num_good, places = 0, 0
    while num_good < keep and places < len(newest):
        (problem,) = verified(newest[places : places + 1])
        places += 1
        if problem is None:
            num_good += 1
        else:
            _log.warning(problem)
    if not num_good:
        raise CheckpointError(f"{folder}: none of its checkpoints is undamaged; nothing was removed")
    return [path for path in newest[places:] if not directory.keeps_for_ever(path)]


def _checkpoints(paths: Sequence[Path]) -> list[Path]:
    """Every checkpoint that the paths are or hold, the newest of a folder first.

    Raises ConfigError for a path that holds none.
    """
    found: list[Path] = []
    for path in paths:
        inside = [path] if path.exists() and is_checkpoint(path) else CheckpointDirectory(path, 1).newest_first()
        if not inside:
            raise ConfigError(f"{path}: holds no checkpoint; name a run's checkpoint.directory, or what is in it")
        found += inside
    return found


def _size_and_time(path: Path) -> tuple[int, datetime]:
    """Bytes of all files of a checkpoint, and when the last of them was written."""
    files = [entry.stat() for entry in (path.iterdir() if path.is_dir() else [path])] or [path.stat()]
    newest = max(file.st_mtime for file in files)
    return sum(file.st_size for file in files), datetime.fromtimestamp(newest).astimezone()


def _count(reader: CheckpointReader, name: str) -> int | None:
    found = reader.plain.get(name)
    return found if isinstance(found, int) else None


def _row(each: Found) -> list[str]:
    numbers = [each.step, each.tokens]
    step, tokens = ("–" if number is None else f"{number:,}" for number in numbers)
    tensors = "cannot be read" if each.num_tensors is None else f"{each.num_tensors:,}"
    return [each.path.name, step, tokens, format_si(each.num_bytes, "B"), f"{each.saved:%Y-%m-%d %H:%M}", tensors]
