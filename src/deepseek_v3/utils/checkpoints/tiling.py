"""Whether boxes cut a tensor into parts: each of its numbers in exactly one of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product

Numbers = tuple[int, ...]
Box = tuple[Numbers, Numbers]  # offsets and sizes

_MOST_CUT_AXES = 8  # a box has 2**n corners


def tiling_problem(shape: Numbers, boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should hold each number of a tensor exactly once; None where nothing is.

    The boxes have as many axes as `shape` and lie within it; their order does not matter, and empty ones do not
    count. Takes time linear in the number of boxes, whatever way they cut the tensor.
    """
    if 0 in shape:
        return None
    filled = [(offsets, sizes) for offsets, sizes in boxes if 0 not in sizes]
    axes = [axis for axis, size in enumerate(shape) if any(sizes[axis] != size for _, sizes in filled)]
    if len(axes) > _MOST_CUT_AXES:
        return f"is cut along {len(axes)} axes, expected at most {_MOST_CUT_AXES}"
    place = _first_miscounted([shape[axis] for axis in axes], [_along(axes, box) for box in filled])
    if place is None:
        return None
    position, surplus = place
    index = [0] * len(shape)
    for axis, coordinate in zip(axes, position, strict=True):
        index[axis] = coordinate
    return f"has the number at {index} {'in no chunk' if surplus < 0 else f'in {surplus + 1} chunks'}"


def _along(axes: Sequence[int], box: Box) -> Box:
    offsets, sizes = box
    return tuple(offsets[axis] for axis in axes), tuple(sizes[axis] for axis in axes)


def _first_miscounted(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[Numbers, int] | None:
    """The first position, row by row, that is not in exactly one box, and in how many more than one it is.

    How many boxes hold a position is the sum over all corners before it of their signs, +1 or -1. So the boxes hold
    each position once where their corners cancel to those of the whole, and else the first corner that is left over
    is the first wrong position, wrong by its own sum of signs.
    """
    corners: Counter[Numbers] = Counter()
    whole = ((0,) * len(shape), tuple(shape))
    for weight, (offsets, sizes) in [(-1, whole), *((1, box) for box in boxes)]:
        ends = [((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)]
        for corner in product(*ends):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    left_over = [corner for corner, sign in corners.items() if sign]
    return (min(left_over), corners[min(left_over)]) if left_over else None
