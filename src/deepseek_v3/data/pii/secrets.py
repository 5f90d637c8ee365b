"""The detector of secrets: private keys, keys of known services, tokens, values of names such as api_key."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import chain

from deepseek_v3.data.pii.detectors import Detector, TextSpans, without_upper_bounds

_BLOCK = r"-----BEGIN [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----"
_BLOCK_END = re.compile(r"-----END [A-Z0-9 ]{0,32}PRIVATE KEY(?: BLOCK)?-----")
_LONGEST_BLOCK = 20_000
# Without so long a run, the text only mentions a key.
_BODY = re.compile(r"[A-Za-z0-9+/=]{32}")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]*", re.ASCII)

_SERVICES = "|".join(
    [
        r"(?:AKIA|ASIA)[A-Z2-7]{16}",  # Amazon Web Services
        r"gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}",
        r"xox[abeoprs]-[A-Za-z0-9-]{10,255}",  # Slack
        r"AIza[A-Za-z0-9_-]{35}",  # Google
        r"sk-(?:[a-z0-9]{2,8}-){0,2}[A-Za-z0-9_]{20,255}[A-Za-z0-9_-]{0,255}",  # OpenAI, Anthropic and others
        r"hf_[A-Za-z0-9]{30,255}|npm_[A-Za-z0-9]{36}|gl(?:pat|dt|rt|ptt|cbt)-[A-Za-z0-9_-]{20,255}",
        r"[prs]k_(?:live|test)_[A-Za-z0-9]{16,255}",  # Stripe
        r"pypi-[A-Za-z0-9_-]{60,1000}|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}|do[opr]_v1_[a-f0-9]{64}",
        r"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}|dapi[a-f0-9]{32}|xapp-[A-Za-z0-9-]{20,255}",
        r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",  # JSON Web Tokens, RFC 7519
    ]
)
_ASSIGNED = (
    r"(?:api_?key|access_?key|secret(?:_?key)?|auth_?token|access_?token|token|passwd|password|client_?secret)"
    r"""["']? {0,3}(?::=|=>|[:=]) {0,3}["']?"""
)
_VALUE = r"[A-Za-z0-9+/_=.-]{20,}"
_BLOCK_START = re.compile(_BLOCK)
_SERVICE_KEY = re.compile(rf"(?<![\w.-])(?:{_SERVICES})(?![\w-])", re.ASCII)
_ASSIGNMENT = re.compile(f"{_ASSIGNED}({_VALUE})", re.ASCII | re.IGNORECASE)
_LEAST_ENTROPY = 3.5  # bits per character; random hexadecimal digits have up to 4, English words less


def _keys(text: str) -> TextSpans:
    """Merges the matches of all patterns. They may overlap: a service's key is often assigned to a name."""
    end = 0
    for start, stop in sorted(chain(_blocks(text), _service_keys(text), _assignments(text))):
        if start >= end:
            yield start, stop
            end = stop


def _blocks(text: str) -> TextSpans:
    """Private keys in PEM format, complete or cut off."""
    for begin in _BLOCK_START.finditer(text):
        end = text.find("-----END ", begin.end(), begin.end() + _LONGEST_BLOCK)
        stop = _BLOCK_END.match(text, end) if end >= 0 else None
        stop = stop or _BASE64.match(text, begin.end())
        if stop and _BODY.search(text, begin.end(), stop.end()):
            yield begin.start(), stop.end()


def _service_keys(text: str) -> TextSpans:
    for match in _SERVICE_KEY.finditer(text):
        if re.search(r"\d", match[0]) and _entropy(match[0]) >= _LEAST_ENTROPY - 1:
            yield match.span()


def _assignments(text: str) -> TextSpans:
    for match in _ASSIGNMENT.finditer(text):
        value = match[1].rstrip(".")
        is_mixed = re.search(r"\d", value) and re.search(r"[A-Za-z]", value)
        if is_mixed and _entropy(value) >= _LEAST_ENTROPY:
            yield match.start(1), match.start(1) + len(value)


def _entropy(value: str) -> float:
    """Bits per character (Shannon 1948)."""
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares)


KEY = Detector(without_upper_bounds(f"{_BLOCK}|{_SERVICES}|(?i:{_ASSIGNED}){_VALUE}"), _keys)
