"""Chooses the implementation of the deduplication kernels: Numba's if it is installed, else NumPy's."""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

from deepseek_v3.data.deduplication.kernels import numpy_kernels
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.optional import missing_library

_log = get_logger("Deduplication")


@lru_cache(maxsize=3)
def select_kernels(accelerator: str) -> ModuleType:
    """Returns the kernel module for `auto`, `numba` or `numpy`, and logs the choice once per process.

    Raises DataError if `numba` is asked for and cannot be loaded.
    """
    if accelerator == "numpy":
        _log.info("accelerator = numpy: kernels in NumPy")
        return numpy_kernels
    try:
        from deepseek_v3.data.deduplication.kernels import numba_kernels
    except ImportError as error:
        if accelerator == "numba":
            advice = missing_library("accelerator = numba", "numba", "choose numpy, which gives the same results")
            raise DataError(f"{advice} ({error})") from None
        _log.info("accelerator = auto: kernels in NumPy, because numba cannot be loaded: %s", error)
        return numpy_kernels
    _log.info("accelerator = %s: kernels compiled by Numba", accelerator)
    return numba_kernels
