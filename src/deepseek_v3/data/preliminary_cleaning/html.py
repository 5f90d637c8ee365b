"""Recognising HTML, and extracting its visible text."""

from __future__ import annotations

import re
from itertools import accumulate

from resiliparse.extract.html2text import extract_plain_text

_PAGE = re.compile(
    r"\s*(?:<\?xml[^<>]*>\s*)?(?:<!--(?:[^-]|-(?!->))*-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE
)
_FRAGMENT = re.compile(
    r"\s*<(?:a|article|aside|b|blockquote|br|center|dd|div|dl|dt|em|figure|font|footer|form|h[1-6]|header|hr|i|iframe"
    r"|img|li|link|main|meta|nav|ol|p|pre|script|section|span|strong|style|table|tbody|td|th|title|tr|u|ul)\b[^<>]*>",
    re.IGNORECASE,
)
# Deep nesting of these elements makes the extraction quadratic, or its indentation large.
_NESTED = re.compile(
    r"<(/?)(?:article|aside|blockquote|center|dir|div|dl|footer|form|header|main|menu|nav|ol|section|table|ul)\b",
    re.IGNORECASE,
)
_DEEP = 100


def is_html(text: str) -> bool:
    """Whether a text is an HTML page, or a fragment, which starts with a common tag and ends with a tag.

    Text that only mentions tags, such as a tutorial, is not HTML.
    """
    if not text.lstrip().startswith("<"):
        return False
    return bool(_PAGE.match(text)) or (text.rstrip().endswith(">") and bool(_FRAGMENT.match(text)))


def html_to_text(text: str, main_content: bool) -> str:
    """The visible text, formatted in paragraphs, lists and preformatted parts; or only the main content's text.

    A page with more than 100 levels of nested elements gives its whole text, without formatting.
    """
    if _nesting(text) > _DEEP:
        return extract_plain_text(text, preserve_formatting=False, alt_texts=False)
    return extract_plain_text(text, main_content=main_content, alt_texts=False)


def _nesting(text: str) -> int:
    """The largest number of elements that are open at once; an upper bound if some are not closed."""
    steps = (-1 if match[1] else 1 for match in _NESTED.finditer(text))
    return max(accumulate(steps), default=0)
