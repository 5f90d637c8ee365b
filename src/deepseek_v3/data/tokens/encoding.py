"""Encoding documents to ids, a pure function of their texts, in this process or in several worker processes."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.tokens.fim import FillInMiddle
from deepseek_v3.data.tokens.holdout import HoldoutRule
from deepseek_v3.data.tokens.index import CorpusOptions, Split, token_dtype
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.process_pool import WorkerPool

_ALONE_CHARACTERS = 2**24  # about the number that this process encodes while worker processes start


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded documents in order.

    `ids`, uint16 or uint32, holds the ids of all documents without end-of-text; `lengths` is the number of ids of
    each document, `num_bytes` the number of bytes of its text.
    """

    ids: NDArray[Any]
    lengths: list[int]
    num_bytes: list[int]
    splits: list[Split]

    def documents(self) -> Iterator[tuple[Split, NDArray[Any], int]]:
        """The split, the ids and the number of bytes of each document."""
        start = 0
        for split, length, num_bytes in zip(self.splits, self.lengths, self.num_bytes, strict=True):
            yield split, self.ids[start : start + length], num_bytes
            start += length


class CorpusEncoder:
    """Encodes documents with `options`; `holdout` splits them, by default by the share in `options`.

    Raises DataError if `options.fim_rate` is above 0 and the tokenizer has no FIM markers.
    """

    def __init__(self, tokenizer: Tokenizer, options: CorpusOptions, holdout: HoldoutRule | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.holdout = holdout or HoldoutRule(options.holdout * 2**64)
        self._fim = FillInMiddle(options.fim_rate, options.seed, tokenizer.fim)
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size))

    def encode(self, texts: Sequence[str]) -> EncodedBatch:
        """Encodes texts; those for training may be reordered for fill-in-the-middle."""
        split_texts = list(chain.from_iterable(map(self.holdout.split, texts)))
        parts = [self._fim.split(text) if split == "train" else [text] for split, text in split_texts]
        encoded = iter(self.tokenizer.encode_batch(list(chain.from_iterable(parts))))
        documents = [self._fim.join([next(encoded) for _ in part]) for part in parts]
        return EncodedBatch(
            ids=np.fromiter(chain.from_iterable(documents), self._dtype),
            lengths=[len(ids) for ids in documents],
            num_bytes=[len(text.encode("utf-8")) for _, text in split_texts],
            splits=[split for split, _ in split_texts],
        )


def encode_batches(encoder: CorpusEncoder, batches: Iterator[list[str]], workers: int) -> Generator[EncodedBatch]:
    """Encodes batches of texts, in order: the first 16 million characters here, the rest in `workers` processes.

    Reads ahead at most two batches per worker. The worker processes end when the iterator is closed, or when this
    process ends for any reason. Raises DataError if one of them dies.
    """
    characters = 0
    for batch in batches:
        yield encoder.encode(batch)
        characters += sum(map(len, batch))
        if workers > 1 and characters >= _ALONE_CHARACTERS:
            break
    first = next(batches, None)
    if first is not None:
        yield from _encoded_by_processes(encoder, chain([first], batches), workers)


def _encoded_by_processes(
    encoder: CorpusEncoder, batches: Iterator[list[str]], workers: int
) -> Generator[EncodedBatch]:
    tokenizer = encoder.tokenizer
    arguments = (tokenizer.to_json(), tokenizer.ends, encoder.options, encoder.holdout)
    advice = "run the command again with fewer workers"
    with WorkerPool(workers, _prepare_worker, arguments, modules=[__name__], advice=advice) as pool:
        yield from pool.map(_encode, batches)


def _prepare_worker(tokenizer: str, ends: Sequence[int], options: CorpusOptions, holdout: HoldoutRule) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process for each core is enough
    _encoder = CorpusEncoder(Tokenizer(tokenizer, ends=ends), options, holdout)


def _encode(texts: list[str]) -> EncodedBatch:
    return _encoder.encode(texts)


_encoder: CorpusEncoder  # set in worker processes only
