"""The model files of fastText (.bin and .ftz), read and written like its C++ code of version 0.9.2."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deepseek_v3.data.arrays import Float32Array, UInt8Array
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

LABEL = "__label__"
_MAGIC, _VERSION = 793712314, 12
_OPTIONS = struct.Struct("<12id")
_SIZES = struct.Struct("<3i2q")
_SHAPE = struct.Struct("<2q")
_SUPERVISED = 3
_LOSSES = {1: "hs", 2: "ns", 3: "softmax", 4: "ova"}
_CENTROIDS = 256


@dataclass(frozen=True)
class FastTextFile:
    """The contents of a supervised model's file.

    input            float32 [rows, width]: a row for each word, then one for each bucket of hashed n-grams
    bucket_rows      in a pruned model, the buckets that are left and their rows, counted after the words; else None
    output           float32 [labels, width]; with the loss `hs`, the inner nodes of the tree and an unused last row
    loss             `softmax` or `hs` (hierarchical softmax)
    word_ngrams      the most words of an n-gram
    min_characters, max_characters    the lengths of character n-grams; 0 as the maximum means none
    """

    words: dict[bytes, int]
    labels: list[str]
    label_counts: list[int]
    word_ngrams: int
    min_characters: int
    max_characters: int
    buckets: int
    loss: str
    bucket_rows: dict[int, int] | None
    input: Float32Array
    output: Float32Array

    @classmethod
    def read(cls, path: Path) -> FastTextFile:
        """Reads a model. A matrix that is not quantised is mapped into memory, so that processes share it.

        Raises DataError if the file cannot be read, is damaged, or holds another kind of model.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _ModelReader(path, data).model()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; expected a fastText model") from None
        except (struct.error, ValueError) as error:
            raise DataError(
                f"{path}: is not a complete fastText model: {error}; copy it again, or train it again with "
                "`dsv3 quality train`"
            ) from None

    def write(self, path: Path) -> None:
        """Writes the model, neither pruned nor quantised; fastText can read it too."""
        with atomic_write(path) as partial, partial.open("wb") as file:
            width, losses = self.input.shape[1], {name: code for code, name in _LOSSES.items()}
            file.write(struct.pack("<2i", _MAGIC, _VERSION))
            # dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn, maxn, lrUpdateRate, t
            characters = (self.min_characters, self.max_characters)
            learned = (losses[self.loss], _SUPERVISED, self.buckets, *characters)
            file.write(_OPTIONS.pack(width, 5, 5, 1, 5, self.word_ngrams, *learned, 100, 1e-4))
            num_words, num_labels = len(self.words), len(self.labels)
            file.write(_SIZES.pack(num_words + num_labels, num_words, num_labels, sum(self.label_counts), -1))
            file.writelines(word + b"\0" + struct.pack("<qb", 1, 0) for word in self.words)
            for label, count in zip(self.labels, self.label_counts, strict=True):
                file.write(f"{LABEL}{label}".encode() + b"\0" + struct.pack("<qb", count, 1))
            for matrix in (self.input, self.output):
                file.write(b"\0" + _SHAPE.pack(*matrix.shape))
                np.ascontiguousarray(matrix, "<f4").tofile(file)


class _ModelReader:
    """Reads the sections of a model file in order."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._at = 0

    def model(self) -> FastTextFile:
        magic, version = self._unpack(struct.Struct("<2i"))
        if magic != _MAGIC or not 11 <= version <= _VERSION:
            raise DataError(
                f"{self._path}: is not a fastText model of version 11 or 12; expected a .bin or .ftz file"
            )
        options = self._unpack(_OPTIONS)
        word_ngrams, loss, kind, buckets, shortest, longest = options[5:11]
        if kind != _SUPERVISED or _LOSSES.get(loss) not in ("softmax", "hs"):
            raise DataError(
                f"{self._path}: is a fastText model of kind {kind} with loss {_LOSSES.get(loss, loss)}, expected a "
                "supervised one with loss softmax or hs; train it with `fasttext supervised -loss softmax`"
            )
        words, labels, counts, kept = self._dictionary()
        (quantised,) = self._unpack(struct.Struct("<?"))
        input_rows = self._quantised() if quantised else self._matrix()
        (quantised,) = self._unpack(struct.Struct("<?"))
        output_rows = self._quantised() if quantised else np.array(self._matrix())
        rows = buckets if kept is None else len(kept)
        if input_rows.shape != (len(words) + rows, output_rows.shape[1]) or len(output_rows) != len(labels):
            raise ValueError(f"its matrices have the shapes {input_rows.shape} and {output_rows.shape}")
        return FastTextFile(
            words=words,
            labels=labels,
            label_counts=counts,
            word_ngrams=word_ngrams,
            min_characters=shortest,
            max_characters=longest if version == _VERSION else 0,
            buckets=buckets,
            loss=_LOSSES[loss],
            bucket_rows=kept,
            input=input_rows,
            output=output_rows,
        )

    def _dictionary(self) -> tuple[dict[bytes, int], list[str], list[int], dict[int, int] | None]:
        size, num_words, _, _, num_kept = self._unpack(_SIZES)
        entry = struct.Struct("<qb")
        words: dict[bytes, int] = {}
        labels: dict[str, int] = {}
        for _ in range(size):
            end = self._data.find(b"\0", self._at)
            name = self._bytes(end - self._at)
            self._at += 1
            count, kind = self._unpack(entry)
            if kind:
                labels[name.decode().removeprefix(LABEL)] = count
            else:
                words[name] = len(words)
        if len(words) != num_words or not labels:
            raise ValueError(f"it has {len(words)} words and {len(labels)} labels")
        pairs = self._array("<i4", 2 * max(num_kept, 0)).tolist()
        kept = None if num_kept < 0 else dict(zip(pairs[::2], pairs[1::2], strict=True))
        return words, [*labels], [*labels.values()], kept

    def _matrix(self) -> Float32Array:
        rows, width = self._unpack(_SHAPE)
        start = self._advance(rows * width * 4)
        return np.memmap(self._path, "<f4", "r", start, (rows, width))

    def _quantised(self) -> Float32Array:
        """Reads a matrix in product quantisation (Jégou et al. 2011), and decodes it to float32 [rows, width]."""
        (with_norms,) = self._unpack(struct.Struct("<?"))
        rows, width = self._unpack(_SHAPE)
        (size,) = self._unpack(struct.Struct("<i"))
        codes = self._array("u1", size)
        matrix = self._decoded(codes.reshape(rows, -1))
        if with_norms:
            norms = self._array("u1", rows)
            matrix *= self._decoded(norms.reshape(rows, 1))
        if matrix.shape[1] != width:
            raise ValueError(f"a matrix is {matrix.shape[1]} wide instead of {width}")
        return matrix

    def _decoded(self, codes: UInt8Array) -> Float32Array:
        width, parts, part, _ = self._unpack(struct.Struct("<4i"))
        centroids = self._array("<f4", width * _CENTROIDS)
        subvectors = []
        for number in range(parts):
            start, stop = number * part, min(number * part + part, width)
            table = centroids[start * _CENTROIDS : stop * _CENTROIDS].reshape(_CENTROIDS, stop - start)
            subvectors.append(table[codes[:, number]])
        return np.concatenate(subvectors, axis=1)

    def _unpack(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self._bytes(layout.size))

    def _array(self, kind: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self._bytes(count * np.dtype(kind).itemsize), kind)

    def _bytes(self, count: int) -> bytes:
        start = self._advance(count)
        return self._data[start : self._at]

    def _advance(self, count: int) -> int:
        """Advances by `count` bytes, and returns the position of the first."""
        start = self._at
        self._at += count
        if count < 0 or self._at > len(self._data):
            raise ValueError(f"it ends after {len(self._data)} bytes")
        return start


def is_fasttext(path: Path) -> bool:
    """Whether a file starts like a fastText model. Raises DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) == struct.pack("<i", _MAGIC)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; expected a model") from None
