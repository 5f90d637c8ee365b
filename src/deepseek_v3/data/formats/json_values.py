"""Parses one JSON value, and explains why some bytes are not JSON."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import orjson

from deepseek_v3.data.formats.quarantine import InvalidRecord

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def parse_json(data: bytes, offset: int) -> Any:
    """Parses JSON from byte `offset` of a file. Raises InvalidRecord if `data` is not a JSON value in UTF-8."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _explain(data, offset) from None


def decode_utf8(data: bytes, offset: int) -> str:
    """Decodes bytes from byte `offset` of a file. Raises InvalidRecord, with the offset, if they are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if data.startswith(_UTF16_MARKS):
            advice = "it looks like UTF-16, convert it with `iconv -f utf-16 -t utf-8`"
        else:
            advice = (
                "convert the file, for example with `iconv -f latin1 -t utf-8`, or move it away if it is not text"
            )
        raise InvalidRecord(
            "not_utf8", f"byte 0x{data[error.start]:02x} at offset {offset + error.start} is not UTF-8; {advice}"
        ) from None


def json_default(value: Any) -> str:
    """Converts a value that JSON has no type for: bytes to base64, and anything else with `str`."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


class _NotFiniteError(ValueError):
    pass


def _explain(data: bytes, offset: int) -> InvalidRecord:
    """Finds out with the standard library, which accepts all of JSON and more, why orjson refuses some bytes."""
    try:
        text = decode_utf8(data, offset)
        value = json.loads(text, parse_float=_finite, parse_int=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except InvalidRecord as not_utf8:
        return not_utf8
    except _NotFiniteError as number:
        return InvalidRecord("number", f"is not JSON: the number {number} is not a finite double")
    except UnicodeEncodeError as half:
        found = half.object[half.start]
        return InvalidRecord(
            "lone_surrogate",
            f"holds the lone surrogate {found!r}, which no UTF-8 can express; remove it, or write both halves",
        )
    except RecursionError:
        pass
    except ValueError as malformed:
        return InvalidRecord("not_json", f"is not JSON: {malformed}; expected an object")
    return InvalidRecord("nesting", "is nested too deep, expected fewer than 1,024 levels")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotFiniteError(digits[:20])
    return number
