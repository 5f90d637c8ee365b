"""What a document is, and the files that hold them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_v3.utils.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text, and what it is called: its id in the source, or else the file, and the place in it."""

    id: str
    text: str


def walk_files(root: Path, skipped: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """Yields `root`, if it is no folder, or everything visible below it that is none, sorted by path.

    Files and folders named in `skipped` are left out. A folder that links lead to twice is entered once, so a
    link that leads back up ends there. A link that leads nowhere is yielded as well, and so is a pipe.
    """
    entered: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        path = waiting.pop()
        if path.is_dir():
            status = path.stat()
            if (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                children = sorted(path.iterdir(), reverse=True)
                waiting += [c for c in children if not c.name.startswith(".") and c.name not in skipped]
        else:
            yield path


def check_unicode(text: str, where: str) -> None:
    """Raises DataError if `text` holds a lone surrogate: a str can, but UTF-8, and so a tokenizer, cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which no UTF-8 can express; remove it, or write both halves of the pair"
        ) from None
