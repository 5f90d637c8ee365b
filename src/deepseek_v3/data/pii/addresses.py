"""E-mail addresses and public IP addresses."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address, ip_address

from deepseek_v3.data.pii.finder import Finder, Spans

# The lengths are those of RFC 5321 §4.5.3.1 and RFC 1035 §2.3.4.
_LONGEST_LOCAL = 64
_DOMAIN = r"@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}"
_AT_DOMAIN = re.compile(rf"{_DOMAIN}(?![\w-])", re.ASCII)
_LOCAL = re.compile(r"[\w.%+-]*\Z", re.ASCII)

_IPV4 = r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"
# 2000::/3 is all that has been given out (RFC 3587 §3).
_IPV6 = r"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}"
_IP = re.compile(rf"(?<![\w.]){_IPV4}(?!\w|\.\d|-[A-Za-z])|(?<![\w.:]){_IPV6}(?!\w)", re.ASCII)
# What stands before numbers with four parts that are no addresses: name-1.2.3.4, version 1.2.3.4, section 1.2.3.4.
_NO_ADDRESS = re.compile(
    r"(?:[A-Za-z_]-|§ ?|\b(?:v|vers?|version|releases?|rev|revision|build|firmware|driver|section|sec|chapter|"
    r"clause|figure|fig|table)[.:]?\s?)\Z",
    re.ASCII | re.IGNORECASE,
)
_CONTEXT = 16
_SMALL = 32  # where all four parts are smaller it is nearly always a version or a section: 1 in 4,096 addresses


def _emails(text: str) -> Spans:
    free = 0
    for match in _AT_DOMAIN.finditer(text):
        at = match.start()
        # One character more than may be, to see that there is no more.
        local = _LOCAL.search(text, max(free, at - _LONGEST_LOCAL - 1), at)
        found = local[0].lstrip(".%+-") if local else ""
        if found and len(found) <= _LONGEST_LOCAL and not found.endswith("."):
            yield at - len(found), match.end()
            free = match.end()


def _ip_addresses(text: str) -> Spans:
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


EMAIL = Finder(_DOMAIN, _emails)
IP_ADDRESS = Finder(f"{_IPV4}|{_IPV6}", _ip_addresses)
