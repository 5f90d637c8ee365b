"""Jupyter notebooks as Markdown: the text cells, and the code cells as fenced code, without outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from deepseek_v3.data.formats.batches import json_type
from deepseek_v3.data.formats.json_values import BYTE_ORDER_MARK, parse_json
from deepseek_v3.data.formats.plain_text import ParsedFile
from deepseek_v3.data.formats.quarantine import InvalidRecord

_FENCE = re.compile(r"^ *(`{3,})", re.MULTILINE)
_EMBEDDED_IMAGE = re.compile(r"!\[([^\[\]]*)\]\(data:[^()\s]*\)")


def parse_notebook(data: bytes) -> ParsedFile:
    """The cells of a notebook of nbformat 4 or 3, with a blank line between them.

    Raw cells are left out like outputs, and so are images whose data stand in the text; their captions stay. Raises
    InvalidRecord if the file is not JSON, or not a notebook.
    """
    parsed = parse_json(data.removeprefix(BYTE_ORDER_MARK), 0)
    if parsed.not_utf8:
        raise parsed.not_utf8
    notebook = parsed.value
    language = _language(notebook)
    cells = [
        text for number, cell in enumerate(_cells(notebook), start=1) if (text := _text(cell, number, language))
    ]
    metadata = {"content_type": "text/markdown", **({"code_language": language} if language else {})}
    return ParsedFile("\n\n".join(cells) + "\n" if cells else "", metadata, parsed.repairs)


def _cells(notebook: Any) -> Iterator[Any]:
    """The cells; in nbformat 3 they are in worksheets."""
    if not isinstance(notebook, dict):
        raise InvalidRecord("not_notebook", f"holds {json_type(notebook)}, expected an object with a list `cells`")
    sheets = notebook.get("worksheets", [notebook])
    for sheet in sheets if isinstance(sheets, list) else [sheets]:
        cells = sheet.get("cells") if isinstance(sheet, dict) else None
        if not isinstance(cells, list):
            raise InvalidRecord("not_notebook", f"`cells` is {json_type(cells)}, expected a list of cells")
        yield from cells


def _text(cell: Any, number: int, language: str) -> str:
    kind = cell.get("cell_type") if isinstance(cell, dict) else None
    if not isinstance(kind, str):
        raise InvalidRecord("not_notebook", f"cell {number} has no `cell_type`, expected markdown, code or raw")
    source = cell.get("source", cell.get("input"))
    lines = [source] if isinstance(source, str) else source
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InvalidRecord(
            "not_notebook",
            f"cell {number}: `source` is {json_type(source)}, expected a string or a list of strings",
        )
    text = "".join(lines).strip("\n")
    if kind == "code":
        return _fenced(text, language) if text.strip() else ""
    if kind == "heading":  # nbformat 3
        return f"{'#' * _level(cell)} {text}"
    return _EMBEDDED_IMAGE.sub(r"\1", text) if kind == "markdown" else ""


def _fenced(code: str, language: str) -> str:
    """Code between fences that are longer than any in it."""
    fence = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(code))])
    return f"{fence}{language}\n{code}\n{fence}"


def _level(cell: dict[str, Any]) -> int:
    level = cell.get("level")
    return level if isinstance(level, int) and 1 <= level <= 6 else 1


def _language(notebook: Any) -> str:
    """The programming language by the metadata of a notebook, or an empty string."""
    metadata = notebook.get("metadata") if isinstance(notebook, dict) else None
    for section, field in (("language_info", "name"), ("kernelspec", "language")):
        values = metadata.get(section) if isinstance(metadata, dict) else None
        name = values.get(field) if isinstance(values, dict) else None
        if isinstance(name, str) and name.isprintable() and " " not in name:
            return name
    return ""
