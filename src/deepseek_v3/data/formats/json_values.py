"""Parses one JSON value, repairs what JSON or UTF-8 cannot express, and writes values as JSON or text."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any, NamedTuple

import orjson

from deepseek_v3.data.formats.quarantine import InvalidRecord

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_INTEGER_DIGITS = 20  # of 64 bits, with the sign; orjson, too, reads larger integers as doubles
_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class ParsedJson(NamedTuple):
    """A JSON value, and the codes of what was repaired in it.

    If its bytes are not UTF-8, they are U+FFFD in the value, and `not_utf8` describes the first of them.
    """

    value: Any
    repairs: tuple[str, ...] = ()
    not_utf8: InvalidRecord | None = None


def parse_json(data: bytes, offset: int) -> ParsedJson:
    """Parses JSON from byte `offset` of a file, and repairs it if needed.

    NaN and infinity become null, numbers beyond the range of a double become text, and lone surrogates U+FFFD.
    Raises InvalidRecord if `data` is not a JSON value otherwise.
    """
    try:
        return ParsedJson(orjson.loads(data))
    except orjson.JSONDecodeError:
        return _repair(data, offset)


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


def fields_to_json(fields: dict[str, Any]) -> tuple[str, bool]:
    """Fields as a JSON object, and whether all of them could be written as they are.

    A value that orjson cannot write, such as one nested too deep, is written as text.
    """
    try:
        return orjson.dumps(fields, default=json_default).decode(), True
    except TypeError:
        writable = {name: value if _is_writable(value) else value_to_text(value) for name, value in fields.items()}
        return orjson.dumps(writable, default=json_default).decode(), False


def value_to_text(value: Any) -> str:
    """A value as text: objects, lists, true and false as JSON, anything else by `str`."""
    if not isinstance(value, (dict, list, bool)):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=False, default=json_default)
    except (RecursionError, ValueError, TypeError):
        return f"a {type(value).__name__} that is nested too deep, or not JSON"


def _is_writable(value: Any) -> bool:
    try:
        orjson.dumps({"": value}, default=json_default)
    except TypeError:
        return False
    return True


def _repair(data: bytes, offset: int) -> ParsedJson:
    """Parses with the standard library, which accepts all of JSON and more, what orjson refuses."""
    repairs: set[str] = set()
    not_utf8 = None
    try:
        text = decode_utf8(data, offset)
    except InvalidRecord as error:
        text, not_utf8 = data.decode(errors="replace"), error
        repairs.add("not_utf8")
    try:
        value = _loads(text, repairs)
        plain = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as malformed:
        raise not_utf8 or InvalidRecord("not_json", f"is not JSON: {malformed}; expected an object") from None
    if _SURROGATE.search(plain):
        plain = plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        repairs.add("lone_surrogate")
    try:
        return ParsedJson(orjson.loads(plain), tuple(sorted(repairs)), not_utf8)
    except orjson.JSONDecodeError:
        raise _too_deep() from None


def _loads(text: str, repairs: set[str]) -> Any:
    """Parses JSON; adds the code of repaired numbers to `repairs`."""

    def number(digits: str) -> float | int | str | None:
        value = float(digits)
        if not math.isfinite(value):
            repairs.add("number")
            return None if digits[-1].isalpha() else digits  # NaN and Infinity, or too many digits
        is_integer = len(digits) <= _INTEGER_DIGITS and digits.lstrip("-").isdigit()
        return int(digits) if is_integer and -(2**63) <= int(digits) < 2**64 else value

    value = json.loads(text, parse_float=number, parse_int=number, parse_constant=number)
    if not isinstance(value, (dict, list)) and repairs:
        raise ValueError("a number without an object around it")
    return value


def _too_deep() -> InvalidRecord:
    return InvalidRecord("nesting", "is nested too deep, expected fewer than 1,024 levels")
