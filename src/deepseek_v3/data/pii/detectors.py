"""Detectors of public IP addresses, numbers of payment cards, and telephone numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise
from typing import TypeAlias

TextSpans: TypeAlias = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Detector:
    """Finds one kind of personal data.

    `find` yields the start and end of each match, in order and without overlap, in time linear in the length of the
    text. `pretest` is a pattern for RE2, without look-around, that matches every text in which `find` finds
    something. Both know only the digits of ASCII, and the letters of scripts with spaces between words, so Chinese
    and the like may directly adjoin a match.
    """

    pretest: str
    find: Callable[[str], TextSpans]


def without_upper_bounds(pattern: str) -> str:
    """A pattern that also matches more repetitions; RE2 compiles it, in every batch, 20 times as fast."""
    return re.sub(r"\{(\d+),\d+\}", r"{\1,}", pattern)


_IPV4 = r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"
# Only 2000::/3 is allocated (RFC 3587 §3).
_IPV6 = r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}"
_IP = re.compile(rf"(?<![\w.]){_IPV4}(?!\w|\.\d|-[A-Za-z])|(?<![\w.:]){_IPV6}(?!\w)", re.ASCII)
# Text before numbers of four parts that are not addresses: name-1.2.3.4, version 1.2.3.4, section 1.2.3.4.
_NO_ADDRESS = re.compile(
    r"(?:[A-Za-z_]-|§ ?|\b(?:v|vers?|version|releases?|rev|revision|build|firmware|driver|section|sec|chapter|"
    r"clause|figure|fig|table)[.:]?\s?)\Z",
    re.ASCII | re.IGNORECASE,
)
_CONTEXT = 16
# The line before a version says so, or what it is a version of.
_VERSION_LINE = re.compile(
    r"\b(?:versions?|upgrad\w*|updat\w*|downgrad\w*|bump\w*|patch\w*|releas\w*|V8|chrom(?:e|ium)|edge|opera|firmware|drivers?"
    r"|OIDs?|ObjectIdentifier)\b",
    re.IGNORECASE,
)
_ADDRESS_LINE = re.compile(r"\b(?:ip(?:v4)?|address\w*|ping|dns|nameserver|https?|ssh|gateway)\b", re.IGNORECASE)
_LINE_CONTEXT = 60
# Decimal numbers on either side, as in the paths of drawings.
_DECIMAL_BEFORE = re.compile(r"[^\d.]\d*\.\d+[ ,-]\Z", re.ASCII)
_DECIMAL_AFTER = re.compile(r"(?![ ,]\d+\.\d+\.\d+\.\d)[ ,-]-?\d*\.\d", re.ASCII)
_OID_ARCS = 40  # object identifiers begin with 0, 1 or 2, and then with a number below 40 (ITU-T X.660)
_SMALL = 32  # four smaller parts are nearly always a version or a section; only 1 in 4,096 addresses is like that

_BEFORE, _AFTER = r"(?<![\w.+/-])", r"(?!\w|[-./]\d)"

# Payment cards: digits without separators, or in groups of 4-4-4-4, 4-6-5 or 4-6-4.
_CARD = r"\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19}"
_CARD_NUMBER = re.compile(rf"{_BEFORE}(?<!\d,)(?:{_CARD}){_AFTER}", re.ASCII)
_NEIGHBOURHOOD = 30
_NUMBER_BEFORE = re.compile(r"(?:[0-9A-Fa-f]*\d[0-9A-Fa-f -]*[\s,;|(\[]*|[*^%<>+/&|-] *)\Z", re.ASCII)
_NUMBER_AFTER = re.compile(r"[\s,;|)\]]*[0-9A-Fa-f]*\d[\d /-]*| *[*^%<>+&|]", re.ASCII)
_CARD_DETAILS = re.compile(r"\s*,? ?(?:[01]\d ?/ ?\d{2,4}|\d{3})(?!\d| \d{4})", re.ASCII)
# The first digits and the length of the numbers of each network (ISO/IEC 7812-1).
_NETWORKS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"  # Visa
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"  # Mastercard
    r"|3[47]\d{13}"  # American Express
    r"|(?:6011|64[4-9]\d|65\d\d)\d{12}"  # Discover
    r"|35(?:2[89]|[3-8]\d)\d{12}"  # JCB
    r"|3(?:0[0-5]|[68]\d)\d{11}"  # Diners Club
)

# International telephone numbers: + and the digits of ITU-T E.164 in groups, one of which may be in brackets.
_INTERNATIONAL = r"(?:\(\+[1-9]\d{0,14}\)|\+[1-9]\d{0,14})(?:[ .-]?\(\d{1,4}\) ?\d{1,12})?(?:[ .-]\d{1,12}){0,7}"
_NATIONAL = "|".join(
    [
        r"(?:1[ -])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}-)[2-9]\d{2}-\d{4}",  # North America: (212) 555-0123
        r"(?:1[ .])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}\.)[2-9]\d{2}\.\d{4}",  # 212.555.0123
        r"(?:\(0[1-9]\d\)|0[1-9]\d) \d{4} \d{4}",  # United Kingdom: 020 7946 0123
        r"(?:\(0[1-9]\d{2}\)|0[1-9]\d{2}) \d{3} \d{4}",  # 0161 496 0123
        r"(?:\(0[1-9]\d{3}\)|0[1-9]\d{3}) \d{3} ?\d{3}",  # 01632 960123
        r"0[1-9](?: \d{2}){4}|0[1-9](?:\.\d{2}){4}",  # France: 01 99 00 12 34
        r"\(?0[1-9]\d{1,3}\)?/ ?\d{5,9}",  # Germany: 030/23125123
    ]
)
# A national number must not be part of a row of numbers or of hexadecimal bytes.
_PHONE = re.compile(
    rf"{_BEFORE}(?<![)\]]){_INTERNATIONAL}{_AFTER}|{_BEFORE}(?<!\d )(?:{_NATIONAL}){_AFTER}(?! [\dA-Fa-f]{{2}}\b)",
    re.ASCII,
)
# A decimal number or a coordinate; a date; hexadecimal bytes in a row.
_NO_PHONE = re.compile(r"\+\d{1,3}\.\d+|\+?\d{4}[-.](?:0\d|1[0-2])[-.][0-3]\d.*", re.ASCII)
_SPOKEN = re.compile(r"(?:tel|phone|fax|mobile|cell|call|contact)\w*[.:]*\s*\Z", re.IGNORECASE)
_BOOK = re.compile(r"\bIS[BS]N(?:-1[03])?:? ?\Z", re.ASCII | re.IGNORECASE)
_BOOK_CHARACTERS = 10
_FEWEST_DIGITS, _MOST_DIGITS = 8, 15  # E.164
_FEWEST_UNGROUPED = 11  # fewer may be a time in seconds, or an added line of a diff


def _ip_addresses(text: str) -> TextSpans:
    for match in _IP.finditer(text):
        start, found = match.start(), match[0]
        if found.endswith(":") and not found.endswith("::"):
            found = found[:-1]
        if _is_public_address(found) and (":" in found or not _is_version(text, start, found)):
            yield start, start + len(found)


def _is_version(text: str, start: int, found: str) -> bool:
    """Whether four numbers with dots are a version, a section, an object identifier or decimals."""
    before, end = text[max(0, start - _LINE_CONTEXT) : start].rpartition("\n")[2], start + len(found)
    if _NO_ADDRESS.search(text, max(0, start - _CONTEXT), start):
        return True
    if _DECIMAL_BEFORE.search(text, max(0, start - _CONTEXT), start) or _DECIMAL_AFTER.match(
        text, end, end + _CONTEXT
    ):
        return True
    if _ADDRESS_LINE.search(before):
        return False
    first, second = map(int, found.split(".")[:2])
    return bool(_VERSION_LINE.search(before)) or (first <= 2 and second < _OID_ARCS)


def _is_public_address(text: str) -> bool:
    try:
        address: IPv4Address | IPv6Address = ip_address(text)
    except ValueError:
        return False
    if address.version == 4 and max(address.packed) < _SMALL:
        return False
    return address.is_global and not address.is_multicast


def _cards(text: str) -> TextSpans:
    for match in _CARD_NUMBER.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        separators = set(re.findall(r"\D", match[0]))
        if len(separators) <= 1 and _is_card(digits) and not _has_neighbours(text, *match.span()):
            yield match.span()


def _is_card(digits: str) -> bool:
    return bool(_NETWORKS.fullmatch(digits)) and _luhn(digits)


def _has_neighbours(text: str, start: int, end: int) -> bool:
    """Whether other numbers or an operator stand beside a number, as in tables and in code.

    The numbers of other cards may, and an expiry date or three digits of a security code after it.
    """
    before = _NUMBER_BEFORE.search(text, max(0, start - _NEIGHBOURHOOD), start)
    after = _NUMBER_AFTER.match(text, end, end + _NEIGHBOURHOOD)
    for found, allowed in ((before, None), (after, _CARD_DETAILS)):
        if found and not (allowed and allowed.match(found[0])) and not _is_card(re.sub(r"\D", "", found[0])):
            return True
    return False


def _luhn(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1, annex B); False for a number of equal digits."""
    total = sum(map(int, digits[::-2])) + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return total % 10 == 0 and len(set(digits)) > 1


def _phones(text: str) -> TextSpans:
    for match in _PHONE.finditer(text):
        start = match.start()
        before = text[max(0, start - _BOOK_CHARACTERS) : start]
        if _is_phone(match[0], bool(_SPOKEN.search(before))) and not _BOOK.search(before):
            yield match.span()


def _is_phone(found: str, is_announced: bool) -> bool:
    digits = re.sub(r"\D", "", found)
    if not is_announced and _NO_PHONE.fullmatch(found):
        return False
    pairs = found.split(" ")
    if len(pairs) == len({*pairs}) > 3 and all(int(b) - int(a) == 1 for a, b in _number_pairs(pairs)):
        return False
    ungrouped = len(found) == len(digits) + 1
    return (_FEWEST_UNGROUPED if ungrouped else _FEWEST_DIGITS) <= len(digits) <= _MOST_DIGITS


def _number_pairs(groups: list[str]) -> Iterator[tuple[str, str]]:
    """Neighbouring groups, with 0 for one that is no plain number."""
    plain = [group if group.isdecimal() else "0" for group in groups]
    return pairwise(plain)


IP_ADDRESS = Detector(f"{_IPV4}|{_IPV6}", _ip_addresses)
CARD = Detector(_CARD, _cards)
PHONE = Detector(f"{_INTERNATIONAL}|{_NATIONAL}", _phones)
