"""The index of token shards, `index.json`: its fields, and how it is written, read and verified."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from deepseek_v3.config.base import Section
from deepseek_v3.config.data_config import Address
from deepseek_v3.config.errors import describe_errors
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write

Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "holdout")
TokenDtype = Literal["uint16", "uint32"]

INDEX_FILE = "index.json"
_NO_SHA256 = 64 * "0"
REBUILD_HINT = "copy the directory again, or build it anew with `dsv3 tokenize`"

PositiveInt = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Section):
    """One file. `bytes` counts the UTF-8 text of its documents, `tokens` includes the end-of-text of each one."""

    file: Annotated[str, Field(pattern=r"^(train|holdout)/[0-9]+\.bin$")]
    tokens: PositiveInt
    documents: PositiveInt
    bytes: PositiveInt
    sha256: Sha256


class CorpusOptions(Section):
    """The options with which the shards were made from their source."""

    source: Address
    text_field: str
    holdout: float
    fim_rate: float
    seed: int


@dataclass(frozen=True)
class SplitTotals:
    """The sums over the shards of a split, counted as in `Shard`."""

    documents: int
    tokens: int
    bytes: int


class ShardIndex(Section):
    """The contents of `index.json`.

    `index_sha256` is the SHA-256 of the file itself with zeros in place of these 64 digits. It is None in an index
    that an older version wrote without it.
    """

    format_version: Literal[1] = 1
    index_sha256: Sha256 | None = None
    dtype: TokenDtype
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    end_of_text: Annotated[int, Field(ge=0)]
    tokenizer_sha256: Sha256
    options: CorpusOptions
    train: Annotated[tuple[Shard, ...], Field(min_length=1)]
    holdout: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> ShardIndex:
        expected = token_dtype(self.vocab_size)
        if self.dtype != expected:
            raise ValueError(
                f"dtype = {self.dtype!r} does not go with vocab_size = {self.vocab_size}, expected {expected!r}"
            )
        for split in SPLITS:
            for number, shard in enumerate(self.shards(split)):
                if shard.file != (name := shard_name(split, number)):
                    raise ValueError(f"{split}.{number}.file = {shard.file!r}, expected {name!r}")
        if self.end_of_text >= self.vocab_size:
            raise ValueError(f"end_of_text = {self.end_of_text} is not below vocab_size = {self.vocab_size}")
        return self

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return self.train if split == "train" else self.holdout

    def totals(self, split: Split) -> SplitTotals:
        """The sums over the shards of a split."""
        shards = self.shards(split)
        return SplitTotals(
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
        )

    @classmethod
    def read(cls, directory: Path) -> ShardIndex:
        """Reads and verifies the index of a directory. Raises DataError, naming the field that is wrong."""
        path = directory / INDEX_FILE
        try:
            text = path.read_bytes().decode("utf-8")
            fields = json.loads(text)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; expected token shards, as `dsv3 tokenize` writes them"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON: {error}; {REBUILD_HINT}") from None
        if not isinstance(fields, dict):
            raise DataError(
                f"{path}: holds a {type(fields).__name__}, expected an object of fields; {REBUILD_HINT}"
            )
        try:
            index = cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{describe_errors(error, cls, {(): str(path)})}; {REBUILD_HINT}") from None
        if index.index_sha256 is not None:
            found = _sha256_without(text, index.index_sha256)
            if found != index.index_sha256:
                raise DataError(
                    f"{path}: is damaged or was edited: its SHA-256 is {found}, expected {index.index_sha256}; "
                    f"{REBUILD_HINT}"
                )
        return index

    def write(self, directory: Path) -> None:
        """Writes the index of a directory, after all other files are complete."""
        text = self.model_copy(update={"index_sha256": _NO_SHA256}).model_dump_json(indent=2) + "\n"
        own = _sha256_without(text, _NO_SHA256)
        with atomic_write(directory / INDEX_FILE) as partial:
            partial.write_bytes(text.replace(_entry(_NO_SHA256), _entry(own), 1).encode("utf-8"))


def _sha256_without(text: str, own: str) -> str:
    """SHA-256 of the text of an index, with zeros in place of its own checksum."""
    return hashlib.sha256(text.replace(_entry(own), _entry(_NO_SHA256), 1).encode("utf-8")).hexdigest()


def _entry(sha256: str) -> str:
    """The entry of the checksum in the text of the index. It occurs once: quotes inside strings are escaped."""
    return f'"index_sha256": "{sha256}"'


def shard_name(split: Split, number: int) -> str:
    """The path of a shard below the directory."""
    return f"{split}/{number:05d}.bin"


def token_dtype(vocab_size: int) -> TokenDtype:
    """The smallest type that can hold every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
