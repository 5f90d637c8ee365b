"""Parses numbers as people write them: 1e6, 3.75B, 500k, 10_000_000, 10,000,000, and sizes such as 4GB or 512MiB.

Configurations, command lines and prompts all parse their numbers here.
"""

from __future__ import annotations

import math
import re
from decimal import Context, Decimal

_COUNT_UNITS = {"": 0, "K": 3, "M": 6, "B": 9, "T": 12}
_DECIMAL_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# The largest 64-bit counter, seed or file offset.
MAX_COUNT = 2**63 - 1
# The largest number of tokens of a corpus or a budget: far more than all text in the world.
MAX_TOKENS = 10**18
# More than any sensible number needs; Python takes long to parse longer ones.
MAX_NUMBER_CHARACTERS = 64
_EXACT = Context(prec=800)

# Commas separate groups of three digits only, so that 3,8 is not read as 38.
_NUMBER = r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)?(?:\.\d+|(?<=\d)\.)?(?:(?<=[\d.])e[-+]?\d{1,4})?)"
_COUNT = re.compile(rf"{_NUMBER} ?([kmbt]?)", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(rf"{_NUMBER} ?([kmgt]?)(i?)(b?)", re.IGNORECASE | re.ASCII)


def parse_count(text: str) -> int:
    """Parses a whole number such as `12`, `1e6`, `3.75B`, `500k`, `10_000_000` or `10,000,000`.

    K, M, B and T, in either case, are thousands, millions, billions and trillions. Raises ValueError for anything
    else, fractions included.
    """
    number = _decimal(text)
    if number is None or number != number.to_integral_value():
        raise ValueError("expected a whole number such as 10000, 1e6, 500k or 3.75B")
    return int(number)


def parse_number(text: str) -> float:
    """Parses a number such as `0.1`, `1e-4`, `1,200`, `2.5k`, `inf` or `nan`.

    Raises ValueError for anything else.
    """
    if text.strip().lower().lstrip("+-") in ("inf", "infinity", "nan"):
        return float(text)
    number = _decimal(text)
    if number is None:
        raise ValueError("expected a number such as 0.1, 1e-4 or 1200")
    return float(number)


def parse_size(text: str) -> int:
    """Parses a size in bytes such as `4GB` (4 × 10⁹), `4GiB` (4 × 2³⁰), `500MB`, `1e9` or `4096`.

    Raises ValueError for anything else. A fraction of a byte, as in `1.1GiB`, is dropped.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= MAX_NUMBER_CHARACTERS else None
    number = _parse_digits(match[1]) if match else None
    if match is None or number is None or number < 0 or (match[3] and not match[2]):
        raise ValueError("expected a size such as 4GB, 512MiB or a number of bytes")
    units = _BINARY_UNITS if match[3] else _DECIMAL_UNITS
    size = _EXACT.multiply(number, units[match[2].upper()])
    if not match[2] and size != size.to_integral_value():
        raise ValueError("expected a whole number of bytes, or a size such as 4GB or 512MiB")
    return int(size)


def divisors(number: int) -> list[int]:
    """All divisors of a positive number up to about 10¹⁴, ascending."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _decimal(text: str) -> Decimal | None:
    """The number in a text, with its unit applied; None if the text is not a number."""
    match = _COUNT.fullmatch(text.strip()) if len(text) <= MAX_NUMBER_CHARACTERS else None
    number = _parse_digits(match[1]) if match else None
    return number.scaleb(_COUNT_UNITS[match[2].upper()], _EXACT) if match and number is not None else None


def _parse_digits(digits: str) -> Decimal | None:
    """The number with these digits; None without a digit, and for a number far outside the range of a float."""
    if not re.search(r"\d", digits):
        return None
    number = Decimal(digits.replace("_", "").replace(",", ""))
    return number if abs(number.adjusted()) <= 350 else None
