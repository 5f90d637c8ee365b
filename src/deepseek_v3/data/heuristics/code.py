"""The rules for source code, for one document at a time.

Prose rules count words and sentences, and drop nearly all code. These are the rules by which The Stack (Kocetkov et
al. 2022), CodeParrot (Tunstall et al. 2022) and StarCoder2 (Lozhkov et al. 2024, §2) left out data, minified and
generated files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.heuristics.rules import BrokenRule

_ALPHANUMERIC = bytes(byte for byte in range(256) if byte >= 0x80 or chr(byte).isalnum())
_ENCODED = re.compile(
    r"[A-Za-z0-9+/=]{64,}"  # Base64, hexadecimal digits
    r"|(?:(?:0x|\\x)[0-9a-fA-F]{2}(?:,\s*)?){8,}|(?:\\u[0-9a-fA-F]{4}){8,}"
)
_GENERATED = re.compile(
    r"auto-?generated|automatically generated|generated automatically|@generated\b"
    r"|generated .{0,100}\bdo not (?:edit|modify)",
    re.IGNORECASE,
)
_HEAD_LINES = 5  # in which a generated file says so


def broken_code_rules(text: str, options: HeuristicsConfig) -> Iterator[BrokenRule]:
    """Yields the rules for source code that a text breaks, in the order in which they apply.

    Letters and digits are counted by bytes of UTF-8, of which all beyond ASCII count as letters.
    """
    lines = text.split("\n")
    longest = max(lines, key=len)
    yield from _at_most("code_long_line", len(longest), options.max_code_line, longest)
    mean = (len(text) - len(lines) + 1) / len(lines)
    yield from _at_most("code_mean_line_length", mean, options.max_mean_code_line)
    encoded = text.encode()
    alphanumeric = 1 - len(encoded.translate(None, _ALPHANUMERIC)) / max(len(encoded), 1)
    if options.min_code_alphanumeric is not None and alphanumeric < options.min_code_alphanumeric:
        yield BrokenRule("code_few_alphanumeric", alphanumeric, options.min_code_alphanumeric)
    found = _ENCODED.findall(text)
    share = sum(map(len, found)) / max(len(text), 1)
    yield from _at_most("code_encoded_data", share, options.max_encoded_data, found[0] if found else None)
    generated = _GENERATED.search("\n".join(lines[:_HEAD_LINES])) if options.drop_generated_code else None
    if generated:
        yield BrokenRule("code_generated", 1, 0, generated[0])


def _at_most(code: str, found: float, limit: float | None, trigger: str | None = None) -> Iterator[BrokenRule]:
    if limit is not None and found > limit:
        yield BrokenRule(code, found, limit, trigger)
