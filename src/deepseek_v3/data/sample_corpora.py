"""Corpora that need no download: synthetic text in all formats, with all kinds of damage, and Python's sources."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from deepseek_v3.data.documents import Document, walk_files

_ADJECTIVES = (
    "old young small large quiet broken heavy early local famous green simple narrow distant warm careful honest "
    "curious patient hungry modern wooden empty busy gentle strange northern sudden useful bright"
).split()
_NOUNS = (
    "river neighbour library brother farmer letter bridge box story winter teacher garden engine doctor village "
    "window market captain forest sister painter road student kitchen harbour lawyer mountain machine paper island "
    "child morning council train answer question valley journey problem city"
).split()
_VERBS = (
    "carried noticed forgot repaired described remembered found painted followed answered visited measured opened "
    "collected admired ignored reached crossed explained bought watched moved studied trusted left"
).split()
_PLACES = "near behind with beside without above against beyond from inside for toward".split()
_STARTS = "Yesterday|Once again|In the end|By chance|At last|After that|With some luck|Of course".split("|")

_BROKEN_LINES = b"".join(
    line + b"\n"
    for line in (
        b'{"id": "bad", "text": ',
        b'{"id": "latin", "text": "caf\xe9"}',
        b'{"id": "none"}',
        b'{"id": "null", "text": null}',
        b'{"id": "number", "text": 5}',
        b"[1, 2]",
        b'{"id": "nul", "text": "' + b"a\\u0000" * 10 + b'"}',
    )
)
# The repeated first row is no damage: its id is qualified. A file that is cut is truncated, or damaged if its index
# is at the end.
_BROKEN = {
    "not_json": 1,
    "not_utf8": 2,
    "text_missing": 1,
    "text_null": 1,
    "text_type": 1,
    "not_object": 1,
    "nul": 1,
    "truncated": 1,
    "damaged": 1,
    "empty": 1,
}

# Installed packages, the tests of Python, and the language reference, whose topics are read one by one instead.
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__")
# Files that the build of this Python wrote, with paths of the machine that built it.
_BUILD_RECORDS = ("_sysconfigdata", "config-")


def synthetic_documents(count: int, seed: int) -> list[str]:
    """Texts of 6 to 40 English sentences; the same seed gives the same texts."""
    chooser = random.Random(seed)  # noqa: S311 -- no secret
    return [synthetic_document(chooser) for _ in range(count)]


def synthetic_document(chooser: random.Random) -> str:
    """A text of several paragraphs."""
    paragraphs = [
        " ".join(_sentence(chooser) for _ in range(chooser.randint(3, 8))) for _ in range(chooser.randint(2, 5))
    ]
    return "\n\n".join(paragraphs)


def replace_words(text: str, words: int, chooser: random.Random) -> str:
    """The text with `words` of its words replaced."""
    parts = text.split(" ")
    for place in chooser.sample(range(len(parts)), words):
        parts[place] = f"word{chooser.randrange(1000)}"
    return " ".join(parts)


def write_damaged_corpus(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Creates a folder of about `count` documents in all formats, with duplicates, near duplicates and damage.

    Returns the number of invalid records for each reason of quarantine.
    """
    chooser = random.Random(seed)  # noqa: S311 -- no secret
    texts = synthetic_documents(count, seed)
    texts += chooser.sample(texts, count // 10)
    texts += [replace_words(text, 1, chooser) for text in chooser.sample(texts, count // 10)]
    texts += ["Short.", "x" * 500, "\n".join(["Read more about it here"] * 60)]
    chooser.shuffle(texts)
    rows = [{"id": f"doc-{number}", "text": text, "number": number} for number, text in enumerate(texts)]
    shares = [rows[start::6] for start in range(6)]
    lines = [_lines(share) for share in shares]
    (folder / "web").mkdir(parents=True)
    (folder / "web" / "plain.jsonl").write_bytes(lines[0] + _BROKEN_LINES + json.dumps(rows[0]).encode() + b"\n")
    (folder / "web" / "packed.jsonl.gz").write_bytes(gzip.compress(lines[1], mtime=0))
    (folder / "web" / "squeezed.jsonl.zst").write_bytes(zstandard.compress(lines[2]))
    (folder / "web" / "cut.jsonl.xz").write_bytes(lzma.compress(lines[3])[:-20])
    (folder / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(shares[4]), folder / "tables" / "rows.parquet", row_group_size=100)
    (folder / "tables" / "cut.parquet").write_bytes((folder / "tables" / "rows.parquet").read_bytes()[:-9])
    half = len(shares[5]) // 2
    with pa.ipc.new_file(
        str(folder / "tables" / "rows.arrow"), pa.Table.from_pylist(shares[5][:half]).schema
    ) as file:
        file.write_table(pa.Table.from_pylist(shares[5][:half]))
    (folder / "list.json").write_text(json.dumps(shares[5][half:]), encoding="utf-8")
    (folder / "page.txt").write_text(synthetic_document(chooser), encoding="utf-8")
    (folder / "latin.txt").write_bytes("Café au lait, très bon.".encode("latin-1"))
    (folder / "empty.jsonl").write_bytes(b"")
    return dict(_BROKEN)


def _sentence(chooser: random.Random) -> str:
    things = [f"the {chooser.choice(_ADJECTIVES)} {chooser.choice(_NOUNS)}" for _ in range(3)]
    words = f"{things[0]} {chooser.choice(_VERBS)} {things[1]} {chooser.choice(_PLACES)} {things[2]}"
    if chooser.random() < 0.3:
        words = f"{chooser.choice(_STARTS)}, {words} and {chooser.choice(_VERBS)} it"
    return f"{words[0].upper()}{words[1:]}."


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def stdlib_documents() -> Iterator[Document]:
    """Yields Python's standard library, a document per module, then the topics of the language reference, by id.

    About 11 MB in Python 3.11. The documents depend only on the version of Python; their ids are relative paths.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk_files(root, _SKIPPED):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".py" and path.is_file() and not name.startswith(_BUILD_RECORDS):
            yield from _as_document(name, path.read_bytes())
    for topic in sorted(topics):
        yield Document(f"pydoc_data/topics/{topic}", topics[topic])


def _as_document(name: str, source: bytes) -> Iterator[Document]:
    """The module as a document, unless it is empty or not UTF-8."""
    try:
        text = source.decode("utf-8")
    except UnicodeDecodeError:
        return
    if text.strip():
        yield Document(name, text)
