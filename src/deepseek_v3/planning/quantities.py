"""Numbers as people write and read them: 3.8e9, 10B, $1,200."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from deepseek_v3.utils.errors import ConfigError

_UNITS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_MOST_TOKENS = 10**18


def parse_tokens(text: str) -> int:
    """A number of tokens from text such as `3.8e9`, `10B`, `1.5T`, `10_000_000` or `10,000,000`.

    Raises ConfigError unless it is a whole number from 1 to 10¹⁸.
    """
    match = re.fullmatch(r"(\d+(?:[_,]\d+)*(?:\.\d+)?(?:e\+?\d{1,2})?) ?([kmbt]?)", text.strip(), re.I | re.A)
    tokens = Decimal(0)
    if match:
        number, unit = match.groups()
        tokens = Decimal(number.replace("_", "").replace(",", "")).scaleb(_UNITS[unit.upper()])
    if not (1 <= tokens <= _MOST_TOKENS and tokens == tokens.to_integral_value()):
        raise ConfigError(f"--tokens {text}: expected a whole number from 1 to 1e18, such as 3.8e9, 10B or 1.5T")
    return int(tokens)


def short_count(number: int) -> str:
    """A count in trillions, billions or millions with two decimals; below 10,000 as it is."""
    for size, unit in ((1e12, "T"), (1e9, "B")):
        if round(number / size, 2) >= 1:
            return f"{number / size:.2f}{unit}"
    return f"{number / 1e6:.2f}M" if number >= 10_000 else f"{number:,}"


def figures(number: float) -> str:
    """Three significant figures, or all before the point: 0.0123, 4.57, 12,345."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def dollars(amount: float) -> str:
    """Dollars, and cents up to a hundred of them."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}"


def gibibytes(number: float) -> str:
    """Bytes in GiB with one decimal."""
    return f"{number / 2**30:,.1f}"


def told_apart(one: float, other: float, shown: Callable[[Any], str]) -> tuple[str, str]:
    """Two different numbers as they are shown, or with all their digits where that would make them the same."""
    short = (shown(one), shown(other))
    return short if short[0] != short[1] else (f"{one:,}", f"{other:,}")
