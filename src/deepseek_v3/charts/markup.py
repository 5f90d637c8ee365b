"""HTML put together so that text cannot become markup, and cannot hide: everything that is no `Html` is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from deepseek_v3.utils.text import format_si, humanize

_ABBREVIATIONS = ("pii",)

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


def stage_title(name: str) -> str:
    """A stage's name as a heading."""
    return name.upper() if name in _ABBREVIATIONS else humanize(name).capitalize()


def size(num_bytes: int) -> Html:
    """A size such as 1.2 MB (10⁶ bytes), with the exact number of bytes as its tooltip."""
    return element("data", format_si(num_bytes, "B"), value=num_bytes, title=f"{num_bytes:,} bytes")
