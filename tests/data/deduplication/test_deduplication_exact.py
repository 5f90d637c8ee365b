"""Exact deduplication of documents, paragraphs and lines, against plain Python and for any division into parts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.deduplication import ExactDeduplicator, repeated_hashes
from deepseek_v3.data.deduplication.normalization import normalize, normalized_hashes
from deepseek_v3.data.documents import Document
from deepseek_v3.data.stages import NumberedPart
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.deduplication import decide, mark_removed, write_parts

# Capitals and spaces of all sizes, and capitals whose lower case is longer, shorter, or depends on its position.
ODD = "aB \t\n\x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000éÉßẞİIıΣσςJ\u212aǅⱥȺ中𐐀😀"


@given(st.lists(st.text(st.sampled_from(ODD), max_size=30) | st.text(max_size=20), max_size=8))
def test_hashes_are_of_the_normalized_text(texts: list[str]) -> None:
    expected = [xxhash.xxh3_128_intdigest("".join(text.lower().split()).encode()) for text in texts]
    found = [(high << 64) + low for high, low in normalized_hashes(pa.array(texts, pa.string())).tolist()]
    assert found == expected


@pytest.mark.parametrize("unit", ["document", "line", "paragraph"])
@pytest.mark.parametrize("suffix", ["py", "rs", "yaml", "c.gz", "Makefile"])
def test_code_is_equal_only_with_its_case_and_indentation(unit: str, suffix: str) -> None:
    texts = ["if a:\n    b()\nc()", "if a:\n    b()\n    c()", "IF A:\n    B()\nC()", "if a:\n    b()\nc()"]
    texts = [text.replace("\n", " " * (unit == "line")) for text in texts] if unit == "line" else texts
    names = [f"{i}.{suffix}" if suffix != "Makefile" else f"{i}/{suffix}" for i in range(4)]
    data = {"id": names, "text": texts, "source": names, "metadata": pa.nulls(4, pa.string())}
    stage = ExactDeduplicator(unit=unit, min_characters=1)

    assert stage.deduplicate(pa.table(data)).ids == names[:3]
    data["source"] = [f"{name}.txt" for name in names]
    assert stage.deduplicate(pa.table(data)).ids == names[:1]


def test_every_character_is_normalized() -> None:
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    texts = ["".join(characters[start : start + 50]) for start in range(0, len(characters), 50)]
    expected = [xxhash.xxh3_64_intdigest(normalize(text).encode()) for text in texts]
    assert len(set(expected)) > 20_000
    found = [(high << 64) + low for high, low in normalized_hashes(pa.array(texts)).tolist()]
    assert found == [xxhash.xxh3_128_intdigest(normalize(text).encode()) for text in texts]


def test_the_first_of_equal_documents_is_kept() -> None:
    texts = ["One two", "three", "ONE\n TWO", "", "onetwo", " \n", "Three!"]
    unique, ids, stats = ExactDeduplicator().deduplicate(texts)
    assert unique == ["One two", "three", "", "Three!"]
    assert ids == [0, 1, 3, 6]
    examples = [{"kept": 0, "duplicate": 2, "similarity": 1.0}, {"kept": 3, "duplicate": 5, "similarity": 1.0}]
    assert stats == {
        "documents": 7,
        "unique": 4,
        "duplicates": 3,
        "clusters": 2,
        "largest_cluster": 3,
        "cluster_sizes": {"2-3": 2},
        "examples": examples,
        "reasons": {"exact_duplicate": 3},
    }


def test_all_kinds_of_documents_are_returned_unchanged() -> None:
    stage = ExactDeduplicator()
    documents = [Document("a", "x"), Document("b", "X"), Document("c", "y")]
    assert stage.deduplicate(documents).documents == [documents[0], documents[2]]
    mappings = ({"id": n, "text": "same", "lang": "en"} for n in "pq")
    assert stage.deduplicate(mappings).documents == [{"id": "p", "text": "same", "lang": "en"}]
    table = pa.table({"text": ["a", "b", "A"], "n": [1, 2, 3]})
    unique, ids, _ = stage.deduplicate(table)
    assert unique.select(["text", "n"]).to_pylist() == [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    assert ids == [0, 1]
    assert stage.deduplicate([]).stats["documents"] == 0
    assert stage.deduplicate(pa.table({"text": pa.array([], pa.string())})).ids == []
    assert stage.deduplicate(table.to_batches()[0].slice(0, 0)).ids == []
    with pytest.raises(DataError, match="document 1"):
        stage.deduplicate(["a", None])  # type: ignore[list-item]


def test_repeated_paragraphs_are_removed() -> None:
    texts = [
        "Terms  of use\n\nFirst.",
        "terms of USE\n \n\nSecond.\n\nok\n\nok",
        "Terms of use",
        "TERMS OF USE\n\n",
    ]
    stage = ExactDeduplicator(unit="paragraph", min_characters=5)
    assert stage.changes_texts
    unique, ids, stats = stage.deduplicate(texts)
    assert unique == ["Terms  of use\n\nFirst.", "Second.\n\nok\n\nok"]
    assert ids == [0, 1]
    expected = {"documents": 4, "unique": 2, "duplicates": 2, "shortened": 1, "repeated_paragraphs": 3}
    assert stats == {**expected, "reasons": {"repeated_paragraphs": 2}}


def test_repeated_lines_are_removed_and_short_ones_stay(tmp_path: Path) -> None:
    texts = ["a line\nb\na line\nb\n", "A LINE\nnew line\r\n", "\n\na line\n  \nnew line", ""]
    stage = ExactDeduplicator(unit="line", min_characters=2)
    run = decide(stage, write_parts(stage, texts, [2], tmp_path / "p"), texts, tmp_path / "r")
    assert run.kept == {0: "a line\nb\nb\n", 1: "new line\r\n", 3: ""}
    assert run.removed == [2]
    assert run.dropped[2]["reason"] == "repeated_lines"
    assert run.dropped[2]["figures"] == '{"lines":2}'
    assert run.dropped[2]["trigger"] == "a line\n"


def _first_documents(texts: list[str]) -> dict[int, str]:
    forms = [normalize(text) for text in texts]
    return {document: text for document, text in enumerate(texts) if forms.index(forms[document]) == document}


def _first_lines(texts: list[str]) -> dict[int, str]:
    seen: set[str] = set()
    kept = {}
    for document, text in enumerate(texts):
        left = []
        for line in text.splitlines(keepends=True):
            long, form = len(line.strip()) >= 2, normalize(line)
            if not long or form not in seen:
                left.append(line)
            if long:
                seen.add(form)
        if "".join(left).strip() or not text.strip():
            kept[document] = "".join(left)
    return kept


@pytest.mark.parametrize(("unit", "expected"), [("document", _first_documents), ("line", _first_lines)])
@settings(max_examples=25)
@given(data=st.data())
def test_exact_results_equal_plain_python_for_any_parts(
    unit: str, expected: Callable[[list[str]], dict[int, str]], data: st.DataObject
) -> None:
    line = st.sampled_from(["aa", "Bb", "bB ", "c c c", "dd", "\u3000dD", "e", ""])
    texts = data.draw(st.lists(st.lists(line, max_size=4).map("\n".join), min_size=1, max_size=12))
    cuts = data.draw(st.lists(st.integers(0, len(texts)), max_size=3))
    memory = data.draw(st.sampled_from([100, 1500, 2**28]))
    stage = ExactDeduplicator(unit=unit, min_characters=2)
    with TemporaryDirectory() as name:
        whole = decide(stage, write_parts(stage, texts, [], Path(name, "w")), texts, Path(name, "wr"))
        cut = decide(stage, write_parts(stage, texts, cuts, Path(name, "c")), texts, Path(name, "cr"), memory)
    assert whole == cut
    assert whole.kept == expected(texts)
    assert whole.removed == [*whole.dropped]


def test_documents_removed_by_a_previous_stage_are_ignored(tmp_path: Path) -> None:
    texts = ["same", "other", "SAME", "same "]
    stage = ExactDeduplicator()
    parts = mark_removed(write_parts(stage, texts, [1], tmp_path / "p"), [0], tmp_path)
    run = decide(stage, parts, texts, tmp_path / "r")
    assert run.removed == [3]
    assert run.dropped[3]["figures"] == '{"duplicate_of":"d2","similarity":1.0}'
    assert run.figures["documents"] == 3


def test_hashes_equal_in_their_first_half_are_different(tmp_path: Path) -> None:
    hashes = np.array([[7, 1], [7, 2], [5, 1], [7, 1], [7, 2], [7, 3]], np.uint64)
    rows = np.arange(6, dtype=np.uint32)
    repeated_hashes.write_keys(tmp_path, hashes, rows, np.zeros_like(rows))
    found = repeated_hashes.find_repeats([NumberedPart(tmp_path, None, 10, 6)], 0, 2**64)
    assert sorted(found.tolist()) == [(13, 0, 10), (14, 0, 11)]


def test_unreadable_keys_are_named(tmp_path: Path) -> None:
    stage = ExactDeduplicator()
    parts = write_parts(stage, ["a"], [], tmp_path)
    (parts[0].keys / "hashes.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"hashes\.npy: is a damaged key file"):
        stage.match_tasks(parts, 2**20)


def test_deduplication_options() -> None:
    stage = pickle.loads(pickle.dumps(ExactDeduplicator(unit="line")))
    assert stage.options.unit == "line"
    assert stage.options.min_characters == 40
    assert not ExactDeduplicator().changes_texts
    with pytest.raises(ConfigError, match="ExactDeduplicator: unit"):
        ExactDeduplicator(unit="word")
