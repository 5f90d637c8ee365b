"""Sizes in bytes and numbers of tokens as people write them: 4GB, 512 MiB, 3.75B."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(value: object) -> object:
    """Bytes from text such as `4GB` (10⁹), `4GiB` (2³⁰) or `500MB`; anything but text is returned as it is.

    Raises ValueError for text that is no such size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise ValueError(f"found {value!r}: expected a size such as 4GB, 512MiB or a number of bytes")
    units = _BINARY_UNITS if match[3] else _UNITS
    return int(float(match[1]) * units[match[2].upper()])


def parse_tokens(value: object) -> object:
    """A number of tokens from text such as `3.75B` or `500M`; anything but text is returned as it is.

    Raises ValueError for text that is no such number.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMBT]?)", value.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"found {value!r}: expected a number of tokens such as 3.75B or 500M")
    return round(float(match[1]) * _TOKEN_UNITS[match[2].upper()])


Tokens = Annotated[int, BeforeValidator(parse_tokens, json_schema_input_type=int | str), Field(ge=1)]
Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=1)]
