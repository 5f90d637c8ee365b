"""Token shards: a corpus on disk as arrays of token ids. A directory of shards holds

- `index.json`: the counts and checksums of all other files,
- `tokenizer.json`: the tokenizer that made the ids, and `tokenizer_config.json` if it has one,
- `train/00000.bin` …, `holdout/00000.bin` …: ids as little-endian uint16, or uint32 for a vocabulary above 65,536;
  end-of-text follows every document.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from deepseek_v3.data.tokens.index import (
    INDEX_FILE,
    REBUILD_HINT,
    SPLITS,
    CorpusOptions,
    Shard,
    ShardIndex,
    Split,
    SplitTotals,
    shard_name,
    token_dtype,
)
from deepseek_v3.data.tokens.pread_file import PreadFile
from deepseek_v3.data.tokens.source import Tokens, TokenSource, parts_of_range
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_config import write_tokenizer_config
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import sha256_of_file
from deepseek_v3.utils.logging import get_logger

_TOKENIZER_FILE = "tokenizer.json"
_MAX_OPEN_FILES = 512  # the most files that all readers of a run keep open
_COUNT_TOKENS = 2**20  # the tokens that a check of the counts reads at a time

_log = get_logger("Tokens")


class ShardWriter:
    """Writes token shards to an empty directory: `add` every document, then `finish`, inside a `with` block.

    A shard ends with the document that brings it to `shard_tokens` tokens; no document is split. Every file is
    fsynced. The index is written last, and a directory without an index cannot be opened.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int = 2**27) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
        end = np.asarray(tokenizer.end_of_text, self._dtype).tobytes()
        self._splits = {split: _SplitWriter(directory, split, end, shard_tokens) for split in SPLITS}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._splits.values():
            writer.close()

    def add(self, split: Split, ids: Sequence[int] | Tokens, num_bytes: int) -> None:
        """Appends a document of `num_bytes` bytes of text, at least 1, and end-of-text after it."""
        self._splits[split].add(np.asarray(ids, self._dtype), num_bytes)

    def finish(self, options: CorpusOptions) -> dict[Split, SplitTotals]:
        """Writes the tokenizer, then the index; returns the totals. Raises DataError if a split has no document."""
        for split, writer in self._splits.items():
            writer.end_shard()
            if not writer.shards:
                raise DataError(f"{options.source}: the split {split!r} holds no document, expected at least one")
        self._tokenizer.save(self._directory / _TOKENIZER_FILE)
        if self._tokenizer.config is not None:
            write_tokenizer_config(self._directory, self._tokenizer.config)
        index = ShardIndex(
            dtype=token_dtype(self._tokenizer.vocab_size),
            vocab_size=self._tokenizer.vocab_size,
            end_of_text=self._tokenizer.end_of_text,
            tokenizer_sha256=sha256_of_file(self._directory / _TOKENIZER_FILE),
            options=options,
            train=tuple(self._splits["train"].shards),
            holdout=tuple(self._splits["holdout"].shards),
        )
        index.write(self._directory)
        return {split: index.totals(split) for split in SPLITS}


class _SplitWriter:
    """Writes the numbered files of one split."""

    def __init__(self, directory: Path, split: Split, end_of_text: bytes, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._end_of_text = end_of_text
        self._file: BinaryIO | None = None

    def add(self, ids: Tokens, num_bytes: int) -> None:
        file = self._file or self._begin_shard()
        data = ids.tobytes() + self._end_of_text
        file.write(data)
        self._digest.update(data)
        self._tokens += len(ids) + 1
        self._documents += 1
        self._bytes += num_bytes
        if self._tokens >= self._shard_tokens:
            self.end_shard()

    def _begin_shard(self) -> BinaryIO:
        self._name = shard_name(self._split, len(self.shards))
        path = self._directory / self._name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._tokens = self._documents = self._bytes = 0
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def end_shard(self) -> None:
        """Fsyncs and closes the open shard, if there is one, and adds it to `shards`."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        self.shards.append(
            Shard(
                file=self._name,
                tokens=self._tokens,
                documents=self._documents,
                bytes=self._bytes,
                sha256=self._digest.hexdigest(),
            )
        )


class TokenShards(TokenSource):
    """Reads token shards; safe to use from several threads."""

    def __init__(self, directory: Path, index: ShardIndex, readers: int = 1) -> None:
        self.directory = directory
        self.index = index
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        self._starts = {split: [0, *accumulate(shard.tokens for shard in index.shards(split))] for split in SPLITS}
        self._max_open = max(1, _MAX_OPEN_FILES // readers)
        self._file = lru_cache(self._max_open)(self._open)
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def open(cls, path: str | Path, verify: bool = True, readers: int = 1) -> TokenShards:
        """Opens a directory of shards after checking its index, its tokenizer and the size of every file.

        `verify` also reads every shard, several at a time, and compares its SHA-256; and if the index has no
        checksum, it compares the counts, too. Raises DataError, naming the file, what was found and what was
        expected. The files stay open, so a file that is removed or replaced later is still read as it was checked.
        All `readers` of a run together keep 512 files open.
        """
        directory = Path(path)
        index = ShardIndex.read(directory)
        shards = [(directory / shard.file, shard) for split in SPLITS for shard in index.shards(split)]
        for file, shard in shards:
            _check_size(file, shard.tokens * np.dtype(index.dtype).itemsize)
        _check_sha256(directory / _TOKENIZER_FILE, index.tokenizer_sha256)
        opened = cls(directory, index, readers)
        opened._check_tokenizer()
        if verify:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda pair: _check_sha256(pair[0], pair[1].sha256), shards))
        if index.index_sha256 is None:
            _warn_unchecked(directory)
            if verify:
                opened._check_counts()
        for split, number, _ in islice(opened._shards(), opened._max_open):
            opened._file(split, number)
        return opened

    def _shards(self) -> Iterator[tuple[Split, int, Shard]]:
        """Every shard with its split and its number in the split."""
        return ((split, number, shard) for split in SPLITS for number, shard in enumerate(self.index.shards(split)))

    def _check_tokenizer(self) -> None:
        tokenizer = self.load_tokenizer()
        for name in ("vocab_size", "end_of_text"):
            found, expected = getattr(self.index, name), getattr(tokenizer, name)
            if found != expected:
                raise DataError(
                    f"{self.directory / INDEX_FILE}: {name} = {found}, and that of {_TOKENIZER_FILE} is "
                    f"{expected}; {REBUILD_HINT}"
                )

    def _check_counts(self) -> None:
        """Raises DataError if the documents or text bytes of a shard differ from the index."""
        tokenizer = self.load_tokenizer()
        for split, number, shard in self._shards():
            documents = num_bytes = 0
            for start in range(0, shard.tokens, _COUNT_TOKENS):
                tokens = self._tokens(split, number, start, min(shard.tokens, start + _COUNT_TOKENS))
                documents += int((tokens == tokenizer.end_of_text).sum())
                num_bytes += int(tokenizer.byte_lengths[tokens].sum())
            if not tokenizer.is_byte_exact:
                num_bytes = shard.bytes
            for name, expected, found in (
                ("documents", shard.documents, documents),
                ("bytes", shard.bytes, num_bytes),
            ):
                if expected != found:
                    raise DataError(
                        f"{self.directory / INDEX_FILE}: {name} = {expected} of {shard.file}, which holds {found}; "
                        f"{REBUILD_HINT}"
                    )

    @property
    def name(self) -> str:
        """The path of the directory."""
        return str(self.directory)

    @property
    def vocab_size(self) -> int:
        """The number of ids of the tokenizer."""
        return self.index.vocab_size

    @property
    def end_of_text(self) -> int:
        """The id of the marker after each document."""
        return self.index.end_of_text

    @property
    def identity(self) -> list[str]:
        """The SHA-256 of the tokenizer and of each training shard."""
        return [self.index.tokenizer_sha256, *(shard.sha256 for shard in self.index.train)]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made these tokens; read once."""
        if self._tokenizer is None:
            # An index without a checksum may name a wrong marker, which the check of the tokenizer then finds.
            ends = () if self.index.index_sha256 is None else (self.index.end_of_text,)
            self._tokenizer = Tokenizer.load(self.directory, ends)
        return self._tokenizer

    def num_documents(self, split: Split) -> int:
        """Documents in a split."""
        return self.index.totals(split).documents

    def num_tokens(self, split: Split) -> int:
        """Tokens in a split, including the end-of-text of each document."""
        return self._starts[split][-1]

    def num_bytes(self, split: Split) -> int:
        """Bytes of UTF-8 text in a split."""
        return self.index.totals(split).bytes

    def read(self, split: Split, start: int, length: int) -> Tokens:
        """Tokens `start` to `start + length` of a split, from one or more shards: uint16 or uint32 [length].

        Raises ValueError if the range is empty or exceeds the split, and DataError if a shard cannot be read or has
        become shorter. A shard that is removed while it is open stays readable.
        """
        parts = [
            self._tokens(split, number, first, last)
            for number, first, last in parts_of_range(self._starts[split], start, length, split)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def places(self, split: Split, start: int, length: int) -> list[str]:
        """Where these tokens are: `FILE:FIRST-END` for each shard that holds some of them, counted in tokens."""
        shards = self.index.shards(split)
        return [
            f"{self.directory / shards[number].file}:{first}-{last}"
            for number, first, last in parts_of_range(self._starts[split], start, length, split)
        ]

    def _tokens(self, split: Split, number: int, start: int, stop: int) -> Tokens:
        """Tokens `start` to `stop` of one shard, read-only."""
        size = self._dtype.itemsize
        return np.frombuffer(self._file(split, number).read(start * size, (stop - start) * size), self._dtype)

    def _open(self, split: Split, number: int) -> PreadFile:
        shard = self.index.shards(split)[number]
        return PreadFile(self.directory / shard.file, shard.tokens * self._dtype.itemsize, REBUILD_HINT)


@lru_cache
def _warn_unchecked(directory: Path) -> None:
    """Warns once per directory that its index has no checksum."""
    _log.warning(
        f"{directory / INDEX_FILE} has no checksum, so damage to it may go unnoticed; "
        "`dsv3 tokenize` now writes one"
    )


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; expected a file of {expected} bytes; {REBUILD_HINT}"
        ) from None
    if found != expected:
        raise DataError(f"{path}: holds {found} bytes, expected {expected}; {REBUILD_HINT}")


def _check_sha256(path: Path, expected: str) -> None:
    try:
        found = sha256_of_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; {REBUILD_HINT}") from None
    if found != expected:
        raise DataError(f"{path}: is damaged: its SHA-256 is {found}, expected {expected}; {REBUILD_HINT}")
