"""Batches of token windows in a random order without state: sample `i` is a pure function of (seed, i).

A run that knows how many samples it has consumed resumes bit for bit, on any number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from deepseek_v3.data.arrays import SPLITMIX64_GAMMA, Int64Array, UInt64Array, mix64
from deepseek_v3.data.tokens.index import Split
from deepseek_v3.data.tokens.source import TokenSource
from deepseek_v3.utils.errors import DataError

_ROUNDS = 6
_MIN_HALF_BITS = 3  # with smaller halves, 6 rounds make some permutations likelier than others
_READ_AHEAD = 1  # items

Item = TypeVar("Item")
Result = TypeVar("Result")


class Permutation:
    """A pseudo-random permutation of range(n) that computes any index without storing the permutation.

    A balanced Feistel network permutes range(4^k), the first of 64, 256, … that is at least n. A result outside
    range(n) goes through the network again until it is inside (cycle walking, Black and Rogaway 2002). From n = 16
    on, this takes at most 4 passes on average.
    """

    def __init__(self, n: int, seed: int | tuple[int, ...]) -> None:
        if not 1 <= n <= 2**62:
            raise ValueError(f"n = {n}, expected 1 to 2**62")
        self.n = n
        half_bits = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64(2**half_bits - 1)
        digest = blake2b(repr(seed).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, np.dtype("<u8")).astype(np.uint64)

    def __call__(self, index: ArrayLike) -> Int64Array:
        """The image of each index: int64, in the shape of `index`. Raises IndexError outside range(n)."""
        indices = np.asarray(index, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.n:
            raise IndexError(f"index outside range({self.n})")
        values = self._permute(indices.reshape(-1).astype(np.uint64))
        while (outside := values >= np.uint64(self.n)).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64).reshape(indices.shape)

    def _permute(self, values: UInt64Array) -> UInt64Array:
        """One pass of the network over range(4^k)."""
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right


class TokenLoader:
    """Reads a split in windows of `sequence_length` tokens, each once per epoch.

    A sample is a window with the token after it: the inputs are all its tokens except the last, the targets all
    except the first. With `shuffle` every epoch has a different random order; without, samples come in the order of
    the split. The end of the split is dropped if it is too short for a window.

    Raises DataError if the split holds no window.
    """

    def __init__(
        self,
        source: TokenSource,
        split: Split = "train",
        *,
        sequence_length: int,
        seed: int | tuple[int, ...] = 0,
        shuffle: bool = True,
    ) -> None:
        self.sequence_length = sequence_length
        self.num_samples = (source.num_tokens(split) - 1) // sequence_length
        if self.num_samples == 0:
            raise DataError(
                f"{source.name}: the split {split!r} holds {source.num_tokens(split)} tokens, expected at "
                f"least {sequence_length + 1} for one window; add text or lower training.sequence_length"
            )
        self._source, self._split, self._shuffle = source, split, shuffle
        self._seed = (seed,) if isinstance(seed, int) else seed

    def sample(self, i: int) -> Int64Array:
        """Sample `i`, counted from 0 through all epochs: [sequence_length + 1] int64."""
        return self.batch(i, 1)[0]

    def batch(self, first: int, count: int) -> Int64Array:
        """Samples `first` to `first + count`: [count, sequence_length + 1] int64."""
        return self.windows(self._positions(first, count))

    def windows(self, numbers: ArrayLike) -> Int64Array:
        """The windows with these numbers, from 0 in the order of the split: [count, sequence_length + 1] int64.

        Raises DataError if the tokens can no longer be read.
        """
        numbers = np.asarray(numbers, np.int64)
        samples = np.empty((len(numbers), self.sequence_length + 1), np.int64)
        for sample, number in zip(samples, numbers.tolist(), strict=True):
            sample[:] = self._source.read(self._split, number * self.sequence_length, self.sequence_length + 1)
        return samples

    def place(self, i: int) -> tuple[int, int]:
        """The epoch of sample `i`, from 0, and the number of its first token in the split."""
        return i // self.num_samples, int(self._positions(i, 1)[0]) * self.sequence_length

    def _positions(self, first: int, count: int) -> Int64Array:
        """The number of the window of each sample: int64 [count]."""
        epochs, positions = np.divmod(np.arange(first, first + count), self.num_samples)
        if self._shuffle:
            for epoch in np.unique(epochs):
                permutation = Permutation(self.num_samples, (*self._seed, int(epoch)))
                positions[epochs == epoch] = permutation(positions[epochs == epoch])
        return positions


def draw_windows(num_windows: int, count: int) -> Int64Array:
    """Draws `count` of `num_windows` windows of a split, or all if it has fewer: their numbers, int64, ascending.

    A stratified sample: the split is divided into `count` equal strata, and a hash of the stratum's number chooses
    one window in each. So every source is represented by its share, in any order of the sources, and the result
    depends on the arguments alone.
    """
    count = min(count, num_windows)
    quotient, remainder = divmod(num_windows, count)
    strata = np.arange(count + 1)
    borders = strata * quotient + strata * remainder // count
    widths = np.diff(borders).astype(np.uint64)
    hashes = mix64(strata[1:].astype(np.uint64) * np.uint64(SPLITMIX64_GAMMA))
    return borders[:-1] + (hashes % widths).astype(np.int64)


def prefetch(read: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Yields `read(item)` for each item, in order; a background thread reads one item ahead.

    An error in the thread is raised in place of its result. The thread ends when this iterator is exhausted or
    closed.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="token-loader")
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
