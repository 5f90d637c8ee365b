"""Numbers as people read them: 3.80B, $1,200."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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
