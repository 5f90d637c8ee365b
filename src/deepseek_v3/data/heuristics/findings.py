"""What a rule found in each document of a batch, and whether that breaks the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.heuristics.arrays import Ints, Mask

Figures = NDArray[np.int64] | NDArray[np.float64]


def _nothing(document: int) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True)
class Finding:
    """A rule's code and threshold, and by document the figure, whether it breaks the rule, what text decided."""

    code: str
    limit: float
    found: Figures
    broken: Mask
    trigger: Callable[[int], str | None] = _nothing

    def among(self, documents: Mask) -> Finding:
        """The same where only some documents are asked."""
        return replace(self, broken=self.broken & documents)


def above(
    code: str, found: Figures, limit: float | None, trigger: Callable[[int], str | None] = _nothing
) -> Iterator[Finding]:
    """The rule `code`, if it is on: no figure may be above its limit."""
    if limit is not None:
        yield Finding(code, limit, found, found > limit, trigger)


def below(code: str, found: Figures, limit: float | None) -> Iterator[Finding]:
    """The rule `code`, if it is on: no figure may be below its limit."""
    if limit is not None:
        yield Finding(code, limit, found, found < limit)


def share(part: Ints, whole: Ints) -> NDArray[np.float64]:
    """`part` of `whole`, where an empty whole counts as 1."""
    return part / np.maximum(whole, 1)
