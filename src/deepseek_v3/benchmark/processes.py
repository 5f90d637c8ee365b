"""Runs one measurement in a process of its own, so that it begins with an empty GPU and leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from deepseek_v3.utils.errors import BenchmarkError, UserError
from deepseek_v3.utils.process_pool import exit_with_parent

Result = TypeVar("Result")


def run_apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a module's function in a new Python process and returns what it returns.

    The function, its arguments and its result must be picklable. Raises BenchmarkError with the reason in one line
    if the function raises, or if its process dies; unless it is a UserError, the traceback is on standard error.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=exit_with_parent) as pool:
        try:
            result, failure = pool.submit(_attempt, function, arguments).result()
        except BrokenProcessPool:
            raise BenchmarkError("its process was killed, perhaps for lack of memory") from None
    if failure is not None:
        raise BenchmarkError(failure)
    return result  # type: ignore[return-value]


def _attempt(function: Callable[..., Result], arguments: tuple[Any, ...]) -> tuple[Result | None, str | None]:
    """The result, or the reason of the failure: the errors of other libraries need not be picklable."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 -- whatever another system may raise
        traceback.print_exc(file=sys.stderr)
        return None, " ".join(f"{type(error).__name__}: {error}".split())
