"""Recognising HTML, and extracting its visible text."""

from __future__ import annotations

import re
from itertools import accumulate

from resiliparse.extract.html2text import extract_plain_text

from deepseek_v3.data.content import Content

_START = r"\s*(?:<\?xml[^<>]*>\s*)?(?:<!--(?:[^-]|-(?!->))*-->\s*)*"
_PAGE = re.compile(rf"{_START}<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_ELEMENTS = (
    "a|abbr|address|article|aside|b|blockquote|br|caption|center|cite|code|col|colgroup|dd|del|details|div|dl|dt|em"
    "|figcaption|figure|font|footer|form|h[1-6]|header|hr|i|iframe|img|ins|kbd|li|link|main|mark|meta|nav|noscript|ol"
    "|p|picture|pre|q|s|samp|script|section|small|source|span|strike|strong|style|sub|summary|sup|table|tbody|td|tfoot"
    "|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
_INNER = (
    "area|audio|bdi|bdo|big|button|canvas|data|datalist|dialog|dir|embed|fieldset|hgroup|image|input|label|legend|map"
    "|menu|meter|object|optgroup|option|output|param|progress|rp|rt|ruby|search|select|svg|textarea|track|acronym"
    "|body|head|html|defs|g|path|circle|ellipse|line|polygon|polyline|rect|stop|symbol|text|tspan|use|math|m[a-z]+"
)
_FRAGMENT = re.compile(rf"{_START}<(?!(?:script|style)\b)(?:{_ELEMENTS})\b[^<>]*>", re.IGNORECASE)
_HTML_FILE = re.compile(rf"{_START}<(?:!doctype|html|head|body|{_ELEMENTS})\b", re.IGNORECASE)
_HIDDEN = re.compile(
    r"<(?:script|style)\b(?:[^<]|<(?!/?(?:script|style)\b))*|<!--(?:[^-]|-(?!->))*-->", re.IGNORECASE
)
# The signs of XML, of a component or of a template: other elements than those of HTML; attributes of Vue, Svelte,
# Angular and JSX; the marks of template languages.
_TAG_NAME = re.compile(r"<([A-Za-z][\w:.-]*)")
_ELEMENT = re.compile(rf"(?:{_ELEMENTS}|{_INNER})\Z", re.IGNORECASE)
_TEMPLATE = re.compile(
    r"<[A-Za-z][^<>]*?\s(?:v-[a-z]|[@:#*(\[][A-Za-z][\w.:()\]-]*=|(?:on|bind|use|class|let|slot):[A-Za-z]"
    r"|(?:className|htmlFor|onClick|onChange|ng-[a-z-]+)=|[A-Za-z-]+=\{|\{)"
    r"|\{\{|\{[%#@:/]|<%|<\?(?!xml)|<>"
)
_MARKDOWN = re.compile(r"^ {0,3}(?:```|~~~|#{1,6} |[-=]{3,}$)|\]\(", re.MULTILINE)
# Deep nesting of these elements makes the extraction quadratic, or its indentation large.
_NESTED = re.compile(
    r"<(/?)(?:article|aside|blockquote|center|dir|div|dl|footer|form|header|main|menu|nav|ol|section|table|ul)\b",
    re.IGNORECASE,
)
_DEEP = 100

_LISTS = re.compile(r"<(/?)(ul|ol|pre)\b[^<>]*>", re.IGNORECASE)
_SCRIPT = re.compile(
    r"<(sup|sub)\b[^<>]{0,100}>((?:[^<>]|</?(?:i|b|em|strong|var|span|small)\b[^<>]{0,100}>){1,60})</\1\s*>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<[^<>]*>")
_PLAIN_SCRIPT = re.compile(r"(?:st|nd|rd|th|er|re|e|è|ème|o|a|os|as|tm|sm|[®™©°ªº]+|\W*)\Z", re.IGNORECASE)


def is_html(text: str, content: Content = None) -> bool:
    """Whether a text is HTML: not code or prose by its own account, and with the structure of HTML.

    Structure is the start of a page, or a fragment: it begins with a common element and ends with a tag, and holds
    neither foreign elements nor the signs of a template, a component or Markdown. A document that calls itself HTML
    only has to begin with a doctype or an element. Text that only mentions tags, such as a tutorial, is not HTML.
    """
    if content in ("code", "prose") or not text.lstrip().startswith("<"):
        return False
    if content == "html":
        return bool(_HTML_FILE.match(text))
    return bool(_PAGE.match(text)) or _is_fragment(text)


def _is_fragment(text: str) -> bool:
    if not text.rstrip().endswith(">") or not _FRAGMENT.match(text):
        return False
    shown = _HIDDEN.sub("", text)
    if _TEMPLATE.search(shown) or _MARKDOWN.search(shown):
        return False
    return all(map(_ELEMENT.match, set(_TAG_NAME.findall(shown))))


def html_to_text(text: str, main_content: bool) -> str:
    """The visible text, formatted in paragraphs, lists and preformatted parts; or only the main content's text.

    Superscripts and subscripts stay distinct from the text before them: 10^6, x_i. A page with more than 100 levels
    of nested elements gives its whole text, without formatting.
    """
    text = _SCRIPT.sub(_marked_script, text)
    if _nesting(text) > _DEEP:
        return extract_plain_text(text, preserve_formatting=False, alt_texts=False)
    return extract_plain_text(_code_on_own_lines(text), main_content=main_content, alt_texts=False)


def _marked_script(match: re.Match[str]) -> str:
    """A superscript or subscript with a mark before it; ordinals (1st) and signs stay as they are."""
    shown = _TAG.sub("", match[2]).strip()
    if _PLAIN_SCRIPT.match(shown):
        return match[0]
    mark = "^" if match[1].lower() == "sup" else "_"
    is_simple = len(shown) == 1 or re.fullmatch(r"[-+−]?\d+", shown)
    return f"{mark}{shown}" if is_simple else f"{mark}{{{shown}}}"


def _code_on_own_lines(text: str) -> str:
    """Puts preformatted text in lists below the item's line, whose indentation only the first line would get."""
    depth = 0

    def separate(match: re.Match[str]) -> str:
        nonlocal depth
        if match[2].lower() == "pre":
            return f"{match[0]}\n\n" if depth and not match[1] else match[0]
        depth = max(depth + (-1 if match[1] else 1), 0)
        return match[0]

    return _LISTS.sub(separate, text)


def _nesting(text: str) -> int:
    """The largest number of elements that are open at once; an upper bound if some are not closed."""
    steps = (-1 if match[1] else 1 for match in _NESTED.finditer(text))
    return max(accumulate(steps), default=0)
