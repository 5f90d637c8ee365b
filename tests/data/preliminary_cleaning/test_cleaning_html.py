"""Recognising HTML, and the text that is extracted from it."""

from __future__ import annotations

import pytest

from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner

PAGE = """<!DOCTYPE html>
<html><head><title>Title</title><script>var x = 1;</script><style>p {color: red}</style></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/b">Products</a></li></ul></nav>
<article><h1>Cats &amp; dogs</h1><p>A <b>cat</b> is not a dog. It purrs &lt; it barks.</p>
<ul><li>one</li><li>two</li></ul>
<pre>def f():
    return 1</pre></article>
<footer>Imprint</footer></body></html>
"""
PROSE = "Cats & dogs\n\nA cat is not a dog. It purrs < it barks.\n\n"
CODE = "\ndef f():\n    return 1"


def test_a_page_becomes_its_visible_text():
    text = PreliminaryCleaner().clean(PAGE)

    assert text == f"  • Home\n  • Products\n\n{PROSE}  • one\n  • two{CODE}\nImprint"


def test_the_main_content_excludes_navigation():
    text = PreliminaryCleaner(html="main_content").clean(PAGE)

    assert PROSE in text
    assert CODE in text
    assert "Products" not in text
    assert "Imprint" not in text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ('  <div class="a">x<br/>y</div>\n', "x\ny"),
        ("<?xml version='1.0'?><!-- a - b --><html><body>x", "x"),
        ("<!doctype HTML>\ntext", "text"),
        ("<p>caf&Atilde;&copy; &eacute;</p>", "café é"),
        ("<p>&lt;p>&amp;lt;i>x&amp;lt;/i>&lt;/p></p>", "x"),
        ("\ufeff<p>x</p>", "x"),
        ("<p></p>", ""),
    ],
)
def test_pages_and_fragments_are_html(html, text):
    assert PreliminaryCleaner().clean(html) == text
    assert PreliminaryCleaner(html="keep").clean(html) != text


@pytest.mark.parametrize(
    "text",
    [
        "Write <p>text</p> to begin a paragraph.",
        "<p> begins a paragraph.",
        "<int> x = 1; y = <int>",
        "<rss><title>x</title></rss>",
        "x < y and y > z",
        "&lt;p&gt;not decoded&lt;/p&gt;",
    ],
)
def test_text_that_mentions_tags_is_not_html(text):
    assert PreliminaryCleaner().clean(text) == text


def test_deep_nesting_costs_neither_time_nor_memory():
    bullets = "<html>" + "<ul><li>" * 20_000 + "<li>x" * 20_000  # with indentation these would be 800 MB
    divs = "<html>" + "<div>" * 50_000 + "y"

    assert PreliminaryCleaner().clean(bullets).split() == ["x"] * 20_000
    assert PreliminaryCleaner(html="main_content").clean(divs) == "y"


def test_escapes_within_escapes_are_all_undone():
    text = "x"
    for _ in range(30):
        text = "<p>" + text.replace("&", "&amp;").replace("<", "&lt;") + "</p>"

    assert PreliminaryCleaner().clean(text) == "x"
