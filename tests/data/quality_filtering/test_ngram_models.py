"""N-gram models against the definition of their probabilities, and against the scores of KenLM."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from importlib import import_module
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.quality_filtering.ngram_model import BEGIN, END, UNKNOWN, NgramModel, read_arpa, write_arpa
from deepseek_v3.data.quality_filtering.ngram_training import PerplexityLimits, train_language_model
from deepseek_v3.data.quality_filtering.perplexity_score import (
    ArpaModel,
    KenlmModel,
    LanguageModel,
    build_sentences,
    load_language_model,
    tokenize,
)
from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.utils.errors import DataError

SMALL = "a b c a b\nb c a\na a b\n\nc b a b c\na c"
TINY_ARPA = """\
\\data\\
ngram 1=4
ngram 2=3

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.5
-0.5\t</s>
-0.7\thot\t-0.25

\\2-grams:
-0.125\t<s> hot
-0.0625\thot </s>
-2\thot hot

\\end\\
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document, _ in zip(stdlib_documents(), range(30), strict=False)]


def kenlm() -> Any:
    try:
        return import_module("kenlm")
    except ImportError:
        pytest.skip("needs the package kenlm, which pip builds with a C++ compiler")


def log10_probability(model: NgramModel, context: tuple[str, ...], word: str) -> float:
    """Computes the back-off definition: the longest known n-gram, times the weights of the longer contexts."""
    table = ngrams_of(model)
    if (*context, word) in table:
        return table[context + (word,)][0]
    return log10_probability(model, context[1:], word) + table.get(context, (0.0, 0.0))[1]


def ngrams_of(model: NgramModel) -> dict[tuple[str, ...], tuple[float, float]]:
    """Returns all n-grams with their log probability and back-off weight."""
    table: dict[tuple[str, ...], tuple[float, float]] = {}
    rows = [(word,) for word in model.words]
    for length, log_probs in enumerate(model.log_probs, start=1):
        if length > 1:
            pairs = [divmod(key, len(model.words)) for key in model.keys[length - 2].tolist()]
            rows = [(*rows[context], model.words[word]) for context, word in pairs]
        backoffs = model.backoffs[length - 1].tolist() if length <= len(model.backoffs) else [0.0] * len(rows)
        table |= dict(zip(rows, zip(log_probs.tolist(), backoffs, strict=True), strict=True))
    return table


@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_probabilities_sum_to_one_after_every_context(order: int) -> None:
    model = train_language_model([SMALL], order)
    words = [word for word in model.words if word != BEGIN]
    contexts = [ngram for ngram in ngrams_of(model) if len(ngram) < order and ngram[-1] != END]
    assert len(contexts) > 4
    for context in [(), ("c", "c"), *contexts]:
        total = sum(10 ** log10_probability(model, context[-order + 1 :], word) for word in words)
        assert total == pytest.approx(1, abs=1e-5), context


def test_probabilities_of_real_text_sum_to_one(texts: list[str]) -> None:
    """Like the previous test, but with discounts estimated from the data; sums all words after one context."""
    model = train_language_model(texts, 3)
    begin, predicted = model.words.index(BEGIN), np.arange(len(model.words))
    draw = random.Random(0)
    for key in draw.sample(model.keys[0].tolist(), 40):
        context = [word for word in divmod(key, len(model.words)) if word != begin]
        if model.words[context[-1]] == END:
            continue
        lines = np.array([[begin, *context, word] for word in predicted if word != begin])
        scores = model.score(lines.ravel()).reshape(lines.shape)[:, -1]
        assert (10**scores).sum() == pytest.approx(1, abs=1e-4)


def kneser_ney(lines: list[list[str]], order: int) -> dict[tuple[str, ...], float]:
    """Computes Chen & Goodman's probabilities of all n-grams seen, with dictionaries only."""
    lines = [[BEGIN, *line, END] for line in lines]
    counts = [
        Counter(tuple(line[i : i + k]) for line in lines for i in range(len(line) - k + 1))
        for k in range(order + 1)
    ]
    words = {*chain.from_iterable(lines), UNKNOWN} - {BEGIN}
    probabilities: dict[tuple[str, ...], float] = {}

    def lower(ngram: tuple[str, ...]) -> float:
        return probabilities[ngram[1:]] if len(ngram) > 1 else 1 / len(words)

    for k in range(1, order + 1):
        before: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for ngram in counts[k + 1] if k < order else ():
            before[ngram[1:]].add(ngram[0])
        adjusted = {
            ngram: count if k == order or ngram[0] == BEGIN else len(before[ngram])
            for ngram, count in counts[k].items()
            if ngram != (BEGIN,)
        }
        have = Counter(adjusted.values())
        discounts = [0.0, 0.5, 1.0, 1.5]
        if all(have[number] for number in (1, 2, 3, 4)):
            share = have[1] / (have[1] + 2 * have[2])
            estimated = [0.0, *(i - (i + 1) * share * have[i + 1] / have[i] for i in (1, 2, 3))]
            discounts = estimated if min(estimated[1:]) > 0 else discounts
        followers: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for ngram, count in adjusted.items():
            followers[ngram[:-1]].append(count)
        for ngram, count in adjusted.items():
            after = followers[ngram[:-1]]
            left = sum(discounts[min(other, 3)] for other in after) / sum(after)
            probabilities[ngram] = (count - discounts[min(count, 3)]) / sum(after) + left * lower(ngram)
    return probabilities


@pytest.mark.parametrize("order", [2, 3, 5])
def test_probabilities_equal_the_kneser_ney_definition(order: int, texts: list[str]) -> None:
    for text in (SMALL, "\n".join(texts)[:20_000]):
        lines = [tokenize(line) for line in text.split("\n") if tokenize(line)]
        expected = kneser_ney(lines, order)
        found = ngrams_of(train_language_model([text], order))
        assert expected.keys() == found.keys() - {(BEGIN,), (UNKNOWN,)}
        for ngram, probability in expected.items():
            assert 10 ** found[ngram][0] == pytest.approx(probability, rel=1e-5), ngram


@pytest.mark.parametrize("order", [2, 3, 5])
def test_kenlm_reads_our_file_and_gives_the_same_scores(order: int, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    write_arpa(train_language_model(texts[:20], order), path)
    outside = kenlm().Model(str(path))
    assert outside.order == order
    ours = load_language_model(path)
    lines = [line for text in texts[15:] for line in text.split("\n") if tokenize(line)][:1500]
    found = ours.scores(lines)
    assert (found.counts == [len(tokenize(line)) + 1 for line in lines]).all()
    expected = [sum(part[0] for part in outside.full_scores(" ".join(tokenize(line)))) for line in lines]
    np.testing.assert_allclose(found.log_probs, expected, atol=1e-4)


def test_kenlm_gives_the_same_perplexities(texts: list[str], tmp_path: Path) -> None:
    """KenlmModel reads any file that KenLM can; this one is ARPA, since the package cannot build binary files."""
    kenlm()
    path = tmp_path / "model.arpa"
    write_arpa(train_language_model(texts[:20], 3), path)
    some = [*texts[20:], "", "\n \n"]
    found, expected = (model.perplexities(some) for model in (load_language_model(path), KenlmModel(path)))
    assert found[-2:].tolist() == expected[-2:].tolist() == [math.inf, math.inf]
    np.testing.assert_allclose(found[:-2], expected[:-2], rtol=1e-4)


def test_models_are_read_as_written(texts: list[str], tmp_path: Path) -> None:
    model = train_language_model(texts[:5], 3)
    write_arpa(model, tmp_path / "model.arpa")
    read = read_arpa(tmp_path / "model.arpa")
    assert read.words == model.words
    for one, other in zip(
        [*read.keys, *read.log_probs, *read.backoffs], [*model.keys, *model.log_probs, *model.backoffs], strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_back_off_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(TINY_ARPA)
    model = load_language_model(path)
    cases = {
        "hot": [-0.125, -0.0625],
        "Hot hot": [-0.125, -2, -0.0625],
        "cold hot": [-0.5 - 1, -0.7, -0.0625],
        "hot cold": [-0.125, -0.25 - 1, -0.5],
        "hot\nhot": [-0.125, -0.0625, -0.125, -0.0625],
    }
    found = model.scores([*cases])
    np.testing.assert_allclose(found.log_probs, [sum(scores) for scores in cases.values()], rtol=1e-6)
    assert found.counts.tolist() == [len(scores) for scores in cases.values()]
    assert model.perplexities(["hot"])[0] == pytest.approx(10 ** ((0.125 + 0.0625) / 2))


def test_arpa_lines_in_any_order_and_missing_unknown_word(tmp_path: Path) -> None:
    lines = TINY_ARPA.replace("ngram 1=4", "ngram 1=3").replace("-1.0\t<unk>\n", "").split("\n")
    first = lines.index("\\2-grams:") + 1
    lines[first : first + 3] = reversed(lines[first : first + 3])
    (tmp_path / "model.arpa").write_text("\n".join(lines))
    (tmp_path / "old.arpa").write_text(TINY_ARPA.replace("<unk>", "<UNK>"))
    assert ngrams_of(read_arpa(tmp_path / "model.arpa"))[UNKNOWN,] == (-100, 0)
    assert ngrams_of(read_arpa(tmp_path / "model.arpa"))["hot", "hot"] == (-2, 0)
    assert ngrams_of(read_arpa(tmp_path / "old.arpa"))[UNKNOWN,] == (-1, 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\", "\\datum\\", r"model.arpa:1: is not an ARPA model: expected \\data"),
        ("ngram 1=4", "ngram 2=4", r"model.arpa:2: .*expected the number of 1-grams"),
        ("ngram 1=4\nngram 2=3\n", "", r"model.arpa:2: .*such as 'ngram 1=1000'"),
        ("-0.7\thot", "high\thot", r"model.arpa:9: .*expected a log10 probability and 1 words"),
        ("-2\thot hot", "-2\thot", r"model.arpa:14: .*expected a log10 probability and 2 words"),
        ("-2\thot hot", "-2\tcold hot", r"model.arpa:14: .*not listed before it"),
        ("-2\thot hot\n\n\\end\\\n", "", r"the file ends after 2 of 3 2-grams"),
        ("\\end\\", "", r"expected \\end"),
        ("</s>", "<end>", r"there is no <s> or </s>"),
        ("<unk>", "hot", r"a word is listed twice"),
        ("\\2-grams", "\\3-grams", r"expected \\2-grams"),
    ],
)
def test_files_that_are_not_models_are_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(TINY_ARPA.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_arpa(path)


def test_missing_and_binary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for read in (read_arpa, load_language_model):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / "none.arpa")
    binary = tmp_path / "model.binary"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    monkeypatch.setitem(__import__("sys").modules, "kenlm", None)
    with pytest.raises(DataError, match=r"pip install 'deepseek_v3\[kenlm\]'"):
        load_language_model(binary)


def test_a_damaged_binary_file(tmp_path: Path) -> None:
    kenlm()
    binary = tmp_path / "model.binary"
    binary.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(100))
    with pytest.raises(DataError, match="cannot be read by kenlm"):
        load_language_model(binary)


def test_tokens() -> None:
    assert tokenize("The “Cat” ate 12\n\n3.5—yes") == [
        "the",
        '"',
        "cat",
        '"',
        "ate",
        "00",
        "\n",
        "\n",
        "0",
        ".",
        "0",
        "-",
        "yes",
    ]


@given(st.lists(st.lists(st.sampled_from([-1, 3, 4, 5]), max_size=8), max_size=6))
def test_sentences_are_the_nonempty_lines(texts: list[list[int]]) -> None:
    words, text_of = [], []
    for number, text in enumerate(texts):
        joined = "".join("\n" if row < 0 else str(row) for row in text)
        for line in filter(None, joined.split("\n")):
            words += [1, *map(int, line), 2]
            text_of += [number] * (len(line) + 2)
    found = build_sentences(chain.from_iterable(texts), [*map(len, texts)], 1, 2)
    assert found.words.tolist() == words
    assert found.text_of.tolist() == text_of


@settings(max_examples=40)
@given(st.lists(st.text("ab \n.9", max_size=20), max_size=6))
def test_perplexity_does_not_depend_on_other_texts(texts: list[str]) -> None:
    model: LanguageModel = ArpaModel(train_language_model([SMALL], 3))
    in_one_call = model.perplexities(texts).tolist()
    assert in_one_call == [model.perplexities([text])[0] for text in texts]


def test_limits_are_percentiles_of_reference_documents(tmp_path: Path) -> None:
    model = ArpaModel(train_language_model([SMALL], 2))
    reference = [" ".join(letters) for letters in product("abcd", repeat=3)]
    limits = PerplexityLimits.of(model, [*reference, "", "\n"])
    assert limits.documents == 64
    perplexities = sorted(model.perplexities(reference))
    assert limits.head == pytest.approx(np.percentile(perplexities, 30))
    assert limits.middle == pytest.approx(np.percentile(perplexities, 60))
    limits.write(tmp_path / "model.arpa")
    assert PerplexityLimits.read(tmp_path / "model.arpa") == limits
    assert PerplexityLimits.read(tmp_path / "other.arpa") is None
    with pytest.raises(DataError, match="found none with words"):
        PerplexityLimits.of(model, ["", " "])


def test_damaged_limits_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.arpa.limits.json"
    file.write_text('{"head": -1, "middle": 2, "documents": 3}')
    with pytest.raises(DataError, match=r"limits.json: head: .*train the model again"):
        PerplexityLimits.read(tmp_path / "model.arpa")
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        PerplexityLimits.read(tmp_path / "model.arpa")


def test_text_without_words_trains_nothing() -> None:
    with pytest.raises(DataError, match="found no words"):
        train_language_model(["", " \n"], 3)
