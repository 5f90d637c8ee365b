"""What a rule found in each document of a batch, and whether that breaks the rule.

FOLDED: What the published filters look for in a line; the expressions mean the same to Python and to Arrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array

RuleValues = Int64Array | Float64Array


def _nothing(document: int) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True)
class RuleResult:
    """A rule's code and threshold, and by document the figure, whether it breaks the rule, what text decided."""

    code: str
    limit: float
    found: RuleValues
    broken: BoolArray
    trigger: Callable[[int], str | None] = _nothing

    def restricted_to(self, documents: BoolArray) -> RuleResult:
        """The same where only some documents are asked."""
        return replace(self, broken=self.broken & documents)


def at_most(
    code: str, found: RuleValues, limit: float | None, trigger: Callable[[int], str | None] = _nothing
) -> Iterator[RuleResult]:
    """The rule `code`, if it is on: no figure may be above its limit."""
    if limit is not None:
        yield RuleResult(code, limit, found, found > limit, trigger)


def at_least(code: str, found: RuleValues, limit: float | None) -> Iterator[RuleResult]:
    """The rule `code`, if it is on: no figure may be below its limit."""
    if limit is not None:
        yield RuleResult(code, limit, found, found < limit)


def ratio(part: Int64Array, whole: Int64Array) -> Float64Array:
    """`part` of `whole`, where an empty whole counts as 1."""
    return part / np.maximum(whole, 1)


BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
# C4. Phrases are found in any case of ASCII.
FINAL_MARKS = (".", "?", "!", '"', "'")
CITATION = r"\[(?:[0-9]*|edit|citation needed)\]"
LOREM_IPSUM = ("lorem ipsum",)
JAVASCRIPT = ("javascript",)
CURLY_BRACKET = ("{",)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
