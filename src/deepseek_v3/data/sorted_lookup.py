"""Looking up many numbers at once in an ascending array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def find_sorted(keys: NDArray[Any], wanted: NDArray[Any]) -> NDArray[np.int64]:
    """Where each wanted number stands in the ascending `keys`, at its last place; -1 where it does not."""
    if not len(keys):
        return np.full(len(wanted), -1, np.int64)
    # Each number once and in order: the search then walks through memory instead of jumping.
    different, places = np.unique(wanted, return_inverse=True)
    rows = np.searchsorted(keys, different, side="right") - 1
    return np.where(keys[rows] == different, rows, -1)[places]
