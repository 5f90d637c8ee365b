"""Several weighted sources of tokens in one run: their common tokenizer, and the loader that mixes samples."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.mixture_order import MixtureOrder
from deepseek_v3.data.tokens.source import RunTokens, TokenSource, WeightedSource
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError


class TokenMixture(RunTokens):
    """Named sources with positive weights of any sum, which share the meaning of every id.

    A weight counts as the decimal number that it is written as: 0.7 is 7/10. Raises DataError if an id stands for
    different tokens, or another id ends a text, in two of the sources.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], sources: Sequence[TokenSource]) -> None:
        exact = [Fraction(repr(weight)) for weight in weights]
        self._parts = tuple(
            WeightedSource(name, weight / sum(exact), source)
            for name, weight, source in zip(names, exact, sources, strict=True)
        )
        for part in self._parts[1:]:
            _check_same_ids(self._parts[0], part)

    @property
    def name(self) -> str:
        """The name and the path of each source."""
        return ", ".join(f"{part.name} ({part.source.name})" for part in self._parts)

    @property
    def parts(self) -> tuple[WeightedSource, ...]:
        """The sources in the order of the config."""
        return self._parts

    @property
    def vocab_size(self) -> int:
        """The number of ids of the common tokenizer."""
        return self._parts[0].source.vocab_size

    @property
    def end_of_text(self) -> int:
        """The id of the marker after each document."""
        return self._parts[0].source.end_of_text

    @property
    def identity(self) -> list[str]:
        """The checksum of the first source's tokenizer, then one for the training tokens of each source."""
        identities = [part.source.identity for part in self._parts]
        return [identities[0][0], *(sha256(" ".join(train).encode()).hexdigest() for _, *train in identities)]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of the first source."""
        return self._parts[0].source.load_tokenizer()


class SamplePlace(NamedTuple):
    """Where a sample comes from: its source, the epoch over it, from 0, and its first token in the train split."""

    source: WeightedSource
    epoch: int
    first_token: int


class MixtureLoader:
    """Reads the training samples of a run, mixed from its sources in the order of `MixtureOrder`.

    Each source is read in shuffled epochs of its own, as `TokenLoader` reads it. The first source is shuffled with
    the run's own seed, so that a mixture of one source has the samples of that source alone.
    """

    def __init__(self, tokens: RunTokens, *, sequence_length: int, seed: int = 0) -> None:
        self.sequence_length = sequence_length
        self._parts = tokens.parts
        self._order = MixtureOrder([part.share for part in tokens.parts])
        self._loaders = [
            TokenLoader(part.source, sequence_length=sequence_length, seed=source_seed(seed, number))
            for number, part in enumerate(tokens.parts)
        ]

    def sample(self, i: int) -> Int64Array:
        """Sample `i`, counted from 0 through the whole run: [sequence_length + 1] int64."""
        return self.batch(i, 1)[0]

    def place(self, i: int) -> SamplePlace:
        """Where sample `i` comes from."""
        number, own = self._order.place(i)
        return SamplePlace(self._parts[number], *self._loaders[number].place(own))

    def batch(self, first: int, count: int) -> Int64Array:
        """Samples `first` to `first + count`: [count, sequence_length + 1] int64."""
        places = [self._order.place(i) for i in range(first, first + count)]
        samples = np.empty((count, self.sequence_length + 1), np.int64)
        for number, loader in enumerate(self._loaders):
            rows = [row for row, (source, _) in enumerate(places) if source == number]
            if rows:  # successive samples of a source, between samples of others
                samples[rows] = loader.batch(places[rows[0]][1], len(rows))
        return samples


def source_seed(seed: int, number: int) -> int | tuple[int, int]:
    """The seed that shuffles source `number` of a run whose own seed is `seed`."""
    return (seed, number) if number else seed


def _check_same_ids(one: WeightedSource, other: WeightedSource) -> None:
    """Raises DataError unless every id means the same in both sources."""
    ours, theirs = one.source.load_tokenizer(), other.source.load_tokenizer()
    same_text = ours.has_the_ids_of(theirs) and ours.decoder_steps == theirs.decoder_steps
    if same_text and ours.end_of_text == theirs.end_of_text:
        return
    ids = range(max(ours.vocab_size, theirs.vocab_size))
    id_ = next((id_ for id_ in ids if ours.token(id_) != theirs.token(id_)), None)
    if id_ is not None:
        difference = f"id {id_} is {_shown(theirs, id_)} in the one and {_shown(ours, id_)} in the other"
    elif ours.end_of_text != theirs.end_of_text:
        difference = f"id {theirs.end_of_text} ends a text in the one and id {ours.end_of_text} in the other"
    else:
        difference = "they decode the same tokens to different text"
    raise DataError(
        f"data.sources: {other.name} ({other.source.name}) and {one.name} ({one.source.name}) have different "
        f"tokenizers: {difference}; tokenize both with the same tokenizer.json (dsv3 tokenize --tokenizer)"
    )


def _shown(tokenizer: Tokenizer, id_: int) -> str:
    token = tokenizer.token(id_)
    return "no token" if token is None else repr(token[:40])
