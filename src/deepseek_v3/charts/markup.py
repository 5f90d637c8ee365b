"""HTML put together so that text cannot become markup, and cannot hide: everything that is no `Html` is escaped.

FOLDED: Numbers and names as people read them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from deepseek_v3.utils.text import humanize

# Controls but tab and newline, soft hyphens, marks of direction and of zero width, line separators, surrogates,
# private use, signs for notes, what is no character, tags. Joiners stay: scripts and emoji are made with them.
_HIDDEN = (
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    r"\ue000-\uf8ff\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)

TextRange: TypeAlias = tuple[int, int]  # characters from the first up to, not including, the second


class Html(str):
    """Markup that is safe on a page."""

    __slots__ = ()


def visible(text: str) -> str:
    """The text with signs such as [U+202E] for characters that show nothing or reorder those around them."""
    return re.sub(_HIDDEN, lambda match: f"[U+{ord(match[0]):04X}]", text)


def escape(content: str) -> Html:
    """Content as markup: `Html` as it is, any other text with its signs."""
    return content if isinstance(content, Html) else Html(html.escape(visible(content), quote=False))


def concat(contents: Iterable[str]) -> Html:
    """Contents one after the other."""
    return Html("".join(map(escape, contents)))


def element(name: str, *contents: str, **attributes: str | int | float | None) -> Html:
    """An element. Attributes that are None are left out; `class_` is class, and `aria_label` is aria-label."""
    described = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(visible(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{described}>{concat(contents)}</{name}>")


def passage(text: str, marked: Sequence[TextRange] = ()) -> Html:
    """Text of a document with the ascending spans highlighted and its hidden characters set apart."""
    pieces: list[Html] = []
    end = 0
    for start, stop in marked:
        pieces += [_with_signs(text[end:start]), element("mark", _with_signs(text[start:stop]))]
        end = stop
    return element("div", *pieces, _with_signs(text[end:]), class_="text", dir="auto")


def truncate(text: str, characters: int) -> str:
    """At most so many characters of the text."""
    return text if len(text) <= characters else text[: characters - 1] + "…"


def slug(*names: str) -> str:
    """A name for an element's id, of letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(names)).strip("-").lower()


def code(name: str) -> Html:
    """A code such as `not_json`, which may break after an underscore."""
    pieces = [escape(piece) for piece in re.split("(?<=_)", name)]
    return element("code", Html("<wbr>".join(pieces)))


class TableBody(NamedTuple):
    """Rows of a table that belong together, and what stands above them."""

    rows: Sequence[Sequence[str]]
    heading: str | None = None


def html_table(caption: str, header: Sequence[str], *bodies: TableBody, left: Sequence[int] = ()) -> Html:
    """A table that can be moved sideways where it is too wide.

    Columns are aligned to the right, but for the first and those in `left`.
    """
    titles = [element("th", title, scope="col", class_=_side(column, left)) for column, title in enumerate(header)]
    content = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *titles)),
        *(_body(body, len(header), left) for body in bodies),
    )
    return element("div", content, class_="scroll", role="region", tabindex=0, aria_label=caption)


def _body(body: TableBody, columns: int, left: Sequence[int]) -> Html:
    heading = element("th", body.heading, scope="rowgroup", colspan=columns) if body.heading else None
    rows = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_=_side(column, left)) for column, cell in enumerate(row[1:], 1)),
        )
        for row in body.rows
    ]
    return element("tbody", *([element("tr", heading, class_="group")] if heading else []), *rows)


def _side(column: int, left: Sequence[int]) -> str | None:
    return "left" if column == 0 or column in left else None


def _with_signs(text: str) -> Html:
    pieces = re.split(f"({_HIDDEN}+)", text)
    return concat(element("i", visible(piece)) if index % 2 else piece for index, piece in enumerate(pieces))


_STEPS = ("", "k", "M", "G", "T", "P", "E")
_WORD_CHARACTERS = 120
_ABBREVIATIONS = ("pii",)


def stage_title(name: str) -> str:
    """A stage's name as a heading."""
    return name.upper() if name in _ABBREVIATIONS else humanize(name).capitalize()


def count(number: int) -> str:
    """1,234,567."""
    return f"{number:,}"


def size(num_bytes: int) -> Html:
    """Bytes as 1.2 MB (10⁶), with the exact number beside it for whoever asks."""
    return element("data", scaled(num_bytes, "B"), value=num_bytes, title=f"{count(num_bytes)} bytes")


def scaled(number: float, unit: str) -> str:
    """A number of units in thousands, millions and so on: 217.5 MB, with a space that breaks no line."""
    step = 0
    while round(abs(number), 1) >= 1000 and step < len(_STEPS) - 1:
        number, step = number / 1000, step + 1
    digits = f"{number:.1f}" if step else f"{number:,.0f}"
    return f"{digits}\u00a0{_STEPS[step]}{unit}".rstrip()


def share(part: float, whole: float) -> str:
    """A part of a whole in percent: 12.3%. What is not nothing is never 0.0%, and what is not all never 100.0%."""
    if whole <= 0:
        return "–"
    percent = 100 * part / whole
    if 0 < percent < 0.05:
        return "<0.1%"
    if 99.95 <= percent < 100:
        return ">99.9%"
    return f"{percent:,.1f}%"


def figure(value: Any) -> str:
    """Any figure of a stage: numbers to four digits, lists in a row, anything else as it prints, shortened."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list):
        return truncate(", ".join(map(figure, value)), _WORD_CHARACTERS)
    return truncate(str(value), _WORD_CHARACTERS)
