"""Which of the two implementations of the loops over all text runs: NumPy's, or Numba's where it is installed."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

from deepseek_v3.data.deduplication.kernels import numpy_kernels
from deepseek_v3.utils.errors import DataError

_PACKAGE = __name__.rpartition(".")[0]


@lru_cache(maxsize=3)
def select_kernels(accelerator: str) -> ModuleType:
    """The module with the loops that cost the time. Raises DataError if Numba is asked for and missing."""
    if accelerator != "numpy":
        try:
            return import_module(f"{_PACKAGE}.numba_kernels")
        except ImportError as error:
            if accelerator == "numba":
                raise DataError(
                    f"accelerator: numba cannot be loaded: {error}; run pip install 'deepseek_v3[numba]', or take "
                    "numpy, which gives the same results"
                ) from None
    return numpy_kernels
