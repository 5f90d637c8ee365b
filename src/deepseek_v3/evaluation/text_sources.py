"""The texts whose loss is measured: named files, folders and tokens, as encoded documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deepseek_v3.config.data_config import TokenFiles
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.documents import Document
from deepseek_v3.data.formats.reading import read_documents, read_labelled_documents
from deepseek_v3.data.tokens.index import INDEX_FILE
from deepseek_v3.data.tokens.megatron_dataset import is_dataset
from deepseek_v3.data.tokens.open_source import open_source
from deepseek_v3.data.tokens.source import RunTokens
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError

_NAMED = re.compile(r"([^=/\\:]+)=(.+)", re.DOTALL)
MAX_DOCUMENT_BYTES = 2**27  # one text file is one document, and enwik8 has 100 MB
_CHARACTERS_AT_ONCE = 2**20  # of the texts that are encoded together


@dataclass(frozen=True)
class EncodedDocument:
    """A document of a source: `ids` int64 without end-of-text, and the bytes of its UTF-8 text.

    `num_bytes` is a whole number, except for tokens whose tokenizer does not keep the bytes of text.
    """

    source: str
    ids: Int64Array
    num_bytes: float


@dataclass(frozen=True)
class TextSource:
    """A named text: `path` is a file, a folder, a pattern or an address, or tokens."""

    name: str
    path: str

    @property
    def is_tokenized(self) -> bool:
        """Whether the path holds tokens in place of text."""
        return is_tokenized(Path(self.path))


@dataclass(frozen=True)
class ReadingRules:
    """How sources are read.

    text_field    the field of a record that holds the text
    source_field  the field of a record that names its source, in place of the name of its file; None: the file
    max_tokens    each path is read up to the document with which it has that many tokens; None: the whole path
    """

    text_field: str = "text"
    source_field: str | None = None
    max_tokens: int | None = None


def is_tokenized(path: Path) -> bool:
    """Whether a path is a folder of token shards, or names datasets of Megatron-LM."""
    return (path / INDEX_FILE).is_file() or is_dataset(path) or is_dataset(path / "train")


def parse_sources(given: Iterable[str]) -> list[TextSource]:
    """The sources that `NAME=PATH` or `PATH` name; without a name, that of the file or folder.

    A text that is a path as a whole is a path, even with "=" in it. Raises DataError if two have the same name.
    """
    sources = [_parse_source(text) for text in given]
    if not sources:
        raise DataError("--data: names no text; expected a path, or NAME=PATH")
    name, count = Counter(source.name for source in sources).most_common(1)[0]
    if count > 1:
        both = " and ".join(source.path for source in sources if source.name == name)
        raise DataError(f"--data: {both} have the same name {name!r}; give each its own, as in NAME=PATH")
    return sources


def _parse_source(text: str) -> TextSource:
    if not text:
        raise DataError("--data: is empty; expected a path, or NAME=PATH")
    match = None if Path(text).exists() else _NAMED.fullmatch(text)
    name, path = (match[1], match[2]) if match else (None, text)
    return TextSource(name or Path(path).name or Path(path).absolute().name or path, path)


def encoded_documents(
    sources: Sequence[TextSource], tokenizer: Tokenizer, rules: ReadingRules
) -> Iterator[EncodedDocument]:
    """The documents of all sources, in order.

    Raises DataError for text that cannot be read, and for shards of another tokenizer.
    """
    for source in sources:
        documents = _from_tokens(source, tokenizer) if source.is_tokenized else _from_text(source, tokenizer, rules)
        yield from documents if rules.max_tokens is None else _first_tokens(documents, rules.max_tokens)


def _first_tokens(documents: Iterator[EncodedDocument], max_tokens: int) -> Iterator[EncodedDocument]:
    """Documents up to the first one with which they have `max_tokens` tokens."""
    tokens = 0
    for document in documents:
        yield document
        tokens += len(document.ids)
        if tokens >= max_tokens:
            return


def _from_text(source: TextSource, tokenizer: Tokenizer, rules: ReadingRules) -> Iterator[EncodedDocument]:
    for batch in labelled_batches(source, rules):
        encoded = tokenizer.encode_batch([document.text for _, document in batch])
        for (name, document), ids in zip(batch, encoded, strict=True):
            yield EncodedDocument(name, np.array(ids, np.int64), len(document.text.encode()))


def labelled_batches(source: TextSource, rules: ReadingRules) -> Iterator[list[tuple[str, Document]]]:
    """The documents of a text, each with the name of its source, about a million characters at a time.

    Raises DataError for text that cannot be read.
    """
    batch: list[tuple[str, Document]] = []
    characters = 0
    for name, document in _labelled(source, rules):
        batch.append((name, document))
        characters += len(document.text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _labelled(source: TextSource, rules: ReadingRules) -> Iterator[tuple[str, Document]]:
    if rules.source_field is not None:
        return read_labelled_documents(source.path, rules.source_field, rules.text_field, MAX_DOCUMENT_BYTES)
    documents = read_documents(source.path, rules.text_field, max_record_bytes=MAX_DOCUMENT_BYTES)
    return ((source.name, document) for document in documents)


def _from_tokens(source: TextSource, tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """The documents of the hold-out split, cut at end-of-text."""
    tokens = open_source(TokenFiles(path=Path(source.path)))
    check_tokenizer(tokens, tokenizer)
    lengths = tokens.byte_lengths("holdout")
    blocks = (block.astype(np.int64) for block in tokens.blocks("holdout"))
    for ids in _cut(blocks, tokens.end_of_text):
        yield EncodedDocument(source.name, ids, float(lengths[ids].sum()))


def _cut(blocks: Iterable[Int64Array], end_of_text: int) -> Iterator[Int64Array]:
    """The ids between markers, of each document that has any."""
    rest: Int64Array = np.zeros(0, np.int64)
    for block in blocks:
        ids = np.concatenate([rest, block])
        start = 0
        for end in np.flatnonzero(ids == end_of_text).tolist():
            if start < end:
                yield ids[start:end]
            start = end + 1
        rest = ids[start:]
    if len(rest):
        yield rest


def check_tokenizer(shards: RunTokens, tokenizer: Tokenizer) -> None:
    """Raises DataError if the shards were tokenized with another tokenizer than `tokenizer`, that of the model."""
    if shards.load_tokenizer().to_json() != tokenizer.to_json():
        raise DataError(
            f"{shards.name}: was tokenized by another tokenizer, of {shards.vocab_size:,} ids, than the "
            f"one of {tokenizer.vocab_size:,} ids that the model was trained with, so its ids mean other text; "
            "tokenize the text with `dsv3 tokenize --tokenizer` and the model's tokenizer.json"
        )
