"""Decontamination finds the documents that share n-grams with evaluation sets, as a plain search does."""

from __future__ import annotations

import json
import logging
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
from helpers.deduplication import Run, decide, mark_removed, write_parts

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


def decontaminate(texts: list[str], folder: Path, cuts: tuple[int, ...] = (), **options: Any) -> Run:
    """The decisions about texts that are one corpus, in parts that begin at `cuts`."""
    stage = Decontaminator(**options)
    return decide(stage, write_parts(stage, texts, cuts, folder / "parts"), texts, folder / "run")


def kept(texts: list[str], **options: Any) -> list[bool]:
    ids = Decontaminator(**options).filter(texts).ids
    return [number in ids for number in range(len(texts))]


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


def test_case_and_punctuation_are_ignored(questions: str, tmp_path: Path) -> None:
    changed = QUESTION.upper().replace(" ", " – ").replace(",", "...")
    drop = decontaminate([OTHER, f"{OTHER}\n{changed}\nend"], tmp_path, evaluation=[questions]).dropped[1]
    assert (drop["id"], drop["stage"], drop["reason"]) == ("d1", "decontamination", "evaluation_text")
    assert drop["trigger"] == changed.lower().split("...")[0]
    figures = orjson.loads(drop["figures"])
    assert figures["evaluation"] == f"{questions}: q0"
    assert figures["ngrams"] == 19 - 13 + 1
    assert figures["found"] == pytest.approx(19 / (19 + len(OTHER.split()) + 1), abs=1e-4)


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
    index = EvaluationIndex([(text, text) for text in sets], ngram, min_ngram, 2)
    lists = [split_words(text) for text in texts]
    found = index.find(lists)
    expected = brute_force(texts, sets, ngram, min_ngram)
    flat = [word for some in lists for word in some]
    assert len(found.starts) == sum(hits for hits, _ in expected)
    for start, length, number in zip(*(part.tolist() for part in found), strict=True):
        assert " ".join(flat[start : start + length]) in " ".join(split_words(sets[index.owners[number]]))


def test_overlap_equals_a_plain_search(tmp_path: Path) -> None:
    draw = random.Random(0)
    sets = [" ".join(draw.choice("abcd") for _ in range(draw.randrange(3, 30))) for _ in range(20)]
    texts = [" ".join(draw.choice("abcde") for _ in range(60)) for _ in range(50)]
    path = tmp_path / "sets.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sets))
    expected = brute_force(texts, sets, 6, 5)
    options = {"evaluation": [str(path)], "ngram": 6, "min_ngram": 5, "max_documents": None}
    for cuts in ((), (7, 30)):
        run = decontaminate(texts, tmp_path / str(len(cuts)), cuts, **options)
        assert sorted(run.kept) == [row for row, (hits, _) in enumerate(expected) if not hits]
        assert run.removed == sorted(run.dropped)
        figures = [orjson.loads(run.dropped[row]["figures"]) for row in run.removed]
        assert [(one["ngrams"], one["found"]) for one in figures] == [one for one in expected if one[0]]


def test_long_texts_are_searched_in_batches(questions: str, tmp_path: Path) -> None:
    texts = [f"{OTHER} " * 12_000, f"{OTHER} {QUESTION}", f"{OTHER} " * 12_000, QUESTION, OTHER]
    run = decontaminate(texts, tmp_path, (2,), evaluation=[questions])
    assert {row: drop["trigger"] for row, drop in run.dropped.items()} == dict.fromkeys(
        (1, 3), QUESTION.lower().split(",")[0]
    )


def test_odd_texts_and_pickled_stage(questions: str) -> None:
    stage = pickle.loads(pickle.dumps(Decontaminator(evaluation=[questions])))
    texts = ["", " ", "İ" * 20, "\x00", "?!", "straße " * 20]
    assert stage.filter(texts).documents == texts
    assert stage.filter([]).documents == []


LICENCE = "Permission is hereby granted free of charge to any person obtaining a copy of this software"


@pytest.fixture
def licensed(tmp_path: Path) -> str:
    """An evaluation item with a sentence of a licence in it."""
    path = tmp_path / "licensed.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate([LICENCE, QUESTION]))
    )
    return str(path)


def test_a_common_sentence_does_not_count(licensed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [f"{LICENCE}. File {number}. {OTHER}" for number in range(30)]
    texts[7] += f" {QUESTION}"
    texts += [OTHER, QUESTION]
    with caplog.at_level(logging.WARNING):
        run = decontaminate(texts, tmp_path, evaluation=[licensed])
    assert sorted(run.dropped) == [7, 31]
    assert run.dropped[7]["trigger"] == QUESTION.lower().split(",")[0]
    common = run.figures["common"]
    assert (run.figures["common_ngrams"], run.figures["spared_documents"]) == (16 - 13 + 1, 29)
    assert [(one["evaluation"], one["documents"]) for one in common] == [(f"{licensed}: 0", 30)]
    assert common[0]["text"] == " ".join(LICENCE.lower().split()[:13])
    assert "4 n-grams of evaluation texts occur in more than max_documents = 10 documents" in caplog.text
    assert "29 documents match nothing else. In 30 documents: 'permission is hereby" in caplog.text
    assert sum(kept(texts, evaluation=[licensed], max_documents=None)) == 1


def test_the_limit_counts_documents_and_not_occurrences(licensed: str) -> None:
    texts = [f"{LICENCE}. " * 20, LICENCE, OTHER]
    assert kept(texts, evaluation=[licensed], max_documents=2) == [False, False, True]
    assert kept(texts, evaluation=[licensed], max_documents=1) == [True, True, True]
    assert kept(texts[1:], evaluation=[licensed], max_documents=1) == [False, True]


def test_decisions_do_not_depend_on_parts_or_removed_documents(licensed: str, tmp_path: Path) -> None:
    draw = random.Random(1)
    texts = [draw.choice([f"{LICENCE} {OTHER}", QUESTION, OTHER, f"{OTHER} {LICENCE}"]) for _ in range(40)]
    options: dict[str, Any] = {"evaluation": [licensed], "max_documents": 12}
    runs = [
        decontaminate(texts, tmp_path / str(n), cuts, **options) for n, cuts in enumerate([(), (1,), (9, 20, 33)])
    ]
    assert runs[0].dropped
    assert runs[0] == runs[1] == runs[2]
    stage = Decontaminator(**options)
    parts = write_parts(stage, texts, (13,), tmp_path / "masked")
    licensed_rows = [row for row, text in enumerate(texts) if LICENCE in text]
    masked = mark_removed(parts, licensed_rows[12:], tmp_path / "masked")
    run = decide(stage, masked, texts, tmp_path / "run")
    assert run.figures["common_ngrams"] == 0  # only 12 documents are left
    assert set(licensed_rows[:12]) <= set(run.removed)


@pytest.mark.parametrize("characters", [1, 2, 3])
def test_the_length_in_scripts_without_spaces_is_an_option(tmp_path: Path, characters: int) -> None:
    draw = random.Random(0)
    text = "".join(draw.choice("一二三四五六七八九十") for _ in range(60))
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": text}))
    texts = [text[5 : 5 + 13 * characters], text[5 : 4 + 13 * characters]]
    options = {"evaluation": [str(tmp_path / "items.jsonl")], "characters_per_word": characters}
    assert kept(texts, **options) == [False, True]


def test_impossible_decontamination_options_are_refused(questions: str) -> None:
    with pytest.raises(ConfigError, match=r"decontamination.evaluation: is empty"):
        Decontaminator()
    with pytest.raises(DataError, match=r"none.jsonl does not exist"):
        Decontaminator(evaluation=["none.jsonl"])
    with pytest.raises(ConfigError, match="min_ngram = 14: expected at most ngram = 13"):
        Decontaminator(evaluation=[questions], min_ngram=14)
    with pytest.raises(DataError, match="none of 3 texts has min_ngram = 50 words"):
        Decontaminator(evaluation=[questions], ngram=60, min_ngram=50).filter([OTHER])
