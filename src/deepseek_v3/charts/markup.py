"""HTML pages, elements and tables. Text that is not `Html` is escaped, and its hidden characters are shown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from deepseek_v3.charts.style import STYLE
from deepseek_v3.utils.text import format_si

# Control characters other than tab and newline, soft hyphens, direction marks, zero-width characters, line
# separators, surrogates, private use, annotations, noncharacters, tags. Joiners are left out:
# scripts and emoji need them.
_HIDDEN = (
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    r"\ue000-\uf8ff\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)

# Even if a text got past the escaping, the browser would neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

TextRange: TypeAlias = tuple[int, int]  # start and end in characters; the end is exclusive


class Html(str):
    """Markup, which is not escaped again."""

    __slots__ = ()


def visible(text: str) -> str:
    """Replaces characters that are invisible or reorder others by their codes, such as [U+202E]."""
    return re.sub(_HIDDEN, lambda match: f"[U+{ord(match[0]):04X}]", text)


def escape(content: str) -> Html:
    """Returns `Html` unchanged, and escapes any other text after making it `visible`."""
    return content if isinstance(content, Html) else Html(html.escape(visible(content), quote=False))


def concat(contents: Iterable[str]) -> Html:
    """Escapes the contents and concatenates them."""
    return Html("".join(map(escape, contents)))


def element(name: str, *contents: str, **attributes: str | int | float | None) -> Html:
    """An HTML element without the attributes that are None. `class_` is class, and `aria_label` is aria-label."""
    return Html(f"{_start(name, attributes)}{concat(contents)}</{name}>")


def image(source: str, alt: str, **attributes: str | int | float | None) -> Html:
    """An image of the address `source`, with `alt` for those who do not see it; attributes as in `element`."""
    return _start("img", {"src": source, "alt": alt, **attributes})


def _start(name: str, attributes: Mapping[str, str | int | float | None]) -> Html:
    described = "".join(
        f' {key.strip("_").replace("_", "-")}="{html.escape(visible(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{described}>")


def passage(text: str, marked: Sequence[TextRange] = ()) -> Html:
    """The text of a document with the ascending ranges `marked` highlighted and hidden characters as codes."""
    parts: list[Html] = []
    end = 0
    for start, stop in marked:
        parts += [_with_signs(text[end:start]), element("mark", _with_signs(text[start:stop]))]
        end = stop
    return element("div", *parts, _with_signs(text[end:]), class_="text", dir="auto")


def slug(*names: str) -> str:
    """A value for the id of an element, of letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(names)).strip("-").lower()


def code(name: str) -> Html:
    """A code element such as `not_json`; its line may break after an underscore."""
    parts = [escape(part) for part in re.split("(?<=_)", name)]
    return element("code", Html("<wbr>".join(parts)))


class TableBody(NamedTuple):
    """A group of rows in a table, and the heading above them."""

    rows: Sequence[Sequence[str]]
    heading: str | None = None


def html_table(caption: str, header: Sequence[str], *bodies: TableBody, left: Sequence[int] = ()) -> Html:
    """A table that scrolls horizontally if it is too wide.

    Columns are aligned to the right, except the first one and those in `left`.
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
    parts = re.split(f"({_HIDDEN}+)", text)
    return concat(element("i", visible(part)) if index % 2 else part for index, part in enumerate(parts))


def byte_size(num_bytes: int) -> Html:
    """A size such as 1.2 MB (10⁶ bytes), with the exact number of bytes in its tooltip."""
    return element("data", format_si(num_bytes, "B"), value=num_bytes, title=f"{num_bytes:,} bytes")


def html_page(title: str, header: Html, sections: Mapping[str, Html], style: str = "") -> str:
    """The whole page: a heading, `header`, links to the sections, and the sections by heading.

    `style` holds the rules of this kind of page, in addition to those that all pages share.
    """
    links = [element("a", name, href=f"#{slug(name)}") for name in sections]
    body = element(
        "body",
        element("header", element("h1", title), header),
        element("nav", *links, aria_label="Sections"),
        element("main", *(_section(name, content) for name, content in sections.items())),
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{STYLE}{style}</style>
</head>
{body}
</html>
"""


def _section(name: str, content: Html) -> Html:
    key = slug(name)
    return concat(["\n", element("section", element("h2", name, id=key), content, aria_labelledby=key)])
