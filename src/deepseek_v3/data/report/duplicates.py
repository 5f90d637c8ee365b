"""Documents that say the same: how large their clusters are, and pairs of them side by side."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deepseek_v3.data.report.charts import bar
from deepseek_v3.data.report.differences import differences
from deepseek_v3.data.report.markup import Body, Html, Span, element, joined, passage, shortened, table
from deepseek_v3.data.report.wording import count, figure, stage_title
from deepseek_v3.utils.printing import spelled

_SHOWN = 10  # examples of each stage
_CHARACTERS = 1200  # of each of their texts
_NAME_CHARACTERS = 160


def duplicates(stats: dict[str, Any]) -> Html:
    """Each stage that compared documents."""
    parts = [_stage(stage["name"], stage["figures"]) for stage in stats.get("stages", []) if _compares(stage)]
    return joined(parts) if parts else element("p", "No stage looked for copies.")


def _compares(stage: dict[str, Any]) -> bool:
    return bool({"clusters", "cluster_sizes", "sizes", "examples"} & stage.get("figures", {}).keys())


def _stage(name: str, figures: dict[str, Any]) -> Html:
    facts = [
        element("div", element("dt", spelled(key)), element("dd", figure(value)))
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
    return joined(parts)


def _sizes(sizes: dict[str, int]) -> Html:
    """Clusters by the documents in them, in ranges that double; a key is a size, or a range such as "4-7"."""
    ranges: Counter[int] = Counter()
    for size, clusters in sizes.items():
        ranges[int(size.split("-")[0]).bit_length()] += clusters
    most = max(ranges.values())
    rows = [
        (
            f"{count(2 ** (bits - 1))} – {count(2**bits - 1)}",
            bar(("after", ranges[bits] / most)),
            count(ranges[bits]),
        )
        for bits in sorted(ranges)
    ]
    return table("Clusters by size", ["documents in a cluster", "", "clusters"], Body(rows))


def _example(example: dict[str, Any]) -> Html:
    """Two documents side by side; of an earlier run's there is no text to compare with."""
    documents = example["documents"]
    texts = [document.get("text") for document in documents]
    known = None not in texts
    shown = [(text or "")[:_CHARACTERS] for text in texts]
    marked = differences(*shown) if known else ([], [])
    columns = [_document(*column) for column in zip(documents, shown, marked, strict=True)]
    equal = known and not any(marked)
    return element(
        "details",
        element("summary", f"similarity {figure(example.get('similarity'))}"),
        element("div", *columns, class_="pair"),
        element("p", "No word differs in what is shown.", class_="note") if equal else "",
        class_="samples",
        open="open" if known else None,
    )


def _document(document: dict[str, Any], text: str, marked: list[Span]) -> Html:
    name = element("bdi", shortened(str(document.get("id", "")), _NAME_CHARACTERS))
    lost = document.get("text") is None
    shown = element("p", "Of an earlier run: its text is no longer at hand.") if lost else passage(text, marked)
    return element("article", element("p", "id ", name, class_="origin"), shown, class_="sample")
