"""The file to which a measurement is written, as JSON, if `--output` names one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write, new_file_problem


def check_output(output: Path | None) -> None:
    """Raises DataError if the file exists or its folder cannot be written to, before anything is measured."""
    if output is not None and (problem := new_file_problem(output)):
        raise DataError(f"--output {output}: {problem}")


def write_results(output: Path, results: Mapping[str, Any]) -> None:
    """Writes results, complete or not at all, with null in place of numbers that JSON cannot write.

    Raises DataError if the file cannot be written.
    """
    try:
        with atomic_write(output) as partial:
            text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False, default=str)
            partial.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--output {output}: cannot be written: {error.strerror}; choose another file") from None


def _finite(value: Any) -> Any:
    """The value with None in place of NaN and infinities."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
