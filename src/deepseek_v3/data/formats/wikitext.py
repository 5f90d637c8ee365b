"""Wikitext, the markup of MediaWiki, as plain text: what a reader sees, without tables, references and boxes.

Templates are not expanded, since their definitions are other pages. A few that only mark their argument show it;
all others are removed. Every step takes time in proportion to the text, whatever it holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from html import unescape
from typing import NamedTuple

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_MAGIC_WORD = re.compile(r"__[A-Z]{3,30}__")
# Elements whose content is no prose, and those whose content is no wikitext.
_REMOVED = (
    *("ref", "gallery", "timeline", "imagemap", "score", "graph", "hiero", "templatestyles", "mapframe"),
    *("maplink", "indicator", "section", "inputbox"),
)
_FORMULAS = ("math", "chem")
_LITERAL = (*_FORMULAS, "nowiki", "pre", "syntaxhighlight", "source", "code")
_ELEMENT = re.compile(rf"<({'|'.join(_REMOVED + _LITERAL)})\b[^<>]*>", re.IGNORECASE)
_ENDS = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in _REMOVED + _LITERAL}
_MARKUP = re.compile(r"[ \t\n!-/:-@\[-`{-~]")  # white space and ASCII punctuation

_BRACKETS = re.compile(r"\[\[|\{\{|\]\]|\}\}|^[ \t:]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_CLOSES = {"]]": "[[", "}}": "{{", "|}": "{|"}
_MAX_DEPTH = 100  # links, templates and tables in each other; what is deeper stays as it is written
# Templates that show an argument, and which one, counted from 1, or from the end.
_SHOWN_ARGUMENTS = {"lang": -1, "transl": -1, "nowrap": 1, "nobr": 1, "small": 1, "abbr": 1, "convert": 1, "cvt": 1}
_SIGNS = {
    "snd": " – ",
    "spaced ndash": " – ",
    "ndash": "–",
    "mdash": "—",
    "nbsp": " ",
    "!": "|",
    "=": "=",
    "'": "'",
}
_WITH_UNIT = ("convert", "cvt")  # the argument after the shown one is its unit

_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:)?//[^\s\[\]<>]+(?:[ \t]+([^\[\]\n]*))?\]")
_EMPHASIS = re.compile(r"'{2,}")
_RULE = re.compile(r"^-{4,}[ \t]*", re.MULTILINE)
_LEFT_OF_TABLE = re.compile(r"^[ \t]*[|!].*$", re.MULTILINE)
_LIST_ITEM = re.compile(r"^([*#:;]+)[ \t]*", re.MULTILINE)
_LINE_BREAK = re.compile(r"<br\b[^<>]*>[ \t]*\n?", re.IGNORECASE)
_SCRIPT = re.compile(r"<(su[pb])\b[^<>]*>([^<>]{1,60})</su[pb]\s*>", re.IGNORECASE)
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_EMPTY_BRACKETS = re.compile(r"[ \t]?\([ \t,;:]*\)")
_LEADING_MARKS = re.compile(r"\([ \t]*[,;:][ \t,;:]*")
_SPACES = re.compile(r"[ \t\xa0]+")
_HEADING = re.compile(r"(={1,6})\s*(\S.*?)\s*=+")

_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,10})*")
_HIDDEN_NAMESPACES = ("file", "image", "category")  # their links show no text; every wiki knows the English names


class WikitextCleaner:
    """Converts the wikitext of one wiki, whose own names of the namespaces for files and categories are given."""

    def __init__(self, hidden_namespaces: Collection[str] = ()) -> None:
        self._hidden = frozenset((*_HIDDEN_NAMESPACES, *(name.lower() for name in hidden_namespaces)))

    def to_text(self, wikitext: str) -> str:
        """The plain text of a page. Headings stand on lines of their own, and items of lists begin with "- "."""
        text = _without_elements(_COMMENT.sub("", wikitext))
        text = _LINE_BREAK.sub("\n", text)
        text = _replace_brackets(text, {"[[": self._link, "{{": _template, "{|": lambda _: ""})
        text = _EXTERNAL_LINK.sub(lambda match: match[1] or "", text)
        text = _EMPHASIS.sub("", _MAGIC_WORD.sub("", text))
        text = _RULE.sub("", _LEFT_OF_TABLE.sub("", text))
        text = _LIST_ITEM.sub(lambda match: "- " if match[1][-1] in "*#" else "", text)
        text = _SCRIPT.sub(lambda match: f"{'^' if match[1].lower() == 'sup' else '_'}{match[2]}", text)
        text = _TAG.sub("", text)
        text = _LEADING_MARKS.sub("(", _EMPTY_BRACKETS.sub("", text))
        return unescape(_paragraphs(text))

    def _link(self, content: str) -> str:
        """What a link shows: its label, or else its target."""
        target, bar, label = content.partition("|")
        namespace, colon, _ = target.partition(":")
        namespace = namespace.strip()
        if colon and (namespace.lower() in self._hidden or (not bar and _LANGUAGE.fullmatch(namespace))):
            return ""
        return label if label.strip() else target.strip().removeprefix(":")


def _without_elements(text: str) -> str:
    """Removes elements that hold no prose, and escapes the content of those that hold no wikitext."""
    parts: list[str] = []
    at = 0
    unclosed: set[str] = set()
    while match := _ELEMENT.search(text, at):
        parts.append(text[at : match.start()])
        at = match.end()
        name = match[1].lower()
        if match[0].endswith("/>") or name in unclosed:
            continue
        end = _ENDS[name].search(text, at)
        if end is None:
            unclosed.add(name)
            continue
        if name in _LITERAL:
            parts.append(_literal(text[at : end.start()], name in _FORMULAS))
        at = end.end()
    return "".join([*parts, text[at:]])


def _literal(content: str, is_formula: bool) -> str:
    """The content of an element, its markup as references that no later step sees; formulas between dollars."""
    plain = unescape(content)
    plain = f"${plain.strip()}$" if is_formula else plain.strip("\n")
    escaped = _MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain)
    return f"\n\n{escaped}\n\n" if "\n" in plain else escaped


class _Frame(NamedTuple):
    """An opening bracket, and the parts of the text after it."""

    bracket: str
    parts: list[str]


def _replace_brackets(text: str, converters: Mapping[str, Callable[[str], str]]) -> str:
    """Replaces what stands between brackets, from the inside out, by what the converter of the bracket returns.

    Brackets that are not closed are removed, and their content stays.
    """
    stack = [_Frame("", [])]
    open_brackets: Counter[str] = Counter()
    at = 0
    for match in _BRACKETS.finditer(text):
        stack[-1].parts.append(text[at : match.start()])
        at = match.end()
        bracket = match[0].strip(" \t:")
        opening = _CLOSES.get(bracket)
        if opening is None and len(stack) <= _MAX_DEPTH:
            stack.append(_Frame(bracket, []))
            open_brackets[bracket] += 1
        elif opening is None or not open_brackets[opening]:
            stack[-1].parts.append(match[0])
        else:
            _unwind(stack, open_brackets, opening)
            content = "".join(stack.pop().parts)
            open_brackets[opening] -= 1
            stack[-1].parts.append(converters[opening](content))
    stack[-1].parts.append(text[at:])
    _unwind(stack, open_brackets, "")
    return "".join(stack[0].parts)


def _unwind(stack: list[_Frame], open_brackets: Counter[str], bracket: str) -> None:
    """Removes the frames above the last one of `bracket`, and adds their content to it."""
    while stack[-1].bracket != bracket:
        frame = stack.pop()
        open_brackets[frame.bracket] -= 1
        stack[-1].parts.extend(frame.parts)


def _template(content: str) -> str:
    """What a template shows: a sign, or an argument that it only marks; else nothing."""
    name, *arguments = content.split("|")
    name = name.strip().lower()
    if name in _SIGNS:
        return _SIGNS[name]
    shown = _SHOWN_ARGUMENTS.get(name)
    values = [value.strip() for value in arguments if "=" not in value]
    if shown is None or not values:
        return ""
    return " ".join(values[:2]) if name in _WITH_UNIT else values[shown - (shown > 0)]


def _paragraphs(text: str) -> str:
    """The lines of a text with blank lines around headings, without headings that have no text below them."""
    lines: list[str] = []
    headings: list[tuple[int, str]] = []  # without text below them so far
    for line in _SPACES.sub(" ", text).split("\n"):
        line = line.strip()
        heading = _HEADING.fullmatch(line)
        if heading:
            level = len(heading[1])
            headings = [*(one for one in headings if one[0] < level), (level, heading[2])]
        elif line not in ("", "-"):
            for _, title in headings:
                lines += ["", title, ""]
            headings = []
            lines.append(line)
        else:
            lines.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
