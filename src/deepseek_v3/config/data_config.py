"""The `data` section: which tokens a run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from deepseek_v3.config.base import Section

AnyPath = Annotated[Path, Field(strict=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class CorpusConfig(Section):
    """How to build the token shards where `data.path` does not exist yet.

    `source` is `python-stdlib` (the text that ships inside every Python) or a file or folder of text.
    `holdout` is the share of the text to hold out; null: 0.02, or more where that is less than one window.
    """

    source: str
    vocab_size: Annotated[int, Field(ge=260)]
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    fim_rate: Fraction = 0.0
    seed: int = 0


class DataConfig(Section):
    """Token shards, as `dsv3 tokenize` writes them."""

    path: AnyPath
    corpus: CorpusConfig | None = None
    mask_documents: bool = False
    verify_checksums: bool = True
