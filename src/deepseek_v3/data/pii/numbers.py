"""Telephone numbers and numbers of payment cards."""

from __future__ import annotations

import re

from deepseek_v3.data.pii.finder import Finder, Spans

_BEFORE, _AFTER = r"(?<![\w.+/-])", r"(?!\w|[-./]\d)"

# Cards: digits at a stretch, or in groups of 4-4-4-4, 4-6-5 or 4-6-4.
_CARD = r"\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19}"
_CARD_NUMBER = re.compile(rf"{_BEFORE}(?<!\d,)(?:{_CARD}){_AFTER}", re.ASCII)
# The first digits and the length of the numbers that each network gives out (ISO/IEC 7812-1).
_NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|3(?:0[0-5]|[68]\d)\d{11}"  # Diners Club
)

# International: + and the digits of ITU-T E.164, in groups, one of them perhaps in brackets.
_INTERNATIONAL = r"\(?\+[1-9]\d{0,14}\)?(?:[ .-]?\(\d{1,4}\) ?\d{1,12})?(?:[ .-]\d{1,12}){0,7}"
_NATIONAL = "|".join(
    [
        r"(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}",  # North America: (212) 555-0123
        r"(?:\(0[1-9]\d\)|0[1-9]\d) \d{4} \d{4}",  # United Kingdom: 020 7946 0123
        r"(?:\(0[1-9]\d{2}\)|0[1-9]\d{2}) \d{3} \d{4}",  # 0161 496 0123
        r"(?:\(0[1-9]\d{3}\)|0[1-9]\d{3}) \d{3} ?\d{3}",  # 01632 960123
        r"0[1-9](?: \d{2}){4}|0[1-9](?:\.\d{2}){4}",  # France: 01 99 00 12 34
        r"\(?0[1-9]\d{1,3}\)?/ ?\d{5,9}",  # Germany: 030/23125123
    ]
)
# Numbers of a country stand alone, not in a row of numbers, or of bytes in hexadecimal digits.
_PHONE = re.compile(
    rf"{_BEFORE}{_INTERNATIONAL}{_AFTER}|{_BEFORE}(?<!\d )(?:{_NATIONAL}){_AFTER}(?! [\dA-Fa-f]{{2}})",
    re.ASCII,
)
_BOOK = re.compile(r"\bIS[BS]N(?:-1[03])?:? ?\Z", re.ASCII | re.IGNORECASE)
_BOOK_CHARACTERS = 10
_FEWEST_DIGITS, _MOST_DIGITS = 8, 15  # E.164
_FEWEST_UNGROUPED = 11  # fewer could be the seconds of a clock, or a line of a patch


def _cards(text: str) -> Spans:
    for match in _CARD_NUMBER.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        separators = set(re.findall(r"\D", match[0]))
        if len(separators) <= 1 and _NETWORKS.fullmatch(digits) and _luhn(digits):
            yield match.span()


def _luhn(digits: str) -> bool:
    """The check digit of ISO/IEC 7812-1, annex B; a number of equal digits is none."""
    total = sum(map(int, digits[::-2])) + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return total % 10 == 0 and len(set(digits)) > 1


def _phones(text: str) -> Spans:
    for match in _PHONE.finditer(text):
        if _is_phone(match[0]) and not _BOOK.search(text, max(0, match.start() - _BOOK_CHARACTERS), match.start()):
            yield match.span()


def _is_phone(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    ungrouped = len(found) == len(digits) + 1
    return (_FEWEST_UNGROUPED if ungrouped else _FEWEST_DIGITS) <= len(digits) <= _MOST_DIGITS


CARD = Finder(_CARD, _cards)
PHONE = Finder(f"{_INTERNATIONAL}|{_NATIONAL}", _phones)
