"""Reads configuration files: YAML text and JSON objects, of up to 1 MiB by default."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.files import read_regular_file
from deepseek_v3.utils.numbers import MAX_NUMBER_CHARACTERS
from deepseek_v3.utils.text import format_value

MAX_FILE_BYTES = 2**20


def read_text(path: Path, max_bytes: int = MAX_FILE_BYTES) -> str:
    """The text of a UTF-8 file of up to `max_bytes`, with or without a byte order mark.

    Raises ConfigError for a file that cannot be read, a folder, a pipe or a device, and for other encodings.
    """
    data = _read(path, max_bytes)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{printable_path(path)}: is in UTF-16, expected UTF-8 text; save it in that encoding")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{printable_path(path)}:{line}: is not UTF-8 text: found the byte 0x{data[error.start]:02x}"
        ) from None


def read_json_object(path: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The fields of a JSON file of up to `max_bytes` that holds one object.

    Raises ConfigError as `read_text` does, and for invalid JSON, for a value that is not an object, for a field
    that is given twice, and for a number that is not finite or has more than 64 digits.
    """
    text, where = read_text(path, max_bytes), printable_path(path)
    try:
        fields = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_int=_integer,
        )
        json.dumps(fields, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}:{error.colno}: is not JSON: {error.msg}") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: holds half of a surrogate pair, expected text that UTF-8 can hold") from None
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: its values are nested too deeply for a configuration") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: holds {describe_content(fields)}, expected an object of fields: {{...}}")
    return fields


def describe_content(value: Any) -> str:
    """Describes a value that a file holds instead of fields."""
    return "a list" if isinstance(value, list) else format_value(value)


def printable_path(path: Path) -> str:
    """The path, quoted if it holds characters that cannot be printed."""
    return str(path) if str(path).isprintable() else format_value(path)


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        return read_regular_file(path, max_bytes, "a configuration")
    except ValueError as error:
        raise ConfigError(f"{printable_path(path)}: {error}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{format_value(name)} is given twice")
        for each in _numbers(value):
            if not math.isfinite(each):
                raise ValueError(f"{format_value(name)}: found {each}, expected a finite number")
        found[name] = value
    return found


def _numbers(value: Any) -> Iterator[float]:
    """The floats that a field holds, also in lists; objects in lists have been checked before."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _numbers(each)


def _integer(digits: str) -> int:
    if len(digits) > MAX_NUMBER_CHARACTERS:
        raise ValueError(f"holds a number of {len(digits):,} digits, expected at most {MAX_NUMBER_CHARACTERS}")
    return int(digits)
