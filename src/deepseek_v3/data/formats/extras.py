"""Libraries that only some formats need."""

from __future__ import annotations

from typing import Any

from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.lazily import imported


def archive_iterator(path: str) -> Any:
    """The class that parses WARC records. Raises DataError, naming the file, where its library is missing."""
    try:
        return imported("fastwarc.warc:ArchiveIterator")
    except ImportError:
        raise DataError(f"{path}: reading WARC needs fastwarc; run `pip install 'deepseek_v3[warc]'`") from None
