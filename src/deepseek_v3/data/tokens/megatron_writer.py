"""Writes Megatron-LM datasets: one with its two files, or a corpus of two splits as `dsv3 tokenize` writes it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, BinaryIO

import numpy as np
from numpy.typing import DTypeLike

from deepseek_v3.data.tokens.index import SPLITS, CorpusOptions, Split, SplitTotals
from deepseek_v3.data.tokens.megatron_index import HEADER, MAGIC, TOKEN_TYPES, VERSION, bin_file, idx_file
from deepseek_v3.data.tokens.source import Tokens
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_config import write_tokenizer_config
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

_CODES = {name: code for code, name in TOKEN_TYPES.items()}
_LONGEST_SEQUENCE = 2**31 - 1  # its size is an int32
_BLOCK = 2**20  # entries of the index that are written at a time
_SMALL_VOCABULARY = 65_500  # below it, Megatron-LM itself writes uint16, else int32


class MegatronWriter:
    """Writes the dataset at `prefix` inside a `with` block: `add` every sequence, and `end_document` after the last
    one of each document.

    `dtype` is one of the integer types of `TOKEN_TYPES`. The two files appear when the block ends, the index last,
    and not at all after an exception. The sizes wait on disk, so memory does not grow with the dataset. With
    `multimodal` the index gives the mode of every sequence.

    Raises ValueError for another type, and DataError if an id does not fit the type, a sequence has 2^31 tokens or
    more, or sequences are left outside of a document.
    """

    def __init__(self, prefix: Path, dtype: DTypeLike, *, multimodal: bool = False) -> None:
        name = np.dtype(dtype).name
        if name not in _CODES:
            raise ValueError(f"dtype = {name}: expected one of {', '.join(_CODES)}")
        self.prefix, self.num_documents, self.num_tokens = prefix, 0, 0
        self._dtype = np.dtype(name).newbyteorder("<")
        self._limits = np.iinfo(self._dtype)
        self._multimodal = multimodal
        self._num_sequences = self._ended = 0
        self._stack = ExitStack()

    def __enter__(self) -> MegatronWriter:
        with ExitStack() as stack:
            self._index_path = stack.enter_context(atomic_write(idx_file(self.prefix)))
            self._bin = stack.enter_context(stack.enter_context(atomic_write(bin_file(self.prefix))).open("xb"))
            folder = self.prefix.parent
            self._sizes, self._documents, self._modes = (
                stack.enter_context(TemporaryFile(dir=folder)) for _ in range(3)
            )
            self._documents.write(_int64(0))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)  # removes both partial files
            return
        with self._stack:
            self._finish()

    def add(self, ids: Sequence[int] | Tokens, mode: int = 0) -> None:
        """Appends a sequence to the open document; `mode` says what it holds in a multimodal dataset, 0 is text."""
        values = np.asarray(ids, np.int64 if len(ids) == 0 else None)
        if len(values) > _LONGEST_SEQUENCE:
            raise DataError(
                f"{self.prefix}: a sequence has {len(values):,} tokens, and the format holds at most "
                f"{_LONGEST_SEQUENCE:,}; split the document"
            )
        if len(values) and not self._limits.min <= values.min() <= values.max() <= self._limits.max:
            raise DataError(
                f"{self.prefix}: the ids {values.min()} to {values.max()} do not fit {self._dtype.name}; choose a "
                "larger type"
            )
        self._bin.write(values.astype(self._dtype).tobytes())
        self._sizes.write(np.asarray(len(values), "<i4").tobytes())
        if self._multimodal:
            self._modes.write(np.asarray(mode, np.int8).tobytes())
        self._num_sequences += 1
        self.num_tokens += len(values)

    def end_document(self) -> None:
        """Ends the open document, which holds the sequences that were added since the previous one."""
        self._documents.write(_int64(self._num_sequences))
        self.num_documents += 1
        self._ended = self._num_sequences

    def _finish(self) -> None:
        if self._ended != self._num_sequences:
            raise DataError(f"{self.prefix}: the last document was not ended")
        with self._index_path.open("xb") as file:
            counts = (self._num_sequences, self.num_documents + 1)
            file.write(HEADER.pack(MAGIC, VERSION, _CODES[self._dtype.name], *counts))
            _copy(self._sizes, file)
            self._write_pointers(file)
            _copy(self._documents, file)
            _copy(self._modes, file)

    def _write_pointers(self, file: BinaryIO) -> None:
        self._sizes.seek(0)
        end = 0
        while block := self._sizes.read(4 * _BLOCK):
            sizes = np.frombuffer(block, "<i4").astype(np.int64) * self._dtype.itemsize
            ends = end + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])


class MegatronCorpusWriter:
    """Writes the datasets `train` and `holdout` and their tokenizer.json to an empty directory.

    `add` every document inside a `with` block. Each is one sequence with end-of-text at its end, as Megatron-LM's
    `preprocess_data.py --append-eod` writes it.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer) -> None:
        self._directory, self._tokenizer = directory, tokenizer
        dtype = np.uint16 if tokenizer.vocab_size < _SMALL_VOCABULARY else np.int32
        self._splits = {split: MegatronWriter(directory / split, dtype) for split in SPLITS}
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._stack = ExitStack()

    def __enter__(self) -> MegatronCorpusWriter:
        with ExitStack() as stack:
            for writer in self._splits.values():
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, split: Split, ids: Sequence[int] | Tokens, num_bytes: int) -> None:
        """Appends a document of `num_bytes` bytes of text, and end-of-text after it."""
        writer = self._splits[split]
        writer.add(np.append(np.asarray(ids, np.int64), self._tokenizer.end_of_text))
        writer.end_document()
        self._bytes[split] += num_bytes

    def finish(self, options: CorpusOptions) -> dict[Split, SplitTotals]:
        """Writes the tokenizer and the name of its end-of-text; returns the totals.

        Raises DataError if a split has no document.
        """
        for split, writer in self._splits.items():
            if not writer.num_documents:
                raise DataError(f"{options.source}: the split {split!r} holds no document, expected at least one")
        self._tokenizer.save(self._directory / "tokenizer.json")
        marker = {"eos_token": self._tokenizer.token(self._tokenizer.end_of_text)}
        write_tokenizer_config(self._directory, {**(self._tokenizer.config or {}), **marker})
        return {
            split: SplitTotals(writer.num_documents, writer.num_tokens, self._bytes[split])
            for split, writer in self._splits.items()
        }


def _int64(value: int) -> bytes:
    return np.asarray(value, "<i8").tobytes()


def _copy(spool: IO[bytes], file: BinaryIO) -> None:
    """Copies a spool from its beginning."""
    spool.seek(0)
    shutil.copyfileobj(spool, file)
