"""Decontamination finds the documents that share n-grams with evaluation sets, as a plain search does."""

from __future__ import annotations

import json
import pickle
import random
import re
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.decontamination import Decontaminator
from deepseek_v3.data.decontamination.index import EvaluationIndex, split_words
from deepseek_v3.utils.errors import ConfigError, DataError
from helpers.documents import batch_of

QUESTION = "A farmer has seventeen sheep and all but nine of them run away, so how many sheep are left?"
SHORT = "Which planet of our solar system is largest by mass?"  # 10 words
TINY = "What is it called?"
OTHER = (
    "Nothing in this sentence has anything to do with questions about animals on farms or about the sky at night."
)


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    records = [
        {"id": f"q{i}", "text": text, "answer": f"It is {i}."} for i, text in enumerate([QUESTION, SHORT, TINY])
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def kept(texts: list[str], **options: Any) -> list[bool]:
    return Decontaminator(**options).apply(batch_of(texts)).kept_rows.tolist()


@pytest.mark.parametrize("script", ["一二三四五六七八九十", "กขคงจฉชซญฎ", "ཀཁགངཅཆཇཉཏཐ", "កខគឃងចឆជឈញ"])
def test_scripts_without_spaces_need_twice_as_many_characters(script: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    text = "".join(draw.choice(script) for _ in range(60))
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": text}))
    noise = "".join(draw.choice(script) for _ in range(60))

    texts = [noise + text[20:46] + noise, noise + text[20:45] + noise[::-1], text[5:20] + "and so on"]
    assert kept(texts, evaluation=[str(tmp_path / "items.jsonl")]) == [False, True, True]


def test_thirteen_words_in_a_row_match(questions: str) -> None:
    some = QUESTION.split()
    texts = [
        " ".join(some[:13]),
        " ".join(some[:12]),
        " ".join(some[3:16]),
        " ".join([*some[:12], "also", *some[12:]]),
        f"{OTHER} {' '.join(some[:6])}. {' '.join(some[6:])} {OTHER}",
        OTHER,
    ]
    assert kept(texts, evaluation=[questions]) == [False, True, False, True, False, True]


def test_case_and_punctuation_are_ignored(questions: str) -> None:
    changed = QUESTION.upper().replace(" ", " – ").replace(",", "...")
    result = Decontaminator(evaluation=[questions]).apply(batch_of([OTHER, f"{OTHER}\n{changed}\nend"]))
    drop = result.dropped.to_pylist()[0]
    assert (drop["id"], drop["stage"], drop["reason"]) == ("d1", "decontamination", "evaluation_text")
    assert drop["trigger"] == changed.lower().split("...")[0]
    figures = orjson.loads(drop["figures"])
    assert figures["evaluation"] == f"{questions}: q0"
    assert figures["ngrams"] == 19 - 13 + 1
    assert figures["found"] == pytest.approx(19 / (19 + len(OTHER.split()) + 1), abs=1e-4)
    assert result.observed["evaluation_overlap"] == [0, figures["found"]]


def test_short_texts_match_as_a_whole(questions: str) -> None:
    whole, cut = f"{OTHER} {SHORT} {OTHER}", f"{OTHER} {SHORT.rsplit(' ', 1)[0]} {OTHER}"
    assert kept([whole, cut, f"{OTHER} {TINY}"], evaluation=[questions]) == [False, True, True]
    assert kept([whole, cut], evaluation=[questions], min_ngram=11) == [True, True]
    assert kept([f"{OTHER} {TINY}"], evaluation=[questions], min_ngram=4) == [False]


def test_matches_do_not_cross_documents(questions: str) -> None:
    first, second = QUESTION.split()[:9], QUESTION.split()[9:]
    assert kept([" ".join(first), " ".join(second)], evaluation=[questions]) == [True, True]
    assert kept([OTHER, QUESTION, QUESTION], evaluation=[questions]) == [True, False, False]


def test_small_overlaps_can_be_allowed(questions: str) -> None:
    texts = [QUESTION, f"{QUESTION} {OTHER} {OTHER}"]
    assert kept(texts, evaluation=[questions], min_share=0.5) == [False, True]


def test_fields_and_plain_text_of_evaluation_sets(tmp_path: Path) -> None:
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "plain.txt").write_text(SHORT)
    (folder / "records.jsonl").write_text(json.dumps({"question": TINY, "passage": QUESTION}) + "\n")
    texts = [SHORT, QUESTION, OTHER]
    assert kept(texts, evaluation=[str(folder)], fields=["question", "passage"]) == [False, False, True]
    assert kept(texts, evaluation=[str(folder / "records.jsonl")], fields=["passage"]) == [True, False, True]
    with pytest.raises(DataError, match="has no field 'text'"):
        kept(texts, evaluation=[str(folder)])


def test_scripts_without_spaces_count_characters(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("太陽系で一番大きい惑星はどれですか")
    texts = ["質問：「太陽系で一番大きい惑星はどれですか」と聞かれた。", "太陽系で一番大きい星", "それは何ですか"]
    assert kept(texts, evaluation=[str(path)]) == [False, True, True]


def brute_force(texts: list[str], evaluation: list[str], ngram: int, min_ngram: int) -> list[tuple[int, float]]:
    """Returns the number of matches of each text, and the share of its words in them."""
    known = set()
    for text in evaluation:
        some = tuple(re.findall(r"\w+", text))
        if len(some) >= min_ngram:
            known |= {some[i : i + ngram] for i in range(max(len(some) - ngram, 0) + 1)}
    results = []
    for text in texts:
        some = tuple(re.findall(r"\w+", text))
        hits = [
            (i, n)
            for i in range(len(some))
            for n in range(min_ngram, ngram + 1)
            if some[i : i + n] in known and i + n <= len(some)
        ]
        covered = {place for start, n in hits for place in range(start, start + n)}
        results.append((len(hits), round(len(covered) / max(len(some), 1), 4)))
    return results


@settings(max_examples=150)
@given(
    st.lists(st.text("abc ", max_size=40), max_size=6),
    st.lists(st.text("abc ", max_size=30), min_size=1, max_size=4),
    st.integers(2, 5),
    st.integers(0, 2),
)
def test_matches_equal_a_plain_search(texts: list[str], sets: list[str], ngram: int, fewer: int) -> None:
    min_ngram = max(ngram - fewer, 1)
    if max(len(text.split()) for text in sets) < min_ngram:
        return
    index = EvaluationIndex([(text, text) for text in sets], ngram, min_ngram)
    lists = [split_words(text) for text in texts]
    found = index.find(lists)
    expected = brute_force(texts, sets, ngram, min_ngram)
    flat = [word for some in lists for word in some]
    assert len(found.starts) == sum(hits for hits, _ in expected)
    for start, length, owner in zip(*(part.tolist() for part in found), strict=True):
        assert " ".join(flat[start : start + length]) in " ".join(split_words(sets[owner]))


def test_overlap_equals_a_plain_search(tmp_path: Path) -> None:
    draw = random.Random(0)
    sets = [" ".join(draw.choice("abcd") for _ in range(draw.randrange(3, 30))) for _ in range(20)]
    texts = [" ".join(draw.choice("abcde") for _ in range(60)) for _ in range(50)]
    path = tmp_path / "sets.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sets))
    stage = Decontaminator(evaluation=[str(path)], ngram=6, min_ngram=5)
    expected = brute_force(texts, sets, 6, 5)
    result = stage.apply(batch_of(texts))
    assert result.observed["evaluation_overlap"] == [share for _, share in expected]
    assert result.kept_rows.tolist() == [hits == 0 for hits, _ in expected]
    figures = [orjson.loads(text)["ngrams"] for text in result.dropped["figures"].to_pylist()]
    assert figures == [hits for hits, _ in expected if hits]


def test_long_batches_are_filtered_in_parts(questions: str) -> None:
    texts = [f"{OTHER} " * 12_000, f"{OTHER} {QUESTION}", f"{OTHER} " * 12_000, QUESTION, OTHER]
    result = Decontaminator(evaluation=[questions]).apply(batch_of(texts))
    assert result.dropped["id"].to_pylist() == ["d1", "d3"]
    assert result.dropped["trigger"].to_pylist() == [QUESTION.lower().split(",")[0]] * 2


def test_odd_texts_and_pickled_stage(questions: str) -> None:
    stage = pickle.loads(pickle.dumps(Decontaminator(evaluation=[questions])))
    texts = ["", " ", "İ" * 20, "\x00", "?!", "straße " * 20]
    assert stage.apply(batch_of(texts)).kept["text"].to_pylist() == texts
    assert stage.apply(batch_of([])).kept.num_rows == 0


def test_impossible_decontamination_options_are_refused(questions: str) -> None:
    with pytest.raises(ConfigError, match=r"decontamination.evaluation: is empty"):
        Decontaminator()
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        Decontaminator(evaluation=["none.jsonl"])
    with pytest.raises(ConfigError, match="min_ngram = 14: expected at most ngram = 13"):
        Decontaminator(evaluation=[questions], min_ngram=14)
    with pytest.raises(DataError, match="none of 3 texts has min_ngram = 50 words"):
        Decontaminator(evaluation=[questions], ngram=60, min_ngram=50).apply(batch_of([OTHER]))
