"""Many texts, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def chunks(texts: Sequence[str], characters: int = 2**21) -> Iterator[list[str]]:
    """The texts in lists that have at least so many characters together, but for the last."""
    chunk: list[str] = []
    total = 0
    for text in texts:
        chunk.append(text)
        total += len(text)
        if total >= characters:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
