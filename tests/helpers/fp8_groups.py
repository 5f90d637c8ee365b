"""Groups of rows in FP8 columns, by hand."""

import math

from deepseek_v3.ops.fp8 import BLOCK


def places_of_rows(sizes: list[int]) -> list[int]:
    """The place of each row: groups one after the other, each from a multiple of 128 on."""
    places, start = [], 0
    for size in sizes:
        places += range(start, start + size)
        start += math.ceil(size / BLOCK) * BLOCK
    return places
