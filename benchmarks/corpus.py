"""A corpus of real text for the data pipeline's benchmarks: `python benchmarks/corpus.py --output FOLDER`.

Documents of 0.5 to 10 KB from Debian's documentation packages, or without `apt-get` from what this machine holds,
among them exact and near copies. The folder gets `documents/`, eight JSONL shards of `id`, `text` and `source`;
`injected.jsonl`, a line for each copy; and `corpus.json`, what it was made of and its digest. The same packages,
size and seed give the same bytes for any number of workers.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Annotated, Any, NamedTuple

import orjson
import typer
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from deepseek_v3.utils.command_line import run_command

# Prose in English and other languages, and reference pages; of Debian 12.
PACKAGES = (
    "apache2-doc cmake-doc debian-handbook debian-policy debian-reference-de debian-reference-en "
    "debian-reference-fr developers-reference erlang-doc ghc-doc git-doc installation-guide-amd64 "
    "libboost1.81-doc libglib2.0-doc libgtk-3-doc libreoffice-help-de libreoffice-help-en-us "
    "libreoffice-help-es libreoffice-help-fr libreoffice-help-it libreoffice-help-ja libreoffice-help-nl "
    "libreoffice-help-pl libreoffice-help-pt libreoffice-help-ru libreoffice-help-zh-cn linux-doc-6.1 "
    "llvm-15-doc manpages-de manpages-dev manpages-es manpages-fr manpages-ja manpages-pl manpages-uk "
    "manpages-zh maxima-doc nodejs-doc octave-doc perl-doc postgresql-doc-15 python-django-doc "
    "python-pandas-doc python-scipy-doc python-sqlalchemy-doc python-sympy-doc python3.11-doc qtbase5-doc-html "
    "racket-doc rust-doc sphinx-doc sqlite3-doc vim-doc"
).split()

DOCUMENTS = "documents"
SHARDS = 8
LEAST, MOST = 500, 10_000  # bytes of a document
EXACT, NEAR = 0.05, 0.13  # copies, as shares of all documents
EDITED = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08)  # shares of words; similarities from about 0.98 to 0.45

_HTML = (".html", ".htm", ".xhtml")
_TEXT = (".txt", ".rst", ".md", ".pod", ".py", ".adoc")
_SKIPPED = re.compile(r"changelog|copyright|NEWS|genindex|search", re.IGNORECASE)
_MAN = re.compile(r"/man\d/[^/]+$")


class Document(NamedTuple):
    """One line of a shard."""

    id: str
    text: str
    source: str


class Copy(NamedTuple):
    """One line of `injected.jsonl`: document `id` was made of the document `of`, with a share of words edited."""

    id: str
    of: str
    kind: str
    edited: float


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    megabytes: Annotated[int, typer.Option(min=1, help="Text in all documents, 10^6 bytes.")] = 640,
    cache: Annotated[Path, typer.Option(help="Where packages are kept.")] = Path("~/.cache/deepseek_v3/corpus"),
    seed: Annotated[int, typer.Option(help="Chooses documents, copies and edits.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes that turn files into text.")] = 2,
) -> None:
    """Build a corpus to measure the data pipeline on."""
    sources = debian_packages(cache.expanduser()) if shutil.which("apt-get") else local_folders()
    typer.echo(orjson.dumps(build(sources, output, megabytes * 10**6, seed, workers), option=orjson.OPT_INDENT_2))


def build(sources: dict[str, Path], output: Path, size: int, seed: int, workers: int) -> dict[str, Any]:
    """Writes a corpus of `size` bytes of text from the folders in `sources`. Returns what `corpus.json` says."""
    (output / DOCUMENTS).mkdir(parents=True)
    found = sorted(read_sources(sources, workers), key=partial(_order, seed))
    originals = list(_first(found, int(size * (1 - EXACT - NEAR))))
    copies = [made for original in originals if (made := _copy(original, seed)) is not None]
    documents = sorted([*originals, *(document for document, _ in copies)], key=partial(_order, seed))
    digest = write_shards(documents, output / DOCUMENTS)
    log = b"".join(orjson.dumps(copy._asdict()) + b"\n" for _, copy in copies)
    (output / "injected.jsonl").write_bytes(log)
    summary = {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "exact_copies": sum(copy.kind == "exact" for _, copy in copies),
        "near_copies": sum(copy.kind == "near" for _, copy in copies),
        "sha256": digest,
        "seed": seed,
        "resiliparse": version("resiliparse"),
        "sources": {name: _identity(folder) for name, folder in sorted(sources.items())},
    }
    (output / "corpus.json").write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    return summary


def read_corpus(folder: Path) -> Iterator[Document]:
    """The documents of a corpus, in order."""
    for path in sorted((folder / DOCUMENTS).glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            yield Document(**orjson.loads(line))


def debian_packages(cache: Path) -> dict[str, Path]:
    """Downloads and unpacks the packages that are not in the cache yet. Returns a folder for each that there is."""
    cache.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        if not any(cache.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", "--quiet", name], cwd=cache, check=False)
        package = next(cache.glob(f"{name}_*.deb"), None)
        if package is None:
            typer.echo(f"{name}: this distribution has no such package; it is left out", err=True)
        elif not (cache / name).exists():
            unpacked = cache / f"{name}.partial"
            subprocess.run(["dpkg-deb", "--extract", package, unpacked], check=True)
            unpacked.rename(cache / name)
    return {name: cache / name for name in PACKAGES if (cache / name).exists()}


def local_folders() -> dict[str, Path]:
    """What most machines hold: `/usr/share/doc`, and Python's library with its documentation."""
    folders = {"doc": Path("/usr/share/doc"), "man": Path("/usr/share/man")}
    folders["python"] = Path(sysconfig.get_path("stdlib"))
    return {name: folder for name, folder in folders.items() if folder.exists()}


def _identity(folder: Path) -> str:
    """The package that a folder was unpacked from, with its version; else the folder."""
    package = next(folder.parent.glob(f"{folder.name}_*.deb"), None)
    return package.name if package else str(folder)


def read_sources(sources: dict[str, Path], workers: int) -> Iterator[Document]:
    """Every document of every readable file, sorted by source and path."""
    files = [
        (name, folder, path)
        for name, folder in sorted(sources.items())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and not _SKIPPED.search(path.name)
    ]
    with ProcessPoolExecutor(workers) as pool:
        for documents in pool.map(_read_file, files, chunksize=64):
            yield from documents


def _read_file(file: tuple[str, Path, Path]) -> list[Document]:
    name, folder, path = file
    place = path.relative_to(folder).as_posix()
    text = _text_of(path)
    chooser = Random(f"{name}/{place}")
    return [Document(f"{name}/{place}#{n}", part, name) for n, part in enumerate(cut(text, chooser), start=1)]


def _text_of(path: Path) -> str:
    """The text of a file: of HTML its main content, of manual pages and text files all; of others none."""
    name = path.as_posix().removesuffix(".gz")
    is_html = name.endswith(_HTML)
    if not is_html and not name.endswith(_TEXT) and not _MAN.search(name):
        return ""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError):
        return ""
    return extract_plain_text(HTMLTree.parse(text), main_content=True) if is_html else text


def cut(text: str, chooser: Random) -> Iterator[str]:
    """Cuts a text at ends of lines into documents of 500 to 10,000 bytes, most of them short.

    Longer lines and shorter remainders are left out.
    """
    part: list[str] = []
    size, wanted = 0, _length(chooser)
    for line in text.splitlines(keepends=True):
        length = len(line.encode())
        if size >= wanted or size + length > MOST:
            yield from _long_enough("".join(part))
            part, size, wanted = [], 0, _length(chooser)
        if length <= MOST:
            part.append(line)
            size += length
    yield from _long_enough("".join(part))


def _length(chooser: Random) -> int:
    """Bytes of a document: small ones are more frequent, in proportion to their number."""
    return int(LEAST * (MOST / LEAST) ** chooser.random())


def _long_enough(part: str) -> Iterator[str]:
    text = part.strip()
    if len(text.encode()) >= LEAST:
        yield text


def _order(seed: int, document: Document) -> bytes:
    return hashlib.blake2b(f"{seed}/{document.id}".encode(), digest_size=16).digest()


def _first(documents: Iterable[Document], size: int) -> Iterator[Document]:
    """The first documents, up to `size` bytes of text in total."""
    left = size
    for document in documents:
        if left <= 0:
            return
        left -= len(document.text.encode())
        yield document
    if left > 0:
        raise SystemExit(f"the sources hold only {(size - left) / 1e6:.0f} of {size / 1e6:.0f} MB; ask for less")


def _copy(original: Document, seed: int) -> tuple[Document, Copy] | None:
    """Copies of some documents; their number makes `EXACT` and `NEAR` shares of all documents."""
    chooser = Random(f"{seed}/{original.id}")
    draw = chooser.random() * (1 - EXACT - NEAR)
    if draw < EXACT:
        copy = Copy(f"{original.id}~exact", original.id, "exact", 0.0)
        return original._replace(id=copy.id), copy
    if draw < EXACT + NEAR:
        copy = Copy(f"{original.id}~near", original.id, "near", chooser.choice(EDITED))
        return original._replace(id=copy.id, text=edit(original.text, copy.edited, chooser)), copy
    return None


def edit(text: str, share: float, chooser: Random) -> str:
    """The text with this share of its words, at least one, removed, doubled or misspelt, scattered over it."""
    parts = re.split(r"(\s+)", text)  # words at even places
    words = parts[::2]
    for place in chooser.sample(range(len(words)), max(1, round(share * len(words)))):
        word = words[place]
        parts[2 * place] = chooser.choice(["", f"{word} {word}", word + chooser.choice(ascii_lowercase)])
    return "".join(parts)


def write_shards(documents: Sequence[Document], folder: Path) -> str:
    """Writes the documents in order to shards of equal length. Returns the SHA-256 of all of them."""
    digest = hashlib.sha256()
    length = -(-len(documents) // SHARDS)
    for number in range(SHARDS):
        part = documents[number * length : (number + 1) * length]
        lines = b"".join(orjson.dumps(document._asdict()) + b"\n" for document in part)
        (folder / f"{number:05d}.jsonl").write_bytes(lines)
        digest.update(lines)
    return digest.hexdigest()


if __name__ == "__main__":
    run_command(main)
