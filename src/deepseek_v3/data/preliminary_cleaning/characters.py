"""Removing control and invisible characters, Unicode normalization, and tidying of white space."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

_LINE_ENDS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # those of Python's splitlines, except \n
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_CONTROLS = "".join(chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (0x09, 0x0A))
_CONTROL = re.compile(f"[{re.escape(_CONTROLS)}]")
_NONCHARACTERS = "".join(
    [chr(code) for code in range(0xFDD0, 0xFDF0)]
    + [chr(plane * 0x10000 + low) for plane in range(17) for low in (0xFFFE, 0xFFFF)]
)
# Soft hyphen, word joiner, invisible operators, deprecated controls, byte order mark, annotation.
_INVISIBLE = "\u00ad\u2060\u2061\u2062\u2063\u2064\u206a\u206b\u206c\u206d\u206e\u206f\ufeff\ufff9\ufffa\ufffb"
REPLACED = {
    **dict.fromkeys(_CONTROLS + _NONCHARACTERS + _INVISIBLE, ""),
    **dict.fromkeys(_LINE_ENDS, "\n"),
    **dict.fromkeys(_SPACES, " "),
}

JOINERS = "\u200b\u200c\u200d"  # zero-width space, non-joiner and joiner
# Scripts in which joiners change the meaning: Arabic to Tibetan, Myanmar, Philippine scripts, Khmer, Mongolian,
# Limbu to Tai Tham, Balinese to Lepcha, Syloti Nagri to Saurashtra, Javanese to Myanmar Extended-A, Meetei Mayek,
# Hanifi Rohingya, Sogdian, Brahmi and all its relatives, Adlam.
_JOINING = (
    "\u0600-\u0fff\u1000-\u109f\u1700-\u18af\u1900-\u1aaf\u1b00-\u1c4f\ua800-\ua82f\ua840-\ua8ff\ua980-\uaa7f"
    "\uaae0-\uaaff\uabc0-\uabff\U00010d00-\U00010d3f\U00010f30-\U00010fdf\U00011000-\U00011fff\U0001e900-\U0001e95f"
)
# Scripts in which a zero-width space separates words: Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le to New Tai Lue,
# Tai Tham, Balinese, Javanese and Myanmar Extended.
_SPACING = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaa7f"
)
_EMOJI = (
    "\u00a9\u00ae\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u27bf\u2900-\u297f\u2b00-\u2bff\U0001f000-\U0001faff"
)
_STRAY_JOINER = re.compile(
    rf"(?<![{_SPACING}])\u200b(?![{_SPACING}])|(?<![{_JOINING}])\u200c|(?<![{_JOINING}{_EMOJI}\ufe0f\u20e3])\u200d|(?<![{_JOINING}])\u200d(?![{_EMOJI}])"
)
TAGS = "".join(map(chr, range(0xE0000, 0xE0080)))  # used only in the flags of regions
_FLAG_OR_TAG = re.compile(rf"(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[{TAGS}]")

# Escape sequences of terminals (ECMA-48): colours and movements, titles and links, character sets and modes; and
# characters that a backspace overstrikes.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/][0-~]|[78=>DEHMNOZc])|[^\n\x08]\x08"
)

_MARKS = "".join(char for char in map(chr, range(0x300, 0x20000)) if unicodedata.combining(char))
_FENCES = ("```", "~~~")
_MANY_MARKS = re.compile(rf"([{_MARKS}]{{30}})[{_MARKS}]+")


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined, and with U+FFFD for each lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def replace_characters(text: str, remove_bidi_controls: bool) -> str:
    """The text with \\n for every line end and U+0020 for every space, without control and invisible characters.

    Joiners stay in emoji and in scripts that need them, and tags stay in flags.
    """
    text = without_escapes(text).replace("\r\n", "\n")
    present = set(text)
    for char in present & REPLACED.keys():
        text = text.replace(char, REPLACED[char])
    if remove_bidi_controls:
        for char in present.intersection(BIDI_CONTROLS):
            text = text.replace(char, "")
    if not present.isdisjoint(TAGS):
        text = _FLAG_OR_TAG.sub(r"\1", text)
    return text if present.isdisjoint(JOINERS) else _STRAY_JOINER.sub("", text)


def replace_in_code(text: str) -> str:
    """The text of source code with \\n for every line end, without control characters and a byte order mark.

    All other characters stay, because code may compare them.
    """
    text = without_escapes(text).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROL.sub("", text)


def without_escapes(text: str) -> str:
    """The text without the escape sequences of terminals, and without characters that a backspace overstrikes."""
    return _ESCAPES.sub("", text) if "\x1b" in text or "\x08" in text else text


def normalize(text: str, form: Literal["NFC", "NFKC"]) -> str:
    """The text in a Unicode normal form.

    If it is not normal yet, at most 30 combining marks in a row are kept, because ordering them takes quadratic
    time. No language uses more (Unicode Standard Annex 15, stream-safe text format).
    """
    if unicodedata.is_normalized(form, text):
        return text
    return unicodedata.normalize(form, _MANY_MARKS.sub(r"\1", text))


def tidy_white_space(text: str, max_blank_lines: int | None) -> str:
    """The text without trailing white space and outer blank lines, and at most `max_blank_lines` in a row.

    None keeps all blank lines; the fenced code blocks of Markdown keep theirs.
    """
    text = "\n".join([line.rstrip() for line in text.split("\n")])
    if max_blank_lines is not None and "\n" * (max_blank_lines + 2) in text:
        text = _limit_blank_lines(text, max_blank_lines)
    return text.strip("\n")


def _limit_blank_lines(text: str, most: int) -> str:
    if not any(fence in text for fence in _FENCES):
        widest = "\n" * (most + 1)
        return re.sub(widest + "\n+", widest, text)
    lines: list[str] = []
    in_fence, blank = False, 0
    for line in text.split("\n"):
        in_fence ^= line.lstrip(" ").startswith(_FENCES)
        blank = 0 if line else blank + 1
        if blank <= most or in_fence:
            lines.append(line)
    return "\n".join(lines)
