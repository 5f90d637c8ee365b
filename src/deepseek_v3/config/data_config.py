"""The `data` section: which tokens a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from deepseek_v3.config.base import Fraction, Integer, NonNegativeInt, Real, Section
from deepseek_v3.utils.files import is_address
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import format_value


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"found {format_value(path)}: expected a path without a NUL character")
    return path


def _not_an_address(value: object) -> object:
    """Raises ValueError for `s3://bucket/x` and the like, which would become a folder of that name here."""
    if isinstance(value, str) and is_address(value):
        raise ValueError(f"found {format_value(redact(value))}: expected a path of this machine, not an address")
    return value


# What is written to files, as JSON, never holds the secrets of an address.
LocalPath = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(_not_an_address),
    AfterValidator(_without_nul),
    PlainSerializer(lambda path: redact(str(path)), str, "json"),
]
Address = Annotated[str, PlainSerializer(redact, str, "json")]
# Training a tokenizer takes 72 bytes for each entry at once, and no model has a tenth of these.
LARGEST_VOCABULARY = 2**22
DEFAULT_TOKENS = Path("data/tokens")


class CorpusConfig(Section):
    """How to build the token shards where `data.path` does not exist yet.

    `source` is `python-stdlib` (the text that ships inside every Python) or a file or folder of text.
    `holdout` is the share of the text to hold out; null: 0.02, or more where that is less than one window.
    """

    source: Address
    vocab_size: Annotated[Integer, Field(ge=260, le=LARGEST_VOCABULARY)]
    holdout: Annotated[Real, Field(gt=0, lt=1)] | None = None
    fim_rate: Fraction = 0.0
    seed: NonNegativeInt = 0


class DataConfig(Section):
    """Token shards, as `dsv3 tokenize` writes them."""

    path: LocalPath = DEFAULT_TOKENS
    corpus: CorpusConfig | None = None
    mask_documents: bool = False
    verify_checksums: bool = True
