"""The batch filter gives the same values as the reference for any text."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import get_args

import numpy as np
import orjson
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.heuristics import HeuristicFilter, gopher_repetition, ragged, reference
from deepseek_v3.data.heuristics.filter import apply_rules
from deepseek_v3.data.heuristics.text_table import build_text_table
from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.utils.errors import ConfigError
from helpers.documents import batch_of

# Limits that any text breaks, so that every value can be compared.
STRICT = {
    **{
        name: 0.0
        for name, field in HeuristicsConfig.model_fields.items()
        if name.startswith("max_") and "ngram" not in name and name != "max_drop_warning"
    },
    "max_words": 0,
    "max_word_length": 9,
    "max_top_ngram_characters": {1: 0.0, 2: 0.0, 3: 0.0, 12: 0.0},
    "max_duplicate_ngram_characters": {2: 0.0, 3: 0.0, 5: 0.0},
    "min_words": 10**6,
    "min_mean_word_length": 10.0**6,
    "min_alphabetic_words": 1.0,
    "min_stop_words": 100,
    "min_punctuated_lines": 1.0,
    "min_sentences": 0,
}
LENIENT = {"min_words": 2, "min_sentences": 1, "max_newlines_per_word": 1.0}
FRAGMENTS = [
    *"the of and a b c word don't it's 3 4.5 e.g. x-y incomprehensible 中文".split(),
    *". ? ! ... … \" ' # • - ( ] [1] [edit] { JavaScript 😀 é".split(),
    *("\n", "\n", "\n\n", "\n \n", "\n\n\n", "\t", "\u00a0", "\u2028", "\r"),
    *("lorem ipsum", "terms of use", "use cookies"),
    *(
        "いろは。にほへと",
        "ქართული ენა",
        "это не как",
        "を た が",
        "ไทย",
        "」",
        "།",
        "क।",
        "Lines of a paragraph that was wrapped.\n",
        "- which is an item\n",
    ),
    *("The end.\n", "of the end. And then?\n", "a b c d e f g ", "same line here.\n", "• item\n"),
]
TEXTS = st.lists(
    st.one_of(
        st.lists(st.sampled_from(FRAGMENTS), max_size=40).map(" ".join),
        st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join),
        st.text(max_size=20),
    ),
    max_size=6,
)


@pytest.mark.parametrize(
    "options",
    [
        HeuristicsConfig(**STRICT),
        HeuristicsConfig(**STRICT | {"remove_citations": False, "join_wrapped_lines": False}),
        HeuristicsConfig(**STRICT | {"require_final_punctuation": True}),
        HeuristicsConfig(**STRICT | {"rules": ("gopher_quality", "fineweb"), "max_words": None}),
        HeuristicsConfig(rules=("gopher_quality",), min_words=0, min_stop_words=2, stop_words=("a", "不", "b")),
        HeuristicsConfig(rules=("gopher_quality",), min_words=0, min_stop_words=3, min_mean_word_length=0.0),
        HeuristicsConfig(**LENIENT),
        HeuristicsConfig(rules=("c4",), min_words_per_line=None, max_word_length=None, remove_policy_lines=False),
        HeuristicsConfig(rules=("c4", "fineweb"), drop_lorem_ipsum=False, drop_curly_brackets=False),
        HeuristicsConfig(rules=("c4",), min_sentences=0, remove_javascript_lines=False),
    ],
)
@given(texts=TEXTS)
@settings(max_examples=50, deadline=None)
def test_values_and_lines_equal_the_reference(options, texts):
    table = build_text_table(pa.array(texts, pa.string()), options)
    results, kept = apply_rules(table, options)

    left = texts if kept is None else kept.texts(table, np.ones(len(texts), np.bool_)).to_pylist()
    for number, text in enumerate(texts):
        broken, shown = reference.apply_rules(text, options)
        found = [
            (rule.code, rule.found[number], rule.limit, rule.trigger(number))
            for rule in results
            if rule.broken[number]
        ]
        assert found == broken
        if not broken and kept is not None:
            assert left[number] == shown


THRESHOLDS = [
    name for name, field in HeuristicsConfig.model_fields.items() if type(None) in get_args(field.annotation)
]
OF_CODE = {"max_code_line", "max_mean_code_line", "min_code_alphanumeric", "max_encoded_data"}
OF_LINES = {"min_words_per_line", "max_word_length"}  # these remove lines and drop no document


def rules_of(texts, **options):
    config = HeuristicsConfig(**options)
    return apply_rules(build_text_table(pa.array(texts, pa.string()), config), config)[0]


def codes(texts, **options):
    return {rule.code for rule in rules_of(texts, **options)}


@pytest.mark.parametrize("name", [name for name in THRESHOLDS if name not in OF_LINES | OF_CODE])
def test_a_null_limit_disables_a_rule(name):
    texts = ["one two three four five. " * 20, "# a\n- b ...\n\n" * 9]
    assert codes(texts, **STRICT) - codes(texts, **STRICT | {name: None})


def test_no_rule_applies_if_every_limit_is_null():
    switches = {name for name, field in HeuristicsConfig.model_fields.items() if field.annotation is bool}
    off = {**dict.fromkeys(THRESHOLDS), **dict.fromkeys(switches, False)}
    texts = ["", "a a a a a a a a", "{ lorem ipsum javascript\n" * 9, "- b ..." * 40]
    assert len(THRESHOLDS) == 26
    assert not any(rule.broken.any() for rule in rules_of(texts, **off))
    for text in texts:
        assert reference.apply_rules(text, HeuristicsConfig(**off))[0] == []


def test_real_text_gives_the_results_of_the_reference():
    texts = [document.text[:20_000] for document in stdlib_documents()][:60]
    texts += [part for text in texts[:10] for part in text.split("\n\n")]
    rules = ("gopher_repetition", "gopher_quality", "c4", "fineweb")
    options = HeuristicsConfig(rules=rules, min_alphabetic_words=0.5, drop_curly_brackets=False, min_sentences=2)
    result = HeuristicFilter(**options.model_dump()).apply(batch_of(texts))

    expected = [reference.apply_rules(text, options) for text in texts]
    assert result.kept.column("text").to_pylist() == [text for broken, text in expected if not broken]
    assert [*zip(result.dropped["reason"].to_pylist(), result.dropped["figures"].to_pylist(), strict=True)] == [
        (
            first.code,
            orjson.dumps(
                {"found": first.found, "limit": first.limit, "also": [other.code for other in others]}
            ).decode(),
        )
        for (first, *others) in [broken for broken, _ in expected if broken]
    ]


def test_the_first_broken_rule_is_the_reason():
    text = "same line of words\n" * 4 + "another line"
    dropped = HeuristicFilter(rules=["fineweb", "gopher_repetition"]).apply(batch_of([text])).dropped.to_pylist()[0]
    figures = orjson.loads(dropped["figures"])

    assert dropped["stage"] == "heuristic_filters"
    assert dropped["reason"] == "gopher_duplicate_lines"
    assert dropped["trigger"] == "same line of words"
    assert (figures["found"], figures["limit"]) == (0.6, 0.3)
    assert figures["also"][0] == "gopher_duplicate_line_characters"
    assert figures["also"][-1] == "fineweb_repeated_lines"


@pytest.mark.parametrize(
    ("text", "reason", "trigger"),
    [
        ("x y\n\nx y\n\nz", "gopher_duplicate_paragraphs", "x y"),
        ("red ox blue cat red ox", "gopher_top_2gram", "red ox"),
        ("1 2 3 4 5 6 1 2 3 4 5 6", "gopher_duplicate_5grams", "1 2 3 4 5"),
        ("A sentence of four words { here.", "c4_curly_bracket", "A sentence of four words { here."),
        ("It says lorem Ipsum here.", "c4_lorem_ipsum", "It says lorem Ipsum here."),
    ],
)
def test_triggers_of_heuristic_rules(text, reason, trigger):
    only_last = {"max_top_ngram_characters": {2: 0.3} if "top" in reason else {}}
    dropped = (
        HeuristicFilter(rules=["gopher_repetition", "c4"], **only_last).apply(batch_of([text])).dropped.to_pylist()
    )

    assert (dropped[0]["reason"], dropped[0]["trigger"]) == (reason, trigger)


def test_c4_removes_lines_of_kept_documents():
    result = HeuristicFilter(rules=["c4"], min_sentences=1).apply(
        batch_of(["  Home\nThis is kept [2] here.\n\nMore", "x"])
    )

    assert result.kept.column("text").to_pylist() == ["This is kept  here."]
    assert result.kept_rows.tolist() == [True, False]


def test_empty_batches_texts_and_rules():
    assert HeuristicFilter().apply(batch_of([])).kept.num_rows == 0
    assert HeuristicFilter().apply(batch_of(["", " \n "])).kept.num_rows == 0
    off = dict.fromkeys(["max_short_lines", "max_repeated_line_characters", "max_newlines_per_word"])
    batch = batch_of(["", "word"])
    assert HeuristicFilter(rules=["fineweb"], min_punctuated_lines=None, **off).apply(batch).kept is batch


def test_results_do_not_depend_on_the_batch():
    texts = [document.text[:3000] for document in stdlib_documents()][:30]
    batch = batch_of(texts)
    whole = HeuristicFilter().apply(batch)
    parts = [HeuristicFilter().apply(batch.slice(first, last - first)) for first, last in pairwise([0, 1, 11, 30])]

    assert pa.Table.from_batches([part.dropped for part in parts]) == pa.Table.from_batches([whole.dropped])


def test_heuristic_options_and_pickle():
    stage = pickle.loads(
        pickle.dumps(HeuristicFilter(max_top_ngram_characters={3: 0.5}, stop_words=["der", "die"]))
    )

    assert stage.options.max_top_ngram_characters == {3: 0.5}
    assert stage.filter(["too short"]).stats["reasons"] == {"gopher_too_few_words": 1}
    with pytest.raises(ConfigError, match=r"HeuristicFilter: max_lines"):
        HeuristicFilter(max_lines=3)
    with pytest.raises(ConfigError, match="names a group twice"):
        HeuristicFilter(rules=["c4", "c4"])


@given(st.lists(st.integers(0, 5)), st.sampled_from([1, 2**40, 2**60]))
def test_first_occurrences_of_small_and_large_keys(numbers, scale):
    keys = np.array(numbers, np.int64) * scale

    assert ragged.first_occurrences(keys).tolist() == [numbers.index(number) for number in numbers]


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4), st.integers(1, 4))
def test_repeated_ngrams_against_brute_force(documents, n):
    words = np.array([word for document in documents for word in document], np.int64)
    starts = ragged.prefix_sums(np.array([len(document) for document in documents], np.int64))
    *_, repeated = gopher_repetition.repeated_ngrams(words, starts, n)

    expected = []
    for document, start in zip(documents, starts.tolist(), strict=False):
        grams = [tuple(document[i : i + n]) for i in range(len(document) - n + 1)]
        expected += [
            (start + i, start + grams.index(gram)) for i, gram in enumerate(grams) if grams.count(gram) > 1
        ]
    assert [*zip(repeated.positions.tolist(), repeated.first.tolist(), strict=True)] == expected
