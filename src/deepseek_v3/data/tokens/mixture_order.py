"""The order in which a mixture takes its samples from its sources: a pure function of the number of the sample.

Of the first n samples of a run, source k has n · share_k, give or take less than 2, for any n: the shares are right
at every moment. The order does not depend on the length of the run, the batch size or the ranks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class _Split:
    """Divides samples among two subtrees; `share` of them go `left`. A subtree is a split or a source's number."""

    share: Fraction
    left: _Split | int
    right: _Split | int

    def count_left(self, n: int) -> int:
        """How many of the first n samples go left: n · share, rounded."""
        numerator, denominator = self.share.numerator, self.share.denominator
        return (2 * n * numerator + denominator) // (2 * denominator)


class MixtureOrder:
    """Says which source each sample comes from, and which of that source's samples it is.

    `weights`, positive numbers of any sum, give the shares. Only whole numbers are computed, so the result is exact
    for any sample. It takes two divisions for each split on the way to the source.

    The sources are the leaves of a binary tree. A split divides the samples that reach it evenly, with a rounding
    error of at most 1/2, and each subtree inherits its share of the error of the split above it. In a Huffman tree
    the share of a subtree that is split again is at most 2/3, so the error of a split is below
    1/2 · (1 + 2/3 + 4/9 + …) = 3/2, and that of a source below 1/2 + 3/2 = 2.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        if not weights or min(weights) <= 0:
            raise ValueError(f"weights = {weights}: expected at least one, each above 0")
        self._num_sources = len(weights)
        trees: list[tuple[Fraction, int, _Split | int]] = [(weight, k, k) for k, weight in enumerate(weights)]
        heapq.heapify(trees)
        while len(trees) > 1:
            (light, _, right), (heavy, number, left) = heapq.heappop(trees), heapq.heappop(trees)
            # The number, that of the first leaf, makes trees of equal weight comparable.
            heapq.heappush(trees, (light + heavy, number, _Split(heavy / (light + heavy), left, right)))
        self._root = trees[0][2]

    def place(self, i: int) -> tuple[int, int]:
        """The number of the source of sample `i`, and the number of the sample among those of the source."""
        tree = self._root
        while isinstance(tree, _Split):
            before = tree.count_left(i)
            goes_left = tree.count_left(i + 1) > before
            tree, i = (tree.left, before) if goes_left else (tree.right, i - before)
        return tree, i

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` samples come from each source."""
        counts = [0] * self._num_sources
        below = [(self._root, n)]
        while below:
            tree, n = below.pop()
            if isinstance(tree, _Split):
                left = tree.count_left(n)
                below += [(tree.left, left), (tree.right, n - left)]
            else:
                counts[tree] = n
        return counts
