"""Recognising HTML, and the text that is extracted from it."""

from __future__ import annotations

import pytest

from deepseek_v3.data.documents import record_batch
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


VUE = """<script setup>
defineProps({ open: Boolean })
</script>

<template>
  <div :class="{ open }" @click="toggle"><slot /></div>
</template>

<style scoped>
.open { color: red }
</style>
"""
SVELTE = """<div class="list">
  {#each items as item}
    <p on:click={() => pick(item)}>{item.name}</p>
  {/each}
</div>
"""
README = """<p align="center"><img src="logo.svg"></p>

## Use

```html
<ul><li>one</li></ul>
```

<p>End</p>
"""
CODE_THAT_BEGINS_WITH_A_TAG = [
    VUE,
    SVELTE,
    README,
    '<div className="a">{items.map((item) => <Item key={item} />)}</div>',
    "<p>{{ user.name }}</p>",
    "<ul>{% for item in items %}<li>{{ item }}</li>{% endfor %}</ul>",
    "<table><% rows.each do |row| %><tr><td><%= row %></td></tr><% end %></table>",
    "<div><?php echo $title; ?></div>",
    '<section id="a"><title>Use</title><para>Call it.</para></section>',
    '<div *ngIf="open" (click)="close()">x</div>',
    "<script>\nlet count = 0;\n</script>\n\n<button>{count}</button>",
    "<p>text</p>\n\nSee [the guide](guide.md).\n\n<p>end</p>",
]


def cleaned(text, source="a.jsonl", metadata=None):
    batch = record_batch(["a"], [text], [source], [1], [metadata])
    return PreliminaryCleaner().apply(batch).kept.column("text").to_pylist()


@pytest.mark.parametrize("text", CODE_THAT_BEGINS_WITH_A_TAG)
def test_code_that_begins_with_a_tag_is_not_html(text):
    assert PreliminaryCleaner().clean(text) == text.rstrip()


@pytest.mark.parametrize("suffix", ["vue", "svelte", "md", "mdx", "jsx", "tsx", "php", "rst", "js.gz", "py"])
def test_files_of_other_suffixes_are_never_html(suffix):
    plain = "<div class='a'><p>one</p></div>"

    assert cleaned(plain, f"src/a.{suffix}") == [plain]
    assert cleaned(PAGE, f"src/a.{suffix}") == [PAGE.strip()]
    assert cleaned(plain, "src/a.html") == cleaned(plain, "a.HTM.zst") == cleaned(plain, "a") == ["one"]


@pytest.mark.parametrize(
    ("metadata", "is_html"),
    [
        (None, True),
        ('{"content_type":"text/html; charset=utf-8"}', True),
        ('{"content_type":"application/xhtml+xml"}', True),
        ('{"content_type":"application/rss+xml"}', False),
        ('{"mime_type":"text/markdown"}', False),
        ('{"content_type":"image/svg+xml"}', False),
        ('{"path":"src/App.vue"}', False),
        ('{"max_stars_repo_path":"README.md"}', False),
        ('{"filename":"index.html"}', True),
        ('{"ext":"xml"}', False),
        ('{"content_type":7,"path":null}', True),
    ],
)
def test_records_say_whether_they_are_html(metadata, is_html):
    text = "<div><p>one</p></div>"

    assert cleaned(text, "web.warc.gz", metadata) == ["one" if is_html else text]


def test_html_by_its_own_account_needs_no_closing_tag():
    assert cleaned("<!-- made by hand -->\n<h1>Title</h1>\n<x-note>text</x-note> and more", "a.html") == [
        "Title\n\ntext and more"
    ]
    assert cleaned("{% extends base %}\n<p>x</p>", "a.html") == ["{% extends base %}\n<p>x</p>"]
    assert cleaned("<html><title>t</title><h1>&lt;a&gt;: The Anchor element</h1>", "a.html") == [
        "<a>: The Anchor element"
    ]


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>10<sup>6</sup> m<sup>-2</sup></p>", "10^6 m^-2"),
        ("<p>2<sup>n+1</sup>, x<sub>i</sub>, a<sub class='s'><i>ij</i></sub></p>", "2^{n+1}, x_i, a_{ij}"),
        ("<p>H<SUB>2</SUB>O</p>", "H_2O"),
        ("<p>the 1<sup>st</sup>, 2<sup>nd</sup>, Acme<sup>TM</sup></p>", "the 1st, 2nd, AcmeTM"),
        ("<p>as shown<sup><a href='#1'>[1]</a></sup>.</p>", "as shown[1]."),
    ],
)
def test_superscripts_and_subscripts_stay_distinct(html, text):
    assert PreliminaryCleaner().clean(html) == text
    assert PreliminaryCleaner(unicode_form="NFKC").clean(html) == text


def test_code_tables_and_lists_keep_their_form():
    code = "if a:\n    if b:\n        c()\n\n    d()"
    html = f"<ol><li>Run<pre><code>{code}</code></pre></li><li>Stop</li></ol><pre>  {code}</pre>"
    table = "<table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td>2</td></tr></table>"

    text = PreliminaryCleaner().clean(f"<div>{html}{table}</div>")

    assert f"\n{code}\n" in text
    assert f"\n  {code}\n" in text
    assert "1. Run\n" in text
    assert "2. Stop\n" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [["A", "B"], ["1", "2"]]
