"""How systems that remove near duplicates are compared, on cases small enough to count by hand."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import process_stats
from corpus import DOCUMENTS, Document, write_shards
from near_duplicates import Decisions, connected, score, systems
from process_stats import run_and_measure
from synthetic_corpus import write_synthetic_corpus


def write_corpus(folder: Path, texts: list[str]) -> Path:
    (folder / DOCUMENTS).mkdir(parents=True)
    write_shards([Document(f"d{number}", text, "test") for number, text in enumerate(texts)], folder / DOCUMENTS)
    return folder


def test_scores_are_counted_as_they_are_defined():
    """True pairs 0-1, 0-2, 1-2, 5-6. Found clusters: 0, 1, 3; and 5, 6, of which both are kept."""
    pairs = np.array([[0, 1], [0, 2], [1, 2], [5, 6]])
    clusters = np.array([0, 0, 2, 0, 4, 5, 5, 7])
    kept = np.array([1, 0, 1, 0, 1, 1, 1, 1], bool)
    found = score(Decisions(clusters, kept), pairs)
    assert found["resolved"] == 2 / 4  # 0-2 and 5-6 are both kept
    assert found["justified"] == 1 / 2  # 1 is like 0, but 3 like nothing
    assert found["recall"] == 2 / 4
    assert found["precision"] == 2 / 4  # 0-1 and 5-6, but not 0-3 and 1-3
    assert (found["removed"], found["removable"]) == (2, 3)


def test_pairs_connect_along_chains():
    numbers = connected(6, np.array([[0, 1], [1, 2], [4, 5]]))
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers.tolist())) == 3


def test_the_decisions_of_each_system_are_read_from_its_output(tmp_path):
    """Sixteen documents in eight shards of two; 1 and 4 are copies of 0."""
    corpus = write_corpus(tmp_path / "corpus", [f"text {number}" for number in range(16)])
    known = systems(tmp_path / "peers", 2)

    ours = tmp_path / "ours" / "run" / "dropped"
    ours.mkdir(parents=True)
    drops = [{"id": f"d{number}", "figures": {"duplicate_of": "d0"}} for number in (1, 4)]
    (ours / "part-00000.jsonl").write_text("".join(json.dumps(drop) + "\n" for drop in drops))

    datatrove = tmp_path / "datatrove" / "remove"
    datatrove.mkdir(parents=True)
    for shard in range(8):
        clusters, remove = {0: ([0, 0, 1, 0], [1]), 2: ([0, 0], [0])}.get(shard, ([], []))
        (datatrove / f"{shard:06d}.clusters").write_bytes(struct.pack(f"<{len(clusters)}I", *clusters))
        (datatrove / f"{shard:06d}.remove").write_bytes(struct.pack(f"<{len(remove)}I", *remove))

    (tmp_path / "datasketch").mkdir()
    np.save(tmp_path / "datasketch" / "clusters.npy", np.array([0, 0, 2, 3, 0, *range(5, 16)]))

    for name in ("ours", "datatrove", "datasketch"):
        clusters, kept = known[name].decisions(corpus, tmp_path / name)
        assert np.flatnonzero(~kept).tolist() == [1, 4]
        assert clusters[0] == clusters[1] == clusters[4]
        assert len(set(clusters.tolist())) == 14


def test_ours_runs_on_a_corpus(tmp_path):
    text = " ".join(f"word{number}" for number in range(200))
    corpus = write_corpus(tmp_path / "corpus", [text, f"{text} more", "something else", text.upper()])
    output = tmp_path / "output"
    output.mkdir()
    ours = systems(tmp_path, 1)["ours"]
    assert run_and_measure(ours.command(corpus, output)).seconds > 0
    clusters, kept = ours.decisions(corpus, output)
    assert kept.tolist() == [True, False, True, False]
    assert clusters[0] == clusters[1] == clusters[3] != clusters[2]


def test_grown_corpora_have_as_many_documents_as_asked(tmp_path):
    lines = [f"Line {number} of a text that is long enough to be drawn." for number in range(400)]
    corpus = write_corpus(tmp_path / "corpus", ["\n".join(lines)])
    for name in ("one", "other"):
        write_synthetic_corpus(corpus, tmp_path / name, 500)
    documents = [
        json.loads(line) for path in sorted((tmp_path / "one/documents").iterdir()) for line in path.open()
    ]
    assert [document["id"] for document in documents] == [str(number) for number in range(500)]
    assert len({document["text"] for document in documents}) == 500
    assert 1000 < np.mean([len(document["text"]) for document in documents]) < 1500
    assert all(
        path.read_bytes() == (tmp_path / "other" / DOCUMENTS / path.name).read_bytes()
        for path in (tmp_path / "one" / DOCUMENTS).iterdir()
    )


def test_memory_is_that_of_the_program_and_what_it_starts(tmp_path, monkeypatch):
    looked = tmp_path / "looked"
    filled = process_stats._filled

    def look(pid):
        found = filled(pid)
        if found > 60e6:
            looked.touch()
        return found

    monkeypatch.setattr(process_stats, "_filled", look)
    wait = f"[time.sleep(0.01) for _ in range(10_000) if not os.path.exists({str(looked)!r})]"
    child = f"import os, time; data = bytearray(60_000_000); {wait}"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    run = run_and_measure([sys.executable, "-c", program])
    assert run.seconds > 0
    assert 60 < run.peak_megabytes < 200


def test_a_program_that_fails_shows_what_it_said():
    with pytest.raises(SystemExit, match="no such thing"):
        run_and_measure([sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"])
