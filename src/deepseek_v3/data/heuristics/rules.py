"""The results of a rule for a batch of documents, and the marks and phrases that the published rules look for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.arrays import BoolArray, Float64Array, Int64Array
from deepseek_v3.data.scripts import SENTENCE_ENDS

RuleValues = Int64Array | Float64Array

# Regular expressions here mean the same to Python and to Arrow (RE2).
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
# C4; phrases match in any ASCII case.
_ENDS = "".join(sorted(SENTENCE_ENDS))
_QUOTES = "\"'”’“»«›‹」』"
_THAI_AND_LAO = "\u0e01-\u0eff"
# The end of a line that ends like a sentence: an end mark of any script, also in quotation marks or brackets, or a
# letter of Thai or Lao, which have no such mark. An ellipsis is none.
FINAL_MARK = rf"(?:[{_ENDS}][{_QUOTES}）)\]］]*|[{_QUOTES}{_THAI_AND_LAO}])$"
# A new sentence within a line, after the end mark of a script other than Latin.
INNER_SENTENCE = rf"[{''.join(sorted(SENTENCE_ENDS - set('.?!')))}][^{_ENDS}{_QUOTES}）)\]］]"
SMALL_START = "^[a-zß-öø-ÿα-ωа-я]"
# A line that begins like this does not continue the line before it.
LIST_MARK = r"^(?:[-*+•]|[0-9]{1,3}[.)])(?:[ \t]|$)"
CITATION = r"\[(?:[0-9]*|edit|citation needed)\]"
LOREM_IPSUM = ("lorem ipsum",)
JAVASCRIPT = ("javascript",)
CURLY_BRACKET = ("{",)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class BrokenRule(NamedTuple):
    """A rule that a document breaks: its code, the value found, the limit, and the text that decided."""

    code: str
    found: float
    limit: float
    trigger: str | None = None


def _no_trigger(document: int) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True)
class RuleResult:
    """The result of one rule for a batch.

    `code` names the rule, `limit` is its threshold. `found` holds the measured value of each document, `broken`
    (bool) marks the documents that break the rule, and `trigger(document)` returns the text that decided.
    """

    code: str
    limit: float
    found: RuleValues
    broken: BoolArray
    trigger: Callable[[int], str | None] = _no_trigger

    def restricted_to(self, documents: BoolArray) -> RuleResult:
        """Returns the result with the rule applied to the marked documents only."""
        return replace(self, broken=self.broken & documents)


def at_most(
    code: str, found: RuleValues, limit: float | None, trigger: Callable[[int], str | None] = _no_trigger
) -> Iterator[RuleResult]:
    """Yields the result of a rule that allows values up to `limit`; nothing if `limit` is None."""
    if limit is not None:
        yield RuleResult(code, limit, found, found > limit, trigger)


def at_least(code: str, found: RuleValues, limit: float | None) -> Iterator[RuleResult]:
    """Yields the result of a rule that allows values from `limit` up; nothing if `limit` is None."""
    if limit is not None:
        yield RuleResult(code, limit, found, found < limit)


def ratio(part: Int64Array, whole: Int64Array) -> Float64Array:
    """Returns part / whole; a whole of 0 counts as 1."""
    return part / np.maximum(whole, 1)
