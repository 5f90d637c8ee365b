"""Detectors of e-mail addresses, public IP addresses, numbers of payment cards, and telephone numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TypeAlias

TextSpans: TypeAlias = Iterator[tuple[int, int]]


@dataclass(frozen=True)
class Detector:
    """Finds one kind of personal data.

    `find` yields the start and end of each match, in order and without overlap, in time linear in the length of the
    text. `pretest` is a pattern for RE2, without look-around, that matches every text in which `find` finds
    something. Both know only the digits and letters of ASCII, so other scripts may directly adjoin a match.
    """

    pretest: str
    find: Callable[[str], TextSpans]


# E-mail addresses, with the lengths of RFC 5321 §4.5.3.1 and RFC 1035 §2.3.4.
_LONGEST_LOCAL = 64
_DOMAIN = r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
_AT_DOMAIN = re.compile(rf"{_DOMAIN}(?![\w-])", re.ASCII)
_LOCAL = re.compile(r"[\w.%+-]*\Z", re.ASCII)

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
_SMALL = 32  # four smaller parts are nearly always a version or a section; only 1 in 4,096 addresses is like that

_BEFORE, _AFTER = r"(?<![\w.+/-])", r"(?!\w|[-./]\d)"

# Payment cards: digits without separators, or in groups of 4-4-4-4, 4-6-5 or 4-6-4.
_CARD = r"\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}|\d{4}[ -]\d{6}[ -]\d{4,5}|\d{13,19}"
_CARD_NUMBER = re.compile(rf"{_BEFORE}(?<!\d,)(?:{_CARD}){_AFTER}", re.ASCII)
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
# A national number must not be part of a row of numbers or of hexadecimal bytes.
_PHONE = re.compile(
    rf"{_BEFORE}{_INTERNATIONAL}{_AFTER}|{_BEFORE}(?<!\d )(?:{_NATIONAL}){_AFTER}(?! [\dA-Fa-f]{{2}})",
    re.ASCII,
)
_BOOK = re.compile(r"\bIS[BS]N(?:-1[03])?:? ?\Z", re.ASCII | re.IGNORECASE)
_BOOK_CHARACTERS = 10
_FEWEST_DIGITS, _MOST_DIGITS = 8, 15  # E.164
_FEWEST_UNGROUPED = 11  # fewer may be a time in seconds, or an added line of a diff


def _emails(text: str) -> TextSpans:
    free = 0
    for match in _AT_DOMAIN.finditer(text):
        at = match.start()
        # One character more than allowed, to recognise a local part that is too long.
        local = _LOCAL.search(text, max(free, at - _LONGEST_LOCAL - 1), at)
        found = local[0].lstrip(".%+-") if local else ""
        if found and len(found) <= _LONGEST_LOCAL and not found.endswith("."):
            yield at - len(found), match.end()
            free = match.end()


def _ip_addresses(text: str) -> TextSpans:
    for match in _IP.finditer(text):
        start, found = match.start(), match[0]
        if found.endswith(":") and not found.endswith("::"):
            found = found[:-1]
        if _is_public_address(found) and not _NO_ADDRESS.search(text, max(0, start - _CONTEXT), start):
            yield start, start + len(found)


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
        if len(separators) <= 1 and _NETWORKS.fullmatch(digits) and _luhn(digits):
            yield match.span()


def _luhn(digits: str) -> bool:
    """Whether the check digit is right (ISO/IEC 7812-1, annex B); False for a number of equal digits."""
    total = sum(map(int, digits[::-2])) + sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return total % 10 == 0 and len(set(digits)) > 1


def _phones(text: str) -> TextSpans:
    for match in _PHONE.finditer(text):
        if _is_phone(match[0]) and not _BOOK.search(text, max(0, match.start() - _BOOK_CHARACTERS), match.start()):
            yield match.span()


def _is_phone(found: str) -> bool:
    digits = re.sub(r"\D", "", found)
    ungrouped = len(found) == len(digits) + 1
    return (_FEWEST_UNGROUPED if ungrouped else _FEWEST_DIGITS) <= len(digits) <= _MOST_DIGITS


EMAIL = Detector(_DOMAIN, _emails)
IP_ADDRESS = Detector(f"{_IPV4}|{_IPV6}", _ip_addresses)
CARD = Detector(_CARD, _cards)
PHONE = Detector(f"{_INTERNATIONAL}|{_NATIONAL}", _phones)
