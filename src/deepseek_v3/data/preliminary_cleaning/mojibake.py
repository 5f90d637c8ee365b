"""Text that was decoded with the wrong encoding, such as "cafÃ©": repaired by ftfy, behind a cheap test.

ftfy touches only what its own test finds suspicious, and that test reads 10 MB/s. All that it looks for holds one
of a few pairs of characters; `SUSPECT` looks for those, and means the same to Python's `re` and to Arrow.

Windows-1252 read as Latin-1 is repaired as well, so that U+0085 becomes "…", as it does in browsers. Where nothing
is repaired it is a line end.
"""

from __future__ import annotations

import re
import unicodedata

import ftfy

_COMMON = "\u00a0\u00ad·´–—―…’"  # suspicious only after some letters
_UNUSUAL = "µƒ"  # letters that count as symbols
_RANGES = ((0xA1, 0x24F), (0x2B0, 0x2FF), (0x384, 0x385), (0x490, 0x491), (0x2010, 0x27FF))
_SINGLE = "\uf8ff\ufb01\ufb02\ufffd"


def _suspect() -> str:
    known = "".join(chr(code) for first, last in _RANGES for code in range(first, last + 1)) + _SINGLE
    known = "".join(char for char in known if char not in _COMMON)
    category = {char: "Sm" if char in _UNUSUAL else unicodedata.category(char) for char in known}
    small = "".join(char for char in known if category[char] == "Ll")
    others = "".join(char for char in known if category[char] != "Ll")
    symbols = "".join(char for char in others if category[char] != "Lu")
    pairs = (
        ("\x80-\x9f", ""),
        (small + others, others),
        (symbols, small),
        ("\u0370-\u04ff", others),  # Greek and Cyrillic
        ("ÂÃÎÐØÙ√", " " + _COMMON + small + others),
        ("Œœ", "^A-Za-z"),
        ("Ђ", ""),
    )
    return "|".join(f"[{first}][{second}]" if second else f"[{first}]" for first, second in pairs)


SUSPECT = _suspect()
_SUSPECT = re.compile(rf"(?=[^\x00-\x7f])(?:{SUSPECT})")  # the first look passes over ASCII quickly


def repair_mojibake(text: str) -> str:
    """The text, with those lines repaired that look wrongly decoded."""
    if text.isascii() or not _SUSPECT.search(text):
        return text
    return "\n".join([ftfy.fix_encoding(line) if _SUSPECT.search(line) else line for line in text.split("\n")])
