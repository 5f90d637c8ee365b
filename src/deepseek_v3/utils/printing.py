"""Text for standard output: tables, paragraphs, and signs that its encoding may lack."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

_PLAIN = {"✓": "OK", "✗": "X", "×": "x", "–": "-", "─": "-"}
_WIDTH = 110


def showable(text: str) -> str:
    """The text as standard output can print it: where signs are missing, plain ones such as OK, X and x."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        for sign, plain in _PLAIN.items():
            text = text.replace(sign, plain)
        return text.encode(encoding, "replace").decode(encoding)
    return text


def output_width() -> int:
    """Columns of the terminal; 110 where the output is none."""
    return shutil.get_terminal_size((_WIDTH, 0)).columns if sys.stdout.isatty() else _WIDTH


def paragraph(text: str) -> str:
    """The text in lines no wider than the output, broken at spaces alone."""
    return textwrap.fill(showable(text), output_width(), break_long_words=False, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[str]:
    """Lines of aligned columns, as wide as they need: the header, a rule, the rows.

    Columns are aligned to the right, except for the first and those in `left`.
    """
    cells = [[showable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_left = [index == 0 or name in left for index, name in enumerate(header)]
    lines = [
        "  ".join(
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(row, widths, is_left, strict=True)
        )
        for row in cells
    ]
    return [lines[0], showable("─") * len(lines[0]), *lines[1:]]


def side_by_side(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """Both blocks beside each other where the output is wide enough, else one below the other; ends stripped."""
    gap, width = "    ", max(map(len, one))
    if width + len(gap) + max(map(len, other)) > output_width():
        return [line.rstrip() for line in (*one, "", *other)]
    return [(left.ljust(width) + gap + right).rstrip() for left, right in zip_longest(one, other, fillvalue="")]


def spelled(name: str) -> str:
    """The name of a field or a part in words."""
    return name.replace("_", " ")


def counted(number: int, thing: str) -> str:
    """`1 document`, `2 documents`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
