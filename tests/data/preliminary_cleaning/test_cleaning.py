"""Repairs of characters, encoding and white space change damaged text only, and are idempotent."""

from __future__ import annotations

import pickle
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner
from deepseek_v3.utils.errors import ConfigError

# Fragments that need one repair or, when joined, another. Every fragment that once broke the cleaner belongs here.
FRAGMENTS = [
    *"ab <>&;\n\t",
    *(
        "\r",
        "\r\n",
        "\x00",
        "\x0b",
        "\x1c",
        "\x85",
        "\x80",
        "\x9d",
        "\u2028",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
    ),
    *(
        "\u00ad",
        "\u200c",
        "\u200d",
        "\u202e",
        "\ufffe",
        "\U000e0067",
        "\U000e007f",
        "\U0001f3f4",
        "\U0001f680",
        "\ufe0f",
    ),
    *(
        "\u0301",
        "\u0303",
        "\u0327",
        "e",
        "A",
        "\u0344",
        "\u0958",
        "\ufb1d",
        "\u1100\u1161",
        "\u11a8",
        "\ufb01",
        "\ufdfa",
    ),
    *("\u0915", "\u094d", "\u0645", "\uff1c", "\uff06", "\ufe64", "´", "ª", "µ", "ƒ", "Œ", "œ", "\u0402", "√"),
    *("Ã", "Â", "©", "Ã©", "â€™", "â€\ufffd", "ï¼œ", "ï¼†", "í ½", "\u0432\u0402™", "Ð", "Ñ‚", "Ã ", "\ufffd"),
    *("<p>", "</p>", "<pre>", "<li>", "<ul>", "<br>", "<html>", "<!doctype html>", "<!--", "-->", "p>", "/p>"),
    *(
        "&lt;",
        "&gt;",
        "&amp;",
        "amp;",
        "lt;",
        "&lt;p&gt;",
        "&amp;lt;",
        "&eacute;",
        "&Atilde;&copy;",
        "&#195;&#169;",
    ),
    *("&#x200b;", "&#xff1c;", "&#xd800;", "&shy;", "&zwj;", "&nbsp;", "p&gt;"),
]
CLEANERS = [
    PreliminaryCleaner(),
    PreliminaryCleaner(unicode_form="NFKC", html="main_content", remove_bidi_controls=True),
    PreliminaryCleaner(html="keep", max_blank_lines=0),
    PreliminaryCleaner(repair_mojibake=False, max_blank_lines=2),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(lambda parts: f"<p>{''.join(parts)}</p>"),
    st.text(max_size=30),
)


def batch_of(*texts):
    ids = [str(number) for number in range(len(texts))]
    return record_batch(ids, texts, ["a.jsonl"] * len(texts), range(1, len(texts) + 1), [None] * len(texts))


@pytest.mark.parametrize("cleaner", CLEANERS)
@given(text=TEXTS)
@settings(deadline=None)
def test_cleaning_twice_is_cleaning_once(cleaner, text):
    once = cleaner.clean(text)

    assert cleaner.clean(once) == once


@pytest.mark.parametrize("cleaner", CLEANERS)
@given(texts=st.lists(TEXTS, max_size=5))
@settings(deadline=None)
def test_a_batch_is_cleaned_as_its_texts_are(cleaner, texts):
    result = cleaner.apply(batch_of(*texts))

    cleaned = [cleaner.clean(text) for text in texts]
    assert result.kept.column("text").to_pylist() == [text for text in cleaned if text]
    assert result.kept_rows.tolist() == [bool(text) for text in cleaned]
    assert result.dropped.column("reason").to_pylist() == ["empty"] * cleaned.count("")


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_string_becomes_text_that_utf_8_can_hold(text):
    CLEANERS[0].clean(text).encode()


@given(st.text(alphabet="abc XYZ.,;()0-9\n\t").map(lambda text: "a" + text.replace("\t\n", "\n") + "z"))
def test_plain_ascii_is_left_alone(text):
    text = "\n".join(line.rstrip() for line in text.split("\n")).replace("\n\n\n", "\n")
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")

    assert CLEANERS[0].clean(text) == text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\r\nb\rc\u2028d\u2029e\x0bf\x0cg\x1ch", "a\nb\nc\nd\ne\nf\ng\nh"),
        ("a\u00a0b\u2003c\u3000d", "a b c d"),
        ("a \t\nb", "a\nb"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("\n\n  def f():\n\treturn 1\n\n", "  def f():\n\treturn 1"),
        ("a\x00b\x07c\x7fd\ufdd0e\U0001ffff", "abcde"),
        ("\ufeffa\u200bb\u00adc\u2060d\ufeff", "abcd"),
        ("e\u0301 \u1100\u1161\u11a8", "é 각"),
        ("e\u200b\u0301", "é"),
        ("e" + "\u0301\u0327" * 50, "ȩ" + "\u0327" * 14 + "\u0301" * 15),
        ("ﬁ x² ①", "ﬁ x² ①"),
        ("right \u202eleft\u202c", "right \u202eleft\u202c"),
        ("Auf\u200clage, a\u200db", "Auflage, ab"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("\u0915\u094d\u200d\u0937 \u0d28\u0d4d\u200d", "\u0915\u094d\u200d\u0937 \u0d28\u0d4d\u200d"),
        ("👩🏽\u200d🚀 ❤\ufe0f\u200d🔥 🚀\u200d end", "👩🏽\u200d🚀 ❤\ufe0f\u200d🔥 🚀 end"),
        (
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f a\U000e0068\U000e0069b",
            "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f ab",
        ),
        ("\ud83d\ude80 \ud83d \ude80", "🚀 \ufffd \ufffd"),
        ("cafÃ© â€œquotedâ€\x9d itâ€™s", "café “quoted” it’s"),
        ("all right\nÐŸÑ€Ð¸Ð²ÐµÑ‚\nсъешь ещё", "all right\nПривет\nсъешь ещё"),
        ("ÃƒÂ© twice", "é twice"),
        ("one\x85 it\x92s", "one… it’s"),
        (" \n\t\u200b\ufeff", ""),
    ],
)
def test_damaged_text_is_repaired(dirty, clean):
    assert CLEANERS[0].clean(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "Größer als „Übermut“ – naïve façade, señor; Þórður, œuvre, Łódź, Dvořák.",
        "Съешь ещё этих мягких французских булок, да выпей чаю.",
        "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
        "いろはにほへと、散りぬるを。 中文没有空格。",
        "if (a < b) { return &c; }  // 1 < 2 &lt; 3",
        "| a | b |\n|---|---|\n| 1 | 2 |",
    ],
)
def test_good_text_is_left_alone(text):
    assert CLEANERS[0].clean(text) == text


def test_each_option_changes_the_cleaning():
    assert PreliminaryCleaner(unicode_form="NFKC").clean("ﬁ x² Ａ") == "fi x2 A"
    assert PreliminaryCleaner(remove_bidi_controls=True).clean("a\u200eb\u202ec\u2069") == "abc"
    assert PreliminaryCleaner(max_blank_lines=0).clean("a\n\n\nb") == "a\nb"
    assert PreliminaryCleaner(max_blank_lines=3).clean("a" + "\n" * 9 + "b") == "a\n\n\n\nb"
    assert PreliminaryCleaner(repair_mojibake=False).clean("cafÃ© one\x85two\x92") == "cafÃ© one\ntwo"
    with pytest.raises(ConfigError, match="PreliminaryCleaner: unicode_form: found NFD"):
        PreliminaryCleaner(unicode_form="NFD")


def test_empty_documents_are_dropped_with_their_former_size():
    result = CLEANERS[0].apply(batch_of("kept", "\u200b \n", "", "also\r\nkept"))

    assert result.kept.column("text").to_pylist() == ["kept", "also\nkept"]
    assert result.dropped.to_pylist() == [
        {"id": id_, "source": "a.jsonl", "place": place, "stage": "preliminary_cleaning", "reason": "empty"}
        | {"figures": figures, "trigger": None}
        for id_, place, figures in (("1", 2, '{"characters":3}'), ("2", 3, '{"characters":0}'))
    ]


def test_hostile_text_takes_no_quadratic_time():
    for text in ("e" + "\u0327\u0301" * 10**6, "<!--" * 10**5, "<?xml " * 10**5, "Ã" * 10**5, "\n \t" * 10**5):
        CLEANERS[1].clean(text)


def test_clean_batches_pass_as_they_are():
    batch = batch_of("one\n\ntwo", "é “quoted” — done")

    assert CLEANERS[0].apply(batch).kept is batch
    assert CLEANERS[0].apply(batch.slice(0, 0)).kept.num_rows == 0


def test_the_filter_takes_lists_and_the_stage_pickles():
    cleaner = pickle.loads(pickle.dumps(PreliminaryCleaner()))

    assert cleaner.filter(["a \r\n", {"id": "x", "text": "cafÃ©"}]).documents == ["a", {"id": "x", "text": "café"}]
    assert unicodedata.is_normalized("NFC", cleaner.clean("e\u0301"))
