"""Histograms: counts by value, in about 25 bins at most, of equal width on a linear or logarithmic axis."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")
_MOST_BINS = 25
_MOST_TICKS = 6
_SMALLEST = 1e-300  # widths of bins below it would lose digits
_NEARLY = 1e-9  # rounding error of a value on the edge of a bin


@dataclass(frozen=True)
class Axis:
    """An axis: its name, the functions from a value to its position and back, and the width of a bin on it."""

    name: str
    place: Callable[[float], float]
    value: Callable[[float], float]
    width: float


@dataclass(frozen=True)
class Histogram:
    """Counts before and after, by bin. `edges` limit the bins; `ticks` are the indices of labelled edges."""

    axis: Axis
    edges: list[float]
    before: list[int]
    after: list[int]
    ticks: list[int]


def numeric_counts(counts: Mapping[str, int]) -> dict[float, int]:
    """The counts of the keys that are finite numbers, such as "0.93" and "1.2e+02"."""
    return {float(key): number for key, number in counts.items() if _NUMBER.fullmatch(key)}


def length_histogram(before: Mapping[str, int], after: Mapping[str, int]) -> Histogram | None:
    """The histogram of lengths, whose keys are floor(log2(1 + bytes)); bin k holds 2^k - 1 to 2^(k+1) - 2 bytes.

    None if there are no counts.
    """
    if not before and not after:
        return None
    axis = Axis("logarithmic", lambda size: math.log2(1 + size), _doubled, 1)
    bins = [Counter({int(key): number for key, number in counts.items()}) for counts in (before, after)]
    return _histogram(axis, bins[0], bins[1])


def number_histogram(before: Mapping[float, int], after: Mapping[float, int], name: str) -> Histogram:
    """The histogram of at least one value, on an axis chosen by the values and by their `name`."""
    values = {*before, *after}
    smallest, largest = min(values), max(values)
    whole = all(value.is_integer() for value in values)
    axis = _choose_axis(smallest, largest, name, 1 if whole else 0)
    last = _bin(axis, largest)
    if not whole and last > _bin(axis, smallest) and axis.place(largest) / axis.width <= last + _NEARLY:
        last -= 1  # the largest value is an edge, as a score of 1 is: it needs no bin
    bins = []
    for counts in (before, after):
        binned: Counter[int] = Counter()
        for value, number in counts.items():
            binned[min(_bin(axis, value), last)] += number
        bins.append(binned)
    return _histogram(axis, bins[0], bins[1])


def word_counts(before: Mapping[str, int], after: Mapping[str, int], most: int) -> list[tuple[str, int, int]]:
    """Words with their counts before and after, the most frequent first; after `most` words the rest is summed."""
    ranked = sorted({*before, *after}, key=lambda word: (-before.get(word, 0), word))
    rows = [(word, before.get(word, 0), after.get(word, 0)) for word in ranked]
    rest = rows[most:]
    if rest:
        others = f"{len(rest):,} others"
        rows[most:] = [(others, sum(row[1] for row in rest), sum(row[2] for row in rest))]
    return rows


def median(counts: Mapping[float, int]) -> float | None:
    """The lower median of counted values, or None if there are none."""
    total = sum(counts.values())
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        if 2 * seen >= total:
            return value
    return None


def _histogram(axis: Axis, before: Counter[int], after: Counter[int]) -> Histogram:
    first, last = min([*before, *after]), max([*before, *after])
    bins = range(first, last + 1)
    every = next(
        step for step in _tick_steps() if sum(place % step == 0 for place in range(first, last + 2)) <= _MOST_TICKS
    )
    return Histogram(
        axis,
        [axis.value(place * axis.width) for place in range(first, last + 2)],
        [before[place] for place in bins],
        [after[place] for place in bins],
        [index for index, place in enumerate(range(first, last + 2)) if place % every == 0],
    )


def _tick_steps() -> list[int]:
    return [digit * 10**power for power in range(6) for digit in (1, 2, 5)]


def _bin(axis: Axis, value: float) -> int:
    return math.floor(axis.place(value) / axis.width + _NEARLY)


def _choose_axis(smallest: float, largest: float, name: str, narrowest: float) -> Axis:
    """Chooses an axis: logarithmic for perplexities and for values that span decades, otherwise linear.

    Values from 0 to more than 100 have bins that double. The bins of a linear axis are at least `narrowest` wide.
    """
    if smallest > 0 and ("perplexity" in name or (largest > 1 and largest / smallest >= 100)):
        decades = math.log10(largest) - math.log10(smallest)
        return Axis("logarithmic", math.log10, lambda place: 10**place, _width(decades, 0.1))
    if smallest == 0 and largest > 100:
        doublings = math.log2(1 + largest)
        return Axis("logarithmic", lambda value: math.log2(1 + value), _doubled, _width(doublings, 1))
    extent = max(abs(smallest), abs(largest), _SMALLEST) if smallest or largest else 1
    finest = 10.0 ** (math.ceil(math.log10(extent)) - 2)  # values are counted to two digits
    return Axis("linear", float, float, _width(largest - smallest, max(finest, narrowest)))


def _doubled(place: float) -> float:
    return 2**place - 1


def _width(extent: float, finest: float) -> float:
    """The width of a bin: 1, 2 or 5 times a power of ten, at least `finest`, for at most 25 bins."""
    wanted = max(extent / _MOST_BINS, finest)
    power = 10.0 ** math.floor(math.log10(wanted) + _NEARLY)
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= wanted * (1 - _NEARLY))
