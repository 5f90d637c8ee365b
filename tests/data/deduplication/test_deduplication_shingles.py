"""Words and shingles: the reference against regular expressions, and the kernels against the reference."""

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.arrays import BoolArray
from deepseek_v3.data.deduplication import utf8
from deepseek_v3.data.deduplication.minhash import MinHasher
from deepseek_v3.data.deduplication.reference import jaccard, shingle_hash, shingles, words

BACK_ENDS = ("numpy", "numba")
# All special cases: letter case, sizes in UTF-8, scripts without spaces, marks, and symbols.
ALPHABET = "aZ_9 .-\n\0éÀßẞſ\u212aİıςΣжЖ中々〇ァーกำ๑ກကខ가ǘ️\u200d😀𝒜𐐀𝟘𠀀\U000e0100"
TEXTS = st.lists(st.text(st.sampled_from(ALPHABET), max_size=90) | st.text(max_size=40), max_size=6)


def _hashes(texts: pa.Array, accelerator: str, ngram: int = 5, is_code: BoolArray | None = None) -> list[list[int]]:
    hasher = MinHasher(16, ngram, 0, accelerator)
    return [
        found.hashes[start:end].tolist()
        for found in hasher.shingles(texts, is_code)
        for start, end in zip(found.offsets[:-1], found.offsets[1:], strict=True)
    ]


def _expected(text: str, ngram: int = 5, is_code: bool = False) -> list[int]:
    found = words(text, is_code)
    count = max(len(found) - ngram + 1, 1) if found else 0
    return [shingle_hash(found[i : i + ngram], ngram) for i in range(count)]


CODE = st.text(st.sampled_from("aB_1 +-=<!&.,(\né中"), max_size=60)


@pytest.mark.parametrize("accelerator", BACK_ENDS)
@given(documents=st.lists(st.tuples(CODE, st.booleans()), max_size=6))
def test_operators_are_words_of_code_alone(accelerator: str, documents: list[tuple[str, bool]]) -> None:
    texts, is_code = [text for text, _ in documents], np.array([code for _, code in documents], np.bool_)
    expected = [_expected(text, 5, code) for text, code in documents]
    assert _hashes(pa.array(texts, pa.string()), accelerator, 5, is_code) == expected


def test_the_operators_of_a_line_are_words() -> None:
    assert [word.decode() for word in words("x += y->z", is_code=True)] == ["x", "+", "=", "y", "-", ">", "z"]
    assert [word.decode() for word in words("x += y->z")] == ["x", "y", "z"]


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_words_match_a_regular_expression(text: str) -> None:
    short = re.sub(r"\w{65,}", "", text)
    assert [word.decode() for word in words(short)] == re.findall(r"\w+", short.lower(), re.ASCII)


@given(st.text(st.sampled_from("abzABZ09_ .,-àÉöŒœßñ łŁđжЯёґΑωΆέ")))
def test_european_words_match_a_regular_expression(text: str) -> None:
    assert [word.decode() for word in words(text)] == re.findall(r"\w+", text.lower())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't STOP, élan_vital 3.14", ["don", "t", "stop", "élan_vital", "3", "14"]),
        ("ΟΔΟΣ οδος", ["οδοσ", "οδοσ"]),
        ("Python入門2版。テスト", ["python", "入", "門", "2", "版", "テ", "ス", "ト"]),
        ("ภาษาไทย", list("ภาษาไทย")),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        (unicodedata.normalize("NFD", "Ünïcode"), [unicodedata.normalize("NFD", "ünïcode")]),
        ("한국어 문장", ["한국어", "문장"]),
        ("❤️ 😀 … —", []),
        ("𝒜𐐀 x²", ["𝒜𐐨", "x²"]),
        ("\u212a ẞ İ", ["\u212a", "ẞ", "İ"]),  # the lower case has another size in UTF-8
        ("x" * 130, ["x" * 64, "x" * 64, "xx"]),
    ],
)
def test_words_by_script(text: str, expected: list[str]) -> None:
    assert [word.decode() for word in words(text)] == expected


def test_short_texts_have_one_shingle_and_empty_ones_none() -> None:
    assert shingles("a b c d e f") == {(b"a", b"b", b"c", b"d", b"e"), (b"b", b"c", b"d", b"e", b"f")}
    assert shingles("One, two") == {(b"one", b"two")}
    assert shingles(" …") == set()
    assert jaccard(shingles("a b c d e f"), shingles("a b c d e g")) == 1 / 3
    assert jaccard(set(), set()) == 0


@pytest.mark.parametrize("accelerator", BACK_ENDS)
@given(texts=TEXTS, ngram=st.sampled_from([1, 2, 5, 9]))
def test_kernels_compute_the_reference_hashes(accelerator: str, texts: list[str], ngram: int) -> None:
    found = _hashes(pa.array(texts, pa.string()), accelerator, ngram)
    assert found == [_expected(text, ngram) for text in texts]


@pytest.mark.parametrize("accelerator", BACK_ENDS)
def test_words_of_all_lengths_at_document_borders(accelerator: str) -> None:
    texts = ["ab" * n + "c" * (n % 3) for n in range(1, 100)] + ["中", "文", "a", "", "b", "é" * 40, "x y"]
    assert _hashes(pa.array(texts), accelerator, 1) == [_expected(text, 1) for text in texts]


@pytest.mark.parametrize("accelerator", BACK_ENDS)
def test_hashes_do_not_depend_on_blocks_or_offsets(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        "",
        "one two three four five six",
        "é",
        "",
        "x" * 3000,
        *(f"word{i} " * (i % 11) for i in range(60)),
        "",
    ]
    expected = [_expected(text) for text in texts]
    assert _hashes(pa.array(texts), accelerator) == expected
    monkeypatch.setattr(utf8, "_BLOCK_BYTES", 100)
    assert _hashes(pa.array(texts), accelerator) == expected
    assert _hashes(pa.array(texts).slice(3, 20), accelerator) == expected[3:23]
    assert _hashes(pa.array(texts, pa.large_string()), accelerator) == expected
    assert _hashes(pa.array([], pa.string()), accelerator) == []
    assert _hashes(pa.array(["", ""]), accelerator) == [[], []]


@pytest.mark.parametrize("accelerator", BACK_ENDS)
def test_a_document_of_many_megabytes(accelerator: str) -> None:
    found = _hashes(pa.array(["tic tac toe " * 200_000 + "x" * 2_000_000]), accelerator)[0]
    assert len(found) == 600_000 + 2_000_000 // 64 - 4
    assert len(set(found)) == 3 + 5 + 1 - 1  # 3 rotations of the words, 5 transitions to the long run


def test_different_words_and_shingles_have_different_hashes() -> None:
    letters = [f"{a}{b}{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyzabcd"]
    texts = pa.array([" ".join([*letters, *(f"{word}longer{word}" for word in letters)])])
    for ngram in (1, 5):
        found = _hashes(texts, "numpy", ngram)[0]
        assert len(set(found)) == len(found)
    assert np.mean(np.array(_hashes(texts, "numpy", 5)[0]) >= 2**31) == pytest.approx(0.5, abs=0.04)
