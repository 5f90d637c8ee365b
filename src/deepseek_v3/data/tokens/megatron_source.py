"""Megatron-LM datasets as the two splits of a run: two prefixes, or one of which a share is held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

import numpy as np

from deepseek_v3.data.tokens.index import Split
from deepseek_v3.data.tokens.megatron_dataset import MegatronDataset
from deepseek_v3.data.tokens.megatron_index import bin_file, idx_file
from deepseek_v3.data.tokens.source import Tokens, TokenSource, parts_of_range
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import pluralize

_MOST_STRETCHES = 64  # that the hold-out of one dataset consists of
_DOCUMENTS_PER_STRETCH = 8  # on average, so that whole documents make up about the share

Stretch = tuple[int, int]  # the first token, and the end

_log = get_logger("Tokens")


@dataclass(frozen=True)
class _Part:
    """A split: the stretches of a dataset that belong to it, ascending."""

    dataset: MegatronDataset
    stretches: tuple[Stretch, ...]

    @cached_property
    def starts(self) -> list[int]:
        """The first token of each stretch, counted through the split, and the end."""
        return [0, *accumulate(stop - start for start, stop in self.stretches)]

    def checksum(self) -> str:
        """A checksum of the dataset, as `MegatronDataset.checksum` reads it, and of the stretches."""
        return _sha256(f"{self.dataset.checksum()} {self.stretches}")


class MegatronSource(TokenSource):
    """Reads Megatron-LM datasets with the `tokenizer` that made them, a tokenizer.json or a folder that holds one.

    `holdout` is the dataset that is held out, or the share of the training dataset to hold out: whole documents, in
    up to 64 stretches that are spread evenly over it, so that every part of the dataset is represented.

    `check_ids` reads all tokens once and compares their ids with the tokenizer's; what is read for training is
    always compared. Raises DataError if a file is missing or damaged, if the two do not fit each other or the
    tokenizer, and if a split would be empty.
    """

    def __init__(self, prefix: Path, tokenizer: Path, holdout: Path | float, check_ids: bool = True) -> None:
        self._prefix = prefix
        self._tokenizer = Tokenizer.load(tokenizer)
        self._tokenizer_file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        train = MegatronDataset(prefix)
        self._parts = _two_datasets(train, holdout) if isinstance(holdout, Path) else _hold_out(train, holdout)
        self._identity = [_sha256(self._tokenizer.to_json()), self._parts["train"].checksum()]
        self._num_bytes: dict[Split, int] = {}
        for dataset in dict.fromkeys(part.dataset for part in self._parts.values()):
            if dataset.index.has_other_modes():
                _log.warning(
                    f"{idx_file(dataset.prefix)}: some of its sequences have a mode other than 0, which is text; "
                    "they are read as token ids like all others"
                )
            if check_ids:
                self._check_dataset(dataset)

    @property
    def name(self) -> str:
        """The prefix of the training dataset."""
        return str(self._prefix)

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return self._tokenizer.vocab_size

    @property
    def end_of_text(self) -> int:
        """The id of the marker after each document."""
        return self._tokenizer.end_of_text

    @property
    def identity(self) -> list[str]:
        """The SHA-256 of the tokenizer, and a checksum of the training dataset and of its stretches."""
        return self._identity

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens."""
        return self._tokenizer

    def num_tokens(self, split: Split) -> int:
        """Tokens in a split."""
        return self._parts[split].starts[-1]

    def num_bytes(self, split: Split) -> int:
        """Bytes of UTF-8 text in a split, as the tokenizer counts them for the ids; read once."""
        if split not in self._num_bytes:
            lengths = self._tokenizer.byte_lengths
            self._num_bytes[split] = sum(int(lengths[block].sum()) for block in self.blocks(split))
        return self._num_bytes[split]

    def read(self, split: Split, start: int, length: int) -> Tokens:
        """Tokens `start` to `start + length` of a split: [length], of the dataset's type.

        Raises ValueError if the range is empty or exceeds the split, and DataError if it cannot be read or holds an
        id that the tokenizer does not have.
        """
        part = self._parts[split]
        found = []
        for number, first, last in parts_of_range(part.starts, start, length, split):
            begin = part.stretches[number][0]
            tokens = part.dataset.read(begin + first, last - first)
            self._check_ids(part.dataset, begin + first, tokens)
            found.append(tokens)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def places(self, split: Split, start: int, length: int) -> list[str]:
        """Where these tokens are: `FILE.bin:FIRST-END` for each stretch that holds some of them, in tokens."""
        part = self._parts[split]
        ranges = parts_of_range(part.starts, start, length, split)
        begins = [(part.stretches[number][0], first, last) for number, first, last in ranges]
        return [f"{bin_file(part.dataset.prefix)}:{begin + first}-{begin + last}" for begin, first, last in begins]

    def _check_ids(self, dataset: MegatronDataset, start: int, tokens: Tokens) -> None:
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise DataError(
                f"{bin_file(dataset.prefix)}: token {start + place} has id {tokens[place]}, expected 0 to "
                f"{self.vocab_size - 1}, the ids of {self._tokenizer_file}; name the tokenizer that made this "
                "dataset"
            )

    def _check_dataset(self, dataset: MegatronDataset) -> None:
        """Checks all ids, and warns if there are fewer end-of-text markers than documents."""
        ends = 0
        for start, tokens in dataset.blocks():
            self._check_ids(dataset, start, tokens)
            ends += int((tokens == self.end_of_text).sum())
        documents = dataset.index.num_documents
        if ends < documents:
            _log.warning(
                f"{bin_file(dataset.prefix)}: holds {pluralize(documents, 'document')} and "
                f"{pluralize(ends, 'end-of-text marker')} (id {self.end_of_text}), so nothing separates some "
                "documents in training, nor with data.mask_documents; preprocess_data.py writes the markers with "
                "--append-eod"
            )


def _sha256(text: str) -> str:
    return sha256(text.encode("utf-8")).hexdigest()


def _two_datasets(train: MegatronDataset, holdout: Path) -> dict[Split, _Part]:
    other = MegatronDataset(holdout)
    return {
        "train": _Part(train, ((0, train.index.num_tokens),)),
        "holdout": _Part(other, ((0, other.index.num_tokens),)),
    }


def _hold_out(dataset: MegatronDataset, share: float) -> dict[Split, _Part]:
    """Holds out about `share` of the tokens of a dataset, as whole documents.

    The dataset is cut into equal strata, and the end of each stratum, from the beginning of a document to the
    beginning of another, is held out. Raises DataError if no whole document is left for a split.
    """
    index = dataset.index
    total, documents = index.num_tokens, index.num_documents
    strata = max(1, min(_MOST_STRETCHES, int(share * min(documents, total)) // _DOCUMENTS_PER_STRETCH))
    train: list[Stretch] = []
    held_out: list[Stretch] = []
    end = 0
    for number in range(1, strata + 1):
        border = total * number // strata
        start = index.document_start(index.document_at(border - max(1, int(share * total / strata))))
        stop = total if number == strata else index.document_start(index.document_at(border))
        train.append((end, start))
        held_out.append((start, stop))
        end = stop
    train, held_out = ([pair for pair in pairs if pair[0] < pair[1]] for pairs in (train, held_out))
    if not train or not held_out:
        raise DataError(
            f"{idx_file(dataset.prefix)}: holdout = {share} of its {pluralize(documents, 'document')} leaves no "
            "whole document to one of the splits; name a second dataset with holdout_path, or change holdout"
        )
    tokens = sum(stop - start for start, stop in held_out)
    _log.info(
        f"{dataset.prefix}: hold-out: {tokens:,} of {total:,} tokens, {tokens / total:.1%}, whole documents in "
        f"{len(held_out)} {'stretch' if len(held_out) == 1 else 'stretches'}"
    )
    return {"train": _Part(dataset, tuple(train)), "holdout": _Part(dataset, tuple(held_out))}
