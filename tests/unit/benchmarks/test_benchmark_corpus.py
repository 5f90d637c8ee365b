"""The corpus that the data pipeline is measured on: the same bytes each time, and copies as the log says."""

import gzip
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import corpus
from corpus import build, cut, debian_packages, edit, read_corpus

from deepseek_v3.data.sample_corpora import stdlib_documents

SIZE = 400_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """Two folders with text, HTML, a manual page, and files that are not read."""
    root = tmp_path_factory.mktemp("sources")
    for number, document in enumerate(list(stdlib_documents())[::8]):
        folder = root / f"package{number % 2}" / "usr/share/doc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d}.rst").write_text(document.text, encoding="utf-8")
    (folder / "page.html").write_text(
        f"<html><body><main><p>{'Prose about things. ' * 40}</p></main></body></html>"
    )
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (folder / "image.png").write_bytes(b"text " * 200)
    (folder / "changelog.gz").write_bytes(gzip.compress(b"text " * 200))
    (folder / "man1").mkdir()
    (folder / "man1" / "ls.1.gz").write_bytes(gzip.compress(b".TH LS 1\n" + b"list what is there\n" * 40))
    (folder / "man1" / "broken.1.gz").write_bytes(b"no gzip")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def built(sources, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus") / "out"
    build(sources, folder, SIZE, seed=0, workers=1)
    return folder


def test_two_processes_build_the_same_bytes(sources, built, tmp_path):
    summary = build(sources, tmp_path / "out", SIZE, seed=0, workers=2)
    assert summary == json.loads((built / "corpus.json").read_text())
    for path in built.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(built)).read_bytes()
    assert build(sources, tmp_path / "other", SIZE, seed=1, workers=1)["sha256"] != summary["sha256"]


def test_documents_are_of_the_stated_size_in_eight_shards(built):
    documents = list(read_corpus(built))
    summary = json.loads((built / "corpus.json").read_text())
    assert len(list((built / "documents").iterdir())) == 8
    assert len({document.id for document in documents}) == len(documents) == summary["documents"]
    assert sum(len(document.text.encode()) for document in documents) == summary["bytes"]
    assert abs(summary["bytes"] / SIZE - 1) < 0.15
    originals = [document for document in documents if "~" not in document.id]
    assert all(500 <= len(document.text.encode()) <= 10_000 for document in originals)


def test_copies_are_what_the_log_says(built):
    documents = {document.id: document for document in read_corpus(built)}
    copies = [json.loads(line) for line in (built / "injected.jsonl").read_text().splitlines()]
    assert {copy["id"] for copy in copies} == {id_ for id_ in documents if "~" in id_}
    for copy in copies:
        same = documents[copy["id"]].text == documents[copy["of"]].text
        assert same == (copy["kind"] == "exact")
        assert (copy["edited"] == 0) == same
    shares = {kind: sum(copy["kind"] == kind for copy in copies) / len(documents) for kind in ("exact", "near")}
    assert shares == pytest.approx({"exact": 0.05, "near": 0.13}, abs=0.05)


def test_only_text_is_read(sources):
    read = {document.id for document in corpus.read_sources(sources, 1)}
    names = {id_.rpartition("#")[0].rpartition("/")[2] for id_ in read}
    assert {name for name in names if not name.endswith(".rst")} == {"page.html", "ls.1.gz"}


def test_more_text_than_there_is_is_refused(sources, tmp_path):
    with pytest.raises(SystemExit, match="the sources hold only 1 of 82 MB; ask for less"):
        build(sources, tmp_path / "out", 10**8, seed=0, workers=1)


def test_cuts_lose_no_line_but_short_remainders_and_endless_ones():
    lines = [f"line {number} of the text\n" for number in range(5000)]
    lines[2500] = "x" * 20_000 + "\n"
    parts = list(cut("".join(lines), random.Random(0)))
    kept = "\n".join(parts).splitlines()
    assert [line for line in map(str.strip, lines) if line in set(kept)] == kept
    assert len(lines) - len(kept) < 60
    assert min(map(len, parts)) < 1000 < 5000 < max(map(len, parts)) <= 10_000


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5])
def test_an_edit_changes_the_stated_share_of_words(share):
    words = [f"word{number}" for number in range(1000)]
    edited = edit(" ".join(words), share, random.Random(0)).split()
    doubled = sum(one == other for one, other in pairwise(edited))
    assert len(set(words) - set(edited)) + doubled == 1000 * share
    assert edit("all", 0.01, random.Random(0)) != "all"


def test_packages_are_downloaded_and_unpacked_once(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, check, cwd=None):
        commands.append(command[:2])
        if command[0] == "apt-get" and command[-1] == "here-doc":
            (cwd / "here-doc_1_all.deb").write_bytes(b"")
        if command[0] == "dpkg-deb":
            Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(corpus, "PACKAGES", ["here-doc", "gone-doc"])
    for _ in range(2):
        assert debian_packages(tmp_path) == {"here-doc": tmp_path / "here-doc"}
    assert commands.count(["dpkg-deb", "--extract"]) == 1
    assert "gone-doc: this distribution has no such package" in capsys.readouterr().err


def test_without_packages_the_machines_own_documentation_is_used():
    folders = corpus.local_folders()
    assert "python" in folders
    assert all(folder.is_dir() for folder in folders.values())
