"""Wikitext becomes what a reader sees, in time that grows with the text alone."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.data.formats.wikitext import WikitextCleaner

PAGE = """\
{{Infobox person|name=[[Ada]]|x={{nested|a|{{b}}}}}}
'''Ada Lovelace''' ({{IPAc-en|x}}; 10 December 1815{{snd}}1852) was an English [[mathematician]] and
[[writer|author]]s,<ref name="a">{{cite book|title=X}}</ref><ref name="b" /> known for ''her'' work.

[[File:Ada.jpg|thumb|left|A [[portrait]] of {{nowrap|Ada B}}]]
== Life ==
<!-- hidden -->
She walked {{convert|5|km|mi}} to [http://example.org the ''house''].
* item one
# numbered
: indented
=== Empty ===
{{main|Other}}
== Table ==
{| class="wikitable"
! a !! b
|-
| 1 || {{x}}
{| nested
| q
|}
|}

== See also ==
{{reflist}}
[[Category:Mathematicians]] __NOTOC__
"""
TEXT = """\
Ada Lovelace (10 December 1815 – 1852) was an English mathematician and
authors, known for her work.

Life

She walked 5 km to the house.
- item one
- numbered
indented"""


def text_of(wikitext: str, *names: str) -> str:
    return WikitextCleaner(names).to_text(wikitext)


def test_a_page_is_what_a_reader_sees() -> None:
    assert text_of(PAGE) == TEXT


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("[[a]] [[b|c]]s [[:Category:d]] [[e:f|]]", "a cs Category:d e:f"),
        ("x [[Datei:a.png|mini|[[b]] c]] [[Kategorie:d]] y", "x y"),
        ("[[de:Seite]] [[Re:Zero]] [[wikt:word|word]]", "Re:Zero word"),
        ("{{lang|de|Straße}} {{unknown|a}} {{nowrap|1=a|b}}", "Straße b"),
        ("H<sub>2</sub>O, 10<sup>6</sup>, a<br>b<br />\nc <b>d</b> <references/>", "H_2O, 10^6, a\nb\nc d"),
        ("<code>a[[0]] = '''x'''</code> <nowiki>[[a]] {{b}}</nowiki>", "a[[0]] = '''x''' [[a]] {{b}}"),
        (r"<math>\frac{{a}}{b} < c</math>, <math display=block> x </math>", r"$\frac{{a}}{b} < c$, $x$"),
        ("<pre>\ndef f():\n    return {{x}}\n\n# y\n</pre>", "def f():\n    return {{x}}\n\n# y"),
        ("&lt;b&gt; &amp;amp; &ndash;", "<b> &amp; –"),
        ("a\n----\nb", "a\n\nb"),
        ("= A =\n== B ==\n=== C ===\nx\n== D ==", "A\n\nB\n\nC\n\nx"),
        ("[http://x.org] [https://x.org label] http://y.org [no link]", "label http://y.org [no link]"),
        ("before {{never closed [[a|b]] after", "before never closed b after"),
        ("a }} b ]] c", "a }} b ]] c"),
        ("<ref>never closed [[a]]", "never closed a"),
        ("{| class=x\n|-\n| lost table\nrest", "class=x\n\nrest"),
        ("x <!-- never closed", "x"),
        ("{{a|[[b}} c", "c"),
        ("", ""),
    ],
)
def test_markup_becomes_text(wikitext: str, text: str) -> None:
    assert text_of(wikitext, "Datei", "Kategorie") == text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["[[", "]]", "{{", "}}", "{|", "|}", "\n", "|", "a", "<ref>", "</ref>", "==", "'"]))
)
def test_no_markup_is_too_odd(parts: list[str]) -> None:
    text = text_of("".join(parts))
    assert text.count("a") <= parts.count("a")


HOSTILE = [
    "[[",
    "{{",
    "{|\n",
    "[[a|",
    "<ref>",
    "<nowiki>",
    "[http://a ",
    "<!--",
    "== a ==\n",
    "( ",
    "''",
    "{{a|[[b",
    "<sup>",
]


@pytest.mark.parametrize("part", HOSTILE)
def test_time_grows_with_the_text_alone(part: str) -> None:
    begin = time.process_time()
    text_of(part * 20_000)
    assert time.process_time() - begin < 2
