"""The corpus that ships inside every Python: its standard library and its language reference."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from deepseek_v3.data.documents import Document, walk_files

# What others installed, what tests Python, and the reference, whose topics are read one by one instead.
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__")
# Written while this Python was built: full of paths of the machine that built it.
_BUILD_RECORDS = ("_sysconfigdata", "config-")


def stdlib_documents() -> Iterator[Document]:
    """Yields the modules' sources, then the topics of the language reference, each sorted by id.

    About 11 MB in Python 3.11. The documents depend on the version of Python alone, and their ids are relative.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk_files(root, _SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and path.is_file() and not name.startswith(_BUILD_RECORDS):
            yield from _as_document(name, path.read_bytes())
    for topic in sorted(topics):
        yield Document(f"pydoc_data/topics/{topic}", topics[topic])


def _as_document(name: str, source: bytes) -> Iterator[Document]:
    """The module as a document, unless it is empty or written in another encoding than UTF-8."""
    try:
        text = source.decode("utf-8")
    except UnicodeDecodeError:
        return
    if text.strip():
        yield Document(name, text)
