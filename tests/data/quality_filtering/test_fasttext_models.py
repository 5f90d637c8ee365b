"""fastText models give the labels and scores of its own code, which can also read the files written here."""

from __future__ import annotations

import struct
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.language import bundled_model
from deepseek_v3.data.quality_filtering.fasttext import (
    FastText,
    character_ngrams,
    load_fasttext,
    word_hash,
    word_ngrams,
)
from deepseek_v3.data.quality_filtering.fasttext_format import FastTextFile, is_fasttext
from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.utils.errors import DataError

ODD = [
    "",
    " \n\t ",
    "a",
    "\x00a\x00b",
    "hello </s> never read",
    "__label__en __label__ x",
    "日本語のテキスト",
    "a" * 500,
    "é \u3000 y",
    "\u00a0\u2028",
    "</s>",
    "naïve café 😀😀",
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    documents = [document.text for document, _ in zip(stdlib_documents(), range(160), strict=False)]
    excerpts = [text[start : start + 90] for text in documents for start in range(0, min(len(text), 3600), 120)]
    return [*excerpts, *ODD]


def native(path: Path) -> Any:
    """Loads a model by fastText's own code."""
    try:
        module = import_module("fasttext_pybind")
    except ImportError:
        pytest.skip("needs fastText's own code, such as the package fasttext-predict")
    model = module.fasttext()
    model.loadModel(str(path))
    return model


def native_scores(model: Any, text: str, labels: list[str]) -> list[float]:
    found = model.predict(text.replace("\n", " ") + "\n", len(labels), 0.0, "strict")
    scores = {label.removeprefix("__label__"): score for score, label in found}
    return [min(scores.get(label, 0.0), 1.0) for label in labels]


def random_model(seed: int = 0, **changes: Any) -> FastTextFile:
    """Returns a model of a few words and three labels, with random vectors."""
    random = np.random.default_rng(seed)
    words = [b"</s>", *(f"{word}".encode() for word in "the a of return self import café def 日本".split())]
    fields: dict[str, Any] = {
        "words": {word: row for row, word in enumerate(words)},
        "labels": ["one", "two", "three"],
        "label_counts": [9, 5, 2],
        "word_ngrams": 1,
        "min_characters": 0,
        "max_characters": 0,
        "buckets": 0,
        "loss": "softmax",
        "bucket_rows": None,
        **changes,
    }
    rows = len(words) + fields["buckets"]
    fields["input"] = random.normal(size=(rows, 6)).astype(np.float32)
    fields["output"] = random.normal(size=(3, 6)).astype(np.float32)
    return FastTextFile(**fields)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"word_ngrams": 2, "buckets": 50},
        {"word_ngrams": 4, "buckets": 77, "loss": "hs"},
        {"min_characters": 1, "max_characters": 3, "buckets": 60},
        {"min_characters": 3, "max_characters": 6, "buckets": 1000, "word_ngrams": 2, "loss": "hs"},
    ],
)
def test_probabilities_equal_those_of_fasttext(changes: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    random_model(**changes).write(path)
    model, outside = load_fasttext(path), native(path)
    found = model.probabilities(texts)
    expected = [native_scores(outside, text, model.labels) for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_bundled_model_gives_fasttexts_labels_and_scores(texts: list[str]) -> None:
    path = bundled_model()
    model, outside = load_fasttext(path), native(path)
    found = model.probabilities(texts)
    assert len(texts) > 3000
    for row, text in enumerate(texts):
        score, label = outside.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")[0]
        assert model.labels[found[row].argmax()] == label.removeprefix("__label__")
        assert found[row].max() == pytest.approx(min(score, 1), abs=1e-4)


def quantised(path: Path, matrix_of: np.ndarray, with_norms: bool) -> bytes:
    """Returns a quantised matrix of the shape of `matrix_of`, with random codes and centroids."""
    random = np.random.default_rng(3)
    rows, width = matrix_of.shape
    part, parts = 4, -(-width // 4)
    data = struct.pack("<?2qi", with_norms, rows, width, rows * parts)
    data += random.integers(256, size=rows * parts, dtype=np.uint8).tobytes()
    data += struct.pack("<4i", width, parts, part, width - part * (parts - 1))
    data += random.normal(size=width * 256).astype("<f4").tobytes()
    if with_norms:
        data += random.integers(256, size=rows, dtype=np.uint8).tobytes()
        data += struct.pack("<4i", 1, 1, 1, 1) + random.uniform(0.5, 2, size=256).astype("<f4").tobytes()
    return data


@pytest.mark.parametrize("with_norms", [False, True])
def test_quantised_and_pruned_models_are_read(with_norms: bool, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    model = random_model(min_characters=2, max_characters=3, buckets=500)
    model.write(path)
    data = path.read_bytes()
    kept = {bucket: row for row, bucket in enumerate(range(7, 500, 11))}
    matrices = sum(1 + 16 + 4 * matrix.size for matrix in (model.input, model.output))
    head = bytearray(data[: len(data) - matrices])
    struct.pack_into("<q", head, 8 + 56 + 12 + 8, len(kept))
    pruned = np.zeros((len(model.words) + len(kept), 6))
    pairs = b"".join(struct.pack("<2i", *pair) for pair in kept.items())
    input_, output = (b"\x01" + quantised(path, matrix, with_norms) for matrix in (pruned, model.output))
    path.write_bytes(bytes(head) + pairs + input_ + output)
    read, outside = load_fasttext(path), native(path)
    expected = [native_scores(outside, text, read.labels) for text in texts[::10]]
    np.testing.assert_allclose(read.probabilities(texts[::10]), expected, atol=1e-5)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=60), max_size=12))
def test_scores_do_not_depend_on_other_texts(some: list[str]) -> None:
    model = FastText(random_model(min_characters=2, max_characters=4, buckets=99, word_ngrams=2), Path("m"))
    in_one_call = model.probabilities(some)
    assert in_one_call.shape == (len(some), 3)
    for row, text in enumerate(some):
        assert (model.probabilities([text])[0] == in_one_call[row]).all()


def test_models_are_read_as_written(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    model = random_model(word_ngrams=3, buckets=20, loss="hs")
    model.write(path)
    read = FastTextFile.read(path)
    assert is_fasttext(path)
    assert (read.words, read.labels, read.label_counts) == (model.words, model.labels, model.label_counts)
    assert (read.word_ngrams, read.buckets, read.loss, read.bucket_rows) == (3, 20, "hs", None)
    assert (read.input == model.input).all()
    assert (read.output == model.output).all()


def test_a_text_of_unknown_words_has_zero_probabilities() -> None:
    model = random_model()
    del model.words[b"</s>"]
    classifier = FastText(model, Path("m"))
    assert classifier.probabilities(["unheard"]).tolist() == [[0, 0, 0]]
    assert classifier.probabilities(["the"]).sum() == pytest.approx(1, abs=1e-4)


def test_fasttext_word_hashes() -> None:
    """Compares with the published values of FNV-1a for ASCII; fastText sign-extends other bytes."""
    assert word_hash(b"") == 0x811C9DC5
    assert word_hash(b"a") == 0xE40C292C
    assert word_hash(b"foobar") == 0xBF9CF968
    assert word_hash(b"\xff") == (0x811C9DC5 ^ 0xFFFFFFFF) * 16777619 % 2**32


def test_character_ngrams_include_the_word_brackets() -> None:
    found: dict[int, set[int]] = {0: set(), 1: set()}
    for hashes, word_of in character_ngrams([b"ab", "日".encode()], 1, 3):
        for value, word in zip(hashes.tolist(), word_of.tolist(), strict=True):
            found[word].add(value)
    assert found[0] == {word_hash(ngram) for ngram in (b"a", b"b", b"<a", b"ab", b"b>", b"<ab", b"ab>")}
    assert found[1] == {word_hash(ngram.encode()) for ngram in ("日", "<日", "日>", "<日>")}


def test_word_ngrams_do_not_cross_lines() -> None:
    hashes, lines = word_ngrams(np.array([5, 7, 11, 13], np.uint64), np.array([0, 3, 3, 4]), 3)
    factor = 116049371
    expected = [5 * factor + 7, 7 * factor + 11, (5 * factor + 7) * factor + 11]
    assert sorted(hashes.tolist()) == sorted(expected)
    assert lines.tolist() == [0, 0, 0]


def test_unknown_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"model.bin: has no label 'good', only one, two, three"):
        FastText(random_model(), Path("model.bin")).index("good")


def test_files_that_are_not_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(DataError, match="cannot be read"):
        FastTextFile.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        is_fasttext(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a complete fastText model"):
        FastTextFile.read(path)
    path.write_bytes(b"plain text that is long enough for a heading")
    assert not is_fasttext(path)
    with pytest.raises(DataError, match="not a fastText model of version 11 or 12"):
        FastTextFile.read(path)


def test_damaged_and_other_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    random_model(buckets=3, word_ngrams=2).write(path)
    whole = path.read_bytes()
    for size in range(8, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a complete fastText model"):
            FastTextFile.read(path)
    for offset, value in ((8 + 4 * 6, 4), (8 + 4 * 7, 1)):  # loss one-vs-all; a model of word vectors
        changed = bytearray(whole)
        struct.pack_into("<i", changed, offset, value)
        path.write_bytes(changed)
        with pytest.raises(DataError, match="expected a supervised one with loss softmax or hs"):
            FastTextFile.read(path)
    changed = bytearray(whole)
    struct.pack_into("<i", changed, 8 + 4 * 8, 4)  # one bucket more than there are
    path.write_bytes(changed)
    with pytest.raises(DataError, match="its matrices have the shapes"):
        FastTextFile.read(path)
