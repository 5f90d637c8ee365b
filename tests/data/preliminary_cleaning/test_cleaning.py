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


@pytest.mark.parametrize(
    "text",
    [
        "\u1797\u17b6\u179f\u17b6\u200b\u1781\u17d2\u1798\u17c2\u179a",  # Khmer
        "\u0e20\u0e32\u0e29\u0e32\u200b\u0e44\u0e17\u0e22",  # Thai
        "\u1019\u103c\u1014\u103a\u200b\u1019\u102c",  # Burmese
        "\u0e9e\u0eb2\u0eaa\u0eb2\u200b\u0ea5\u0eb2\u0ea7",  # Lao
        "\u0f56\u0f7c\u0f51\u0f0b\u200b\u0f66\u0f90\u0f51",  # Tibetan
        "\ua9a4\ua9b8\u200b\ua9ad",  # Javanese
        "\ua9a4\ua9c0\u200d\ua9ad \ua9a4\ua9c0\u200c\ua9ad",  # Javanese
        "\U00011013\U00011046\u200d\U00011022 \U00011013\U00011046\u200c\U00011022",  # Brahmi
        "\u1b13\u1b44\u200c\u1b13",  # Balinese
        "\U0001e900\u200d\U0001e922",  # Adlam
        "\U00011383\U000113b8\u200c\U00011383",  # Tulu-Tigalari
        "\u0f40\u0f90\u200c\u0f40",  # Tibetan
    ],
)
def test_marks_without_width_stay_in_scripts_that_need_them(text):
    assert CLEANERS[0].clean(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("\x1b[31mred\x1b[0m, \x1b[1;38;5;208mbold\x1b[m", "red, bold"),
        ("\x1b]0;title\x07text \x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "text link"),
        ("\x1b[2J\x1b[?25l\x1b[10;20Hhere\x1b[K", "here"),
        ("\x1b(Bplain\x1b7 \x1b8\x1b=\x1bM.", "plain ."),
        ("\x1bP1$r0m\x1b\\status", "status"),
        ("N\bNA\bAM\bME\bE _\bw_\bo_\br_\bd", "NAME word"),
        ("ESC alone: \x1b. [31m stays", "ESC alone: . [31m stays"),
    ],
)
def test_terminal_escapes_go_as_a_whole(dirty, clean):
    assert CLEANERS[0].clean(dirty) == clean
    assert PreliminaryCleaner().clean(dirty, "code") == clean


CODE = """import re


def f(text):
    \"\"\"Compares e\u0301 with a no-break\u00a0space.\"\"\"
    if text == "cafÃ©\u200b\u2028":
        return [1,



                2]


class A:
\tx = "\ufb01"
"""


@pytest.mark.parametrize(
    ("source", "metadata"),
    [
        ("a.py", None),
        ("x/a.cpp.zst", None),
        ("a.jsonl", '{"path":"lib/a.rs"}'),
        ("a.parquet", None),
        ("Makefile", None),
    ],
)
def test_code_keeps_its_characters_and_blank_lines(source, metadata):
    dirty = "\ufeff\n" + CODE.replace("return", "return\x00").replace("\n", " \t\r\n")
    batch = record_batch(["a"], [dirty], [source], [1], [metadata])

    assert CLEANERS[1].apply(batch).kept.column("text").to_pylist() == [CODE.rstrip("\n")]


def test_fenced_code_keeps_its_blank_lines():
    text = "Use\n\n\n\n```python\nimport a\n\n\n\nprint(a)\n```\n\n\n\nEnd"

    assert CLEANERS[0].clean(text) == "Use\n\n```python\nimport a\n\n\n\nprint(a)\n```\n\nEnd"


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
