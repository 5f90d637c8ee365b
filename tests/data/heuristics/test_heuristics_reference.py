"""The reference rules against values computed by hand and limits from the papers."""

from __future__ import annotations

import pytest

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.data.heuristics import reference

DEFAULTS = HeuristicsConfig()
PROSE = (
    "The quick fox that lives with the badger ran to the end of the lane and back again.\n"
    "It was not tired, so it ran on until the sun was about to be gone behind the hill.\n"
    "Then it sat down to rest, and a small owl asked what all that running had been for?\n"
    '"You have to be of two minds," said the fox, "one that runs and one that wants to stop."\n'
    "The owl thought about this with half an eye open, and found nothing wrong with it.\n"
)


def codes(text, **options):
    return [broken.code for broken in reference.apply_rules(text, HeuristicsConfig(**options))[0]]


def found(broken, code):
    return {rule.code: rule.found for rule in broken}[code]


def test_default_limits_are_those_of_gopher_table_a1():
    assert DEFAULTS.max_duplicate_lines == DEFAULTS.max_duplicate_paragraphs == 0.30
    assert DEFAULTS.max_duplicate_line_characters == DEFAULTS.max_duplicate_paragraph_characters == 0.20
    assert DEFAULTS.max_top_ngram_characters == {2: 0.20, 3: 0.18, 4: 0.16}
    assert DEFAULTS.max_duplicate_ngram_characters == {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def test_prose_breaks_no_rule_and_keeps_its_lines():
    assert reference.apply_rules(PROSE, DEFAULTS) == ([], PROSE)


def test_repeated_lines_and_paragraphs():
    text = "one\ntwo\n\none\ntwo\n\nthree"
    broken = list(reference.gopher_repetition(text, DEFAULTS))

    assert found(broken, "gopher_duplicate_paragraphs") == 1 / 3
    assert found(broken, "gopher_duplicate_paragraph_characters") == 7 / 23
    assert found(broken, "gopher_duplicate_lines") == 2 / 5
    assert found(broken, "gopher_duplicate_line_characters") == 6 / 23


def test_the_top_ngram_is_counted_with_its_spaces():
    assert reference.top_ngram("a b a b c".split(), 2) == ("a b", 2)
    assert reference.top_ngram("a b c".split(), 2) == ("", 0)
    assert reference.top_ngram(["a"], 2) == ("", 0)


def test_short_text_does_not_repeat_what_it_says_once():
    poem = "Shall winter's unrelenting\nnorthern thunderstorms\n\ndisturb our hibernation?\n"
    mail = "".join(f"> line {number} of the letter\n>\n" for number in range(9))

    assert not [*reference.gopher_repetition(poem, DEFAULTS)]
    assert not [rule for rule in reference.gopher_repetition(mail, DEFAULTS) if "lines" in rule.code]


def test_duplicate_ngrams_do_not_overlap():
    assert reference.duplicate_ngrams("a b c x a b c".split(), 2) == [("a", "b")]
    assert reference.duplicate_ngrams("a b c d x a b c d".split(), 2) == [("a", "b"), ("c", "d")]
    assert reference.duplicate_ngrams("a a a a".split(), 2) == [("a", "a")]
    assert reference.duplicate_ngrams("a b c".split(), 5) == []


@pytest.mark.parametrize(
    ("text", "code", "figure"),
    [
        ("ten of the words", "gopher_too_few_words", 4),
        ("a b c, d", "gopher_short_words", 1.0),
        ("extraordinarily incomprehensible", "gopher_long_words", 15.5),
        ("# a # b", "gopher_hashes", 0.5),
        ("so … it ... goes", "gopher_ellipses", 0.4),
        ("• a\n - b\n\nc", "gopher_bullet_lines", 0.5),
        ("a...\nb…\nc", "gopher_ellipsis_lines", 2 / 3),
        ("a 1 2 3", "gopher_few_alphabetic_words", 0.25),
        ("The of of", "gopher_few_stop_words", 1),
    ],
)
def test_gopher_quality(text, code, figure):
    strict = HeuristicsConfig(min_words=100, max_bullet_lines=0.1, max_mean_word_length=9.0)

    assert found(list(reference.gopher_quality(text, strict)), code) == figure


def test_gopher_has_an_upper_limit_too():
    assert "gopher_too_many_words" in codes("word " * 11, max_words=10)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("A whole sentence.", "A whole sentence."),
        ("  Is it indented?  ", "Is it indented?"),
        ('He said "so".', 'He said "so".'),
        ("As shown before [1][edit] and after.[citation needed]", "As shown before  and after."),
        ("As shown before [12] here[citation needed].", "As shown before  here."),
        ("No end mark", None),
        ("It trails off...", None),
        ("Too short.", None),
        ("Turn on JavaScript to read.", None),
        ("See our Privacy Policy for more.", None),
        ("This site uses cookies always.", None),
        (f"One word {'x' * 1001} too long.", None),
    ],
)
def test_c4_removes_lines(line, kept):
    as_published = HeuristicsConfig(min_sentences=0, require_final_punctuation=True)

    assert reference.c4(line, as_published) == ([], [[kept]])


def test_c4_drops_documents():
    assert codes(PROSE + "Lorem Ipsum dolor sit.", rules=("c4",)) == ["c4_lorem_ipsum"]
    assert codes(PROSE + "int main() { return 0; }.", rules=("c4",)) == ["c4_curly_bracket"]
    assert codes("Now there are. Just three. Of these.", rules=("c4",)) == ["c4_too_few_sentences"]
    assert codes(PROSE + "\nlorem ipsum {", rules=("c4",), require_final_punctuation=True) == []


@pytest.mark.parametrize(
    "line",
    [
        "他说：“今天下雨。”",
        "彼は家に帰った。",
        "「そうですか？」",
        "यह एक वाक्य है।",
        "Սա մի նախադասություն է։",
        "هل هذه جملة كاملة؟",
        "یہ ایک جملہ ہے۔",
        "ይህ ዓረፍተ ነገር ነው።",
        "នេះជាប្រយោគមួយ។",
        "ဒါက ဝါကျတစ်ကြောင်းပါ။",
        "འདི་ནི་ཚིག་གྲུབ་ཅིག་ཡིན།",
        "นี่คือประโยคหนึ่ง",
        "ນີ້ແມ່ນປະໂຫຍກຫນຶ່ງ",
        "Er sagte: »So ist es.«",
        "It ends (in brackets).",
    ],
)
def test_c4_knows_the_sentences_of_all_scripts(line):
    strict = HeuristicsConfig(min_sentences=0, require_final_punctuation=True)

    assert reference.c4(line, strict) == ([], [[line]])


WRAPPED = (
    "A paragraph that an editor has wrapped at fifty columns\nor so has lines that begin and end anywhere, and a\n"
    "short line at its end that is no line of its\nown.\n\n"
    "  Heading\n\n"
    "- an item of the list that follows it and that goes on\n"
    "- another item of that list which also goes on and on\n"
)


def test_the_lines_of_a_wrapped_paragraph_are_one_line():
    assert [len(group) for group in reference.unwrapped_lines(WRAPPED)] == [4, 1, 1, 1]
    assert [len(group) for group in reference.unwrapped_lines(WRAPPED, join=False)] == [1] * 7
    assert [len(group) for group in reference.unwrapped_lines("x" * 200 + "\n" + "x" * 200)] == [1, 1]


def test_c4_keeps_wrapped_text_as_it_is():
    options = {"rules": ("c4",), "min_sentences": 0}

    assert reference.apply_rules(WRAPPED, HeuristicsConfig(**options, min_words_per_line=1)) == ([], WRAPPED)
    without = WRAPPED.replace("  Heading\n\n", "").strip()
    assert reference.apply_rules(WRAPPED, HeuristicsConfig(**options)) == ([], without)
    assert reference.apply_rules(WRAPPED, HeuristicsConfig(**options, require_final_punctuation=True)) == (
        [],
        WRAPPED.split("\n\n")[0],
    )


def test_c4_keeps_indentation_and_blank_lines():
    text = "One line of four.\n\n    Its indented code here\n\nMenu\n\nThe end of it."

    assert reference.apply_rules(text, HeuristicsConfig(rules=("c4",), min_sentences=0)) == (
        [],
        text.replace("Menu\n\n", ""),
    )


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("彼は家に帰った。「疲れた！」と言った。", 2),
        ("今天下雨。我们不去了。为什么？因为下雨。", 4),
        ("यह एक है। यह दो है।", 2),
        ("One sentence.", 1),
        ("Two. Sentences!", 2),
        ('He said "no." Then (why?) he left.', 3),
        ("Mr. Smith paid 3.5 dollars, e.g. by card...", 1),
        ("no end", 1),
        (". then it begins", 2),
    ],
)
def test_sentences(line, count):
    assert reference.sentences(line) == count


@pytest.mark.parametrize(
    ("lines", "code", "figure"),
    [
        (["a", "b.", "", "c"], "fineweb_unpunctuated_lines", 1 / 3),
        (["short", "x" * 31], "fineweb_short_lines", 1 / 2),
        (["same", "same", "12"], "fineweb_repeated_lines", 0.4),
        (["a b", "c d"], "fineweb_newlines", 0.25),
    ],
)
def test_fineweb(lines, code, figure):
    strict = HeuristicsConfig(min_punctuated_lines=1.0, max_short_lines=0.0, max_newlines_per_word=0.0)

    groups = reference.unwrapped_lines("\n".join(lines))
    assert found(list(reference.fineweb(groups, len(lines) - 1, strict)), code) == figure


def test_blank_documents_break_rules_without_dividing_by_zero():
    assert codes("") == codes(" \n\n ") != []
    assert codes("", rules=("fineweb",)) == ["fineweb_unpunctuated_lines"]


def test_a_rule_without_a_limit_is_off():
    assert codes("few words", rules=("gopher_quality",), min_words=None, min_stop_words=None) == []
