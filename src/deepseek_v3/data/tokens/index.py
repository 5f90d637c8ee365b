"""The index of token shards: what `index.json` says, and how it is read from a disk that may hold anything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from deepseek_v3.config.base import Section
from deepseek_v3.config.problems import describe
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import written_atomically

Split = Literal["train", "holdout"]
SPLITS: tuple[Split, ...] = ("train", "holdout")
TokenType = Literal["uint16", "uint32"]

INDEX_FILE = "index.json"
REPAIR = "copy the directory again, or build it anew with `dsv3 tokenize`"

PositiveInt = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Shard(Section):
    """One file. `bytes` counts the documents' text in UTF-8; `tokens` includes each document's end-of-text."""

    file: Annotated[str, Field(pattern=r"^(train|holdout)/[0-9]+\.bin$")]
    tokens: PositiveInt
    documents: PositiveInt
    bytes: PositiveInt
    sha256: Sha256


class CorpusOptions(Section):
    """How the shards were made from their source."""

    source: str
    text_field: str
    holdout: float
    fim_rate: float
    seed: int


@dataclass(frozen=True)
class SplitTotals:
    """What the shards of a split hold together, counted as in `Shard`."""

    documents: int
    tokens: int
    bytes: int


class ShardIndex(Section):
    """The contents of `index.json`."""

    format_version: Literal[1] = 1
    dtype: TokenType
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    end_of_text: Annotated[int, Field(ge=0)]
    tokenizer_sha256: Sha256
    options: CorpusOptions
    train: Annotated[tuple[Shard, ...], Field(min_length=1)]
    holdout: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> ShardIndex:
        expected = token_type(self.vocab_size)
        if self.dtype != expected:
            raise ValueError(
                f"dtype = {self.dtype!r} does not go with vocab_size = {self.vocab_size}, expected {expected!r}"
            )
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
        """Reads the index of a directory. Raises DataError, naming the field, where it is not what it should be."""
        path = directory / INDEX_FILE
        try:
            text = path.read_text(encoding="utf-8")
            fields = json.loads(text)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read: {error.strerror}; expected token shards, as `dsv3 tokenize` writes them"
            ) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON: {error}; {REPAIR}") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}: holds a {type(fields).__name__}, expected an object of fields; {REPAIR}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise DataError(f"{describe(error, cls, {(): str(path)})}; {REPAIR}") from None

    def write(self, directory: Path) -> None:
        """Writes the index of a directory, whose other files must be complete by now."""
        with written_atomically(directory / INDEX_FILE) as partial:
            partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def token_type(vocab_size: int) -> TokenType:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"
