"""The `data` section: which tokens a run reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from deepseek_v3.config.base import Fraction, Integer, NonNegativeInt, PositiveFloat, Real, Section
from deepseek_v3.utils.files import is_address
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import format_value


def _without_nul(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError(f"found {format_value(path)}: expected a path without a NUL character")
    return path


def _not_an_address(value: object) -> object:
    """Raises ValueError for an address such as `s3://bucket/x`, which would name a local folder `s3:`."""
    if isinstance(value, str) and is_address(value):
        raise ValueError(f"found {format_value(redact(value))}: expected a local path, not an address")
    return value


def _name_of_metrics(name: str) -> str:
    """Raises ValueError for a name that trackers or TensorBoard would refuse or change in `holdout_loss/NAME`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}", name):
        raise ValueError(
            f"found {format_value(name)}: expected a name of letters from a to z, digits, '_', '.' and '-', which "
            "begins with a letter or a digit and has at most 60 characters"
        )
    return name


# A path or an address loses its secrets when it is written to a file.
LocalPath = Annotated[
    Path,
    Field(strict=False),
    BeforeValidator(_not_an_address),
    AfterValidator(_without_nul),
    PlainSerializer(lambda path: redact(str(path)), str, "json"),
]
Address = Annotated[str, PlainSerializer(redact, str, "json")]
# Training a tokenizer allocates 72 bytes per entry. Published vocabularies have less than a tenth of these entries.
MAX_VOCABULARY = 2**22
DEFAULT_TOKENS = Path("data/tokens")


class CorpusConfig(Section):
    """How to build the token shards if `data.path` does not exist yet.

    `source` is `python-stdlib` (the source text that every Python installation holds) or a file or folder of text.
    `holdout` is the share of the text that is held out; null is 0.02, or more if 0.02 is less than one window.
    """

    source: Address
    vocab_size: Annotated[Integer, Field(ge=260, le=MAX_VOCABULARY)]
    holdout: Annotated[Real, Field(gt=0, lt=1)] | None = None
    fim_rate: Fraction = 0.0
    seed: NonNegativeInt = 0


class TokenFiles(Section):
    """Tokens on disk: a folder of token shards, or Megatron-LM datasets.

    `path` is a folder that `dsv3 tokenize` has written, or the prefix of a Megatron-LM dataset, `path`.bin and
    `path`.idx. The other fields are for such a prefix. `tokenizer` is the tokenizer.json that made its ids; null is
    the one beside it. `holdout_path` is the prefix of a second dataset, which is held out. Without it, `holdout` is
    the share of the first dataset to hold out; null is 0.02.
    """

    path: LocalPath
    tokenizer: LocalPath | None = None
    holdout: Annotated[Real, Field(gt=0, lt=1)] | None = None
    holdout_path: LocalPath | None = None

    @property
    def exist(self) -> bool:
        """Whether there is anything at `path`: a file, a folder, or a file of a Megatron-LM dataset."""
        return any(os.path.exists(f"{self.path}{suffix}") for suffix in ("", ".idx", ".bin"))  # noqa: PTH110

    @model_validator(mode="after")
    def _one_holdout(self) -> TokenFiles:
        if self.holdout is not None and self.holdout_path is not None:
            raise ValueError(
                f"holdout = {self.holdout} and holdout_path = {self.holdout_path}: expected one of the two, a "
                "share of path or a second dataset"
            )
        return self


class SourceConfig(TokenFiles):
    """One source of a mixture: its name in logs and metrics, and its weight among the samples."""

    name: Annotated[str, AfterValidator(_name_of_metrics)]
    weight: PositiveFloat


class DataConfig(TokenFiles):
    """The tokens of a run.

    `corpus` is how to build token shards if nothing is at `path`. `sources`, if there are any, are mixed by their
    weights, which may have any sum, and `path` is not read. `mask_documents` keeps attention inside each document
    of a window. `verify_checksums` reads all tokens once before the run starts.
    """

    path: LocalPath = DEFAULT_TOKENS
    corpus: CorpusConfig | None = None
    sources: tuple[SourceConfig, ...] = ()
    mask_documents: bool = False
    verify_checksums: bool = True

    @model_validator(mode="after")
    def _sources_alone(self) -> DataConfig:
        if not self.sources:
            return self
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sources: two are named {twice[0]!r}; give each its own name")
        own = ("corpus", "tokenizer", "holdout", "holdout_path")
        if given := [name for name in own if getattr(self, name) is not None]:
            raise ValueError(
                f"sources and {' and '.join(given)} are given: expected {given[0]} = null, because path is not "
                "read; each source has a tokenizer and a hold-out of its own"
            )
        return self
