"""Duplicates for the report: the sizes of their clusters, and pairs of documents with the differences marked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from deepseek_v3.charts.markup import Html, TableBody, TextRange, concat, element, html_table, passage
from deepseek_v3.charts.svg import bar
from deepseek_v3.data.report.overview import stage_title
from deepseek_v3.utils.text import format_figure, format_integer, humanize, truncate

# Scripts without spaces between words are compared character by character.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+|[^\w\s]")
_SHOWN = 10  # examples of each stage
_CHARACTERS = 1200  # shown of each text of an example
_NAME_CHARACTERS = 160


def duplicates_section(stats: dict[str, Any]) -> Html:
    """The figures and examples of each stage that compared documents."""
    parts = [_stage(stage["name"], stage["figures"]) for stage in stats.get("stages", []) if _compares(stage)]
    return concat(parts) if parts else element("p", "No stage compared documents.")


def _compares(stage: dict[str, Any]) -> bool:
    return bool({"clusters", "cluster_sizes", "sizes", "examples"} & stage.get("figures", {}).keys())


def _stage(name: str, figures: dict[str, Any]) -> Html:
    facts = [
        element("div", element("dt", humanize(key)), element("dd", format_figure(value)))
        for key, value in sorted(figures.items())
        if isinstance(value, (int, float, str))
    ]
    sizes = figures.get("cluster_sizes", figures.get("sizes"))
    parts = [element("h3", stage_title(name)), element("dl", *facts, class_="facts") if facts else ""]
    if sizes:
        parts.append(_sizes(sizes))
    examples = [example for example in figures.get("examples", []) if len(example.get("documents", [])) == 2]
    if examples:
        parts.append(element("p", "Words that the other document lacks are marked.", class_="note"))
        parts += [_example(example) for example in examples[:_SHOWN]]
    return concat(parts)


def _sizes(sizes: dict[str, int]) -> Html:
    """Clusters by number of documents, in ranges that double. A key is a size, or a range such as "4-7"."""
    ranges: Counter[int] = Counter()
    for size, clusters in sizes.items():
        ranges[int(size.split("-")[0]).bit_length()] += clusters
    most = max(ranges.values())
    rows = [
        (
            f"{2 ** (bits - 1):,} – {2**bits - 1:,}",
            bar(("after", ranges[bits] / most)),
            format_integer(ranges[bits]),
        )
        for bits in sorted(ranges)
    ]
    return html_table("Clusters by size", ["documents in a cluster", "", "clusters"], TableBody(rows))


def _example(example: dict[str, Any]) -> Html:
    """Two documents side by side. A document of a previous run has no text to compare."""
    documents = example["documents"]
    texts = [document.get("text") for document in documents]
    known = None not in texts
    shown = [(text or "")[:_CHARACTERS] for text in texts]
    marked = differences(*shown) if known else ([], [])
    columns = [_document(*column) for column in zip(documents, shown, marked, strict=True)]
    equal = known and not any(marked)
    return element(
        "details",
        element("summary", f"similarity {format_figure(example.get('similarity'))}"),
        element("div", *columns, class_="pair"),
        element("p", "The parts shown do not differ in any word.", class_="note") if equal else "",
        class_="samples",
        open="open" if known else None,
    )


def _document(document: dict[str, Any], text: str, marked: list[TextRange]) -> Html:
    name = element("bdi", truncate(str(document.get("id", "")), _NAME_CHARACTERS))
    lost = document.get("text") is None
    shown = (
        element("p", "This document is from a previous run, which kept no texts.")
        if lost
        else passage(text, marked)
    )
    return element("article", element("p", "id ", name, class_="origin"), shown, class_="sample")


def differences(one: str, other: str) -> tuple[list[TextRange], list[TextRange]]:
    """The ranges of words in each text that the other one lacks, apart from white space."""
    words = [[match.span() for match in _WORD.finditer(text)] for text in (one, other)]
    matcher = SequenceMatcher(
        None,
        [one[start:stop] for start, stop in words[0]],
        [other[start:stop] for start, stop in words[1]],
        autojunk=False,
    )
    spans: tuple[list[TextRange], list[TextRange]] = ([], [])
    for kind, first, last, other_first, other_last in matcher.get_opcodes():
        if kind != "equal":
            spans[0].extend(_extent(words[0][first:last]))
            spans[1].extend(_extent(words[1][other_first:other_last]))
    return spans


def occurrences(text: str, trigger: str) -> list[TextRange]:
    """The ranges of the trigger's words in the text, ignoring letter case and the white space between them."""
    words = trigger.split()
    if not words:
        return []
    phrase = r"\s*".join(map(re.escape, words))
    pattern = re.compile(f"(?:{phrase})+", re.IGNORECASE)
    return [match.span() for match in pattern.finditer(text)]


def _extent(spans: Sequence[TextRange]) -> list[TextRange]:
    return [(spans[0][0], spans[-1][1])] if spans else []
