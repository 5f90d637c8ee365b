"""The page of the report: complete, consistent, reproducible, and harmless for any text in documents."""

import random
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from deepseek_v3.charts.histograms import number_histogram
from deepseek_v3.charts.markup import visible
from deepseek_v3.data.documents import RECORDS
from deepseek_v3.data.formats.quarantine import QUARANTINED
from deepseek_v3.data.pipeline.stats import Stats, empty_stage_counts
from deepseek_v3.data.report.distributions import _edge
from deepseek_v3.data.report.page import page, write_report
from deepseek_v3.data.stages import Drop, Outcome, outcome
from helpers.jobs import HANGS

SECTIONS = [
    "Funnel",
    "Reasons",
    "Quarantine",
    "Distributions",
    "Duplicates",
    "Mixture",
    "Sources",
    "Samples",
]
HOSTILE = (
    "</div></script><script>alert(1)</script><img src=x onerror=alert(2)> \x00\x07\u202eevil\u2066 & &lt; \"'\ufeff"
)
VOID = {"meta", "wbr"}


class Read(HTMLParser):
    """A page as a parser sees it. Fails where elements are not closed in order."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.passages: list[str] = []
        self.marked: list[str] = []
        self.pieces: list[str] = []
        self._depth: int | None = None
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows: list[list[str]] = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")
        elif ("class", "text") in attrs:
            self._depth = len(self.open)
            self.passages.append("")
        elif tag == "mark":
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, []).extend(self._rows)
        if self._depth is not None and len(self.open) < self._depth:
            self._depth = None

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.pieces.append(data)
        if "caption" in self.open:
            self._caption = data
        elif "td" in self.open or "th" in self.open:
            self._rows[-1][-1] += data
        if self._depth is not None:
            self.passages[-1] += data
        if "mark" in self.open:
            self.marked[-1] += data

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def batch_of(texts: list[str]) -> pa.RecordBatch:
    sources = [("web/a.jsonl", "books/b.jsonl", "<list>.json")[number % 3] for number in range(len(texts))]
    rows = [
        {"id": f"doc-{number}", "text": text, "source": source, "place": number, "metadata": None}
        for number, (text, source) in enumerate(zip(texts, sources, strict=True))
    ]
    return pa.RecordBatch.from_pylist(rows, RECORDS)


def quarantine_of(reasons: dict[str, int]) -> pa.RecordBatch:
    rows = [
        {
            "source": "x",
            "place": 0,
            "offset": -1,
            "length": -1,
            "records": records,
            "reason": reason,
            "error": "",
            "raw": b"",
        }
        for reason, records in reasons.items()
    ]
    return pa.RecordBatch.from_pylist(rows, QUARANTINED)


def run(texts: list[str], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run over these texts would put into stats.json, counted by the pipeline's own statistics."""
    tally = Stats()
    batch = batch_of(texts)
    tally.read(batch, quarantine_of({"not_json": 3, "unreadable": 1}))
    short = [
        Drop(row, "too_few_words", {"found": len(text.split()), "limit": 4, "also": ["no_end"]}, text.split()[0])
        for row, text in enumerate(texts)
        if 0 < len(text.split()) < 4
    ]
    scores = [round(0.01 * (row % 100), 2) for row in range(len(texts))]
    languages = [("en", "de", "nan", "<b>")[row % 4] for row in range(len(texts))]
    first = outcome("heuristic_filters", batch, short, {"score": scores, "language": languages})
    tally.stage("heuristic_filters", batch, first)
    repeated = outcome("unique_ids", first.kept, [Drop(0, "duplicate_id")])
    tally.quarantine(quarantine_of({"duplicate_id": 1}))
    second = outcome(
        "deduplication", repeated.kept, [Drop(2, "near_duplicate", {"similarity": 0.91}), Drop(5, "near_duplicate")]
    )
    tally.stage("deduplication", repeated.kept, second)
    third = outcome("mixing", second.kept, [Drop(1, "over_budget")])
    rows = np.repeat(np.arange(third.kept.num_rows), [3] + [1] * (third.kept.num_rows - 1))
    copied = Outcome(third.kept.take(pa.array(rows)), third.kept_rows, third.dropped)
    tally.stage("mixing", second.kept, copied)
    tally.kept(copied.kept, 12345)
    tally.copies(copied.kept.num_rows - third.kept.num_rows)
    figures = {
        "deduplication": {
            "clusters": 31,
            "duplicates": 2,
            "cluster_sizes": {"2-3": 29, "4-7": 2},
            "examples": examples,
        },
        "mixing": {
            "tokens": 777,
            "sources": {"web/*": {"documents": 19, "tokens": 677, "target": 650, "epochs": 1.5}},
        },
    }
    counts = tally.counts
    names = ("heuristic_filters", "deduplication", "mixing", "pii")
    return {
        "counts": {
            "input": counts["read"]["records"],
            "kept": third.kept.num_rows,
            "dropped": len(short) + 3,
            "quarantined": 5,
            "copies": 2,
        },
        "bytes_per_token": 4.0,
        "tokens_counted": False,
        "read": counts["read"],
        "quarantined": counts["quarantined"],
        "stages": [
            {"name": name, "figures": figures.get(name, {}), **counts["stages"].get(name, empty_stage_counts())}
            for name in names
        ][:3],
        "kept": counts["kept"],
        "samples": tally.samples,
        "alarms": [{"stage": "heuristic_filters", "removed": 0.625, "limit": 0.5}],
    }


@pytest.fixture
def stats() -> dict[str, Any]:
    chooser = random.Random(0)
    words = "the river carried a letter and nobody asked why it rained".split()
    texts = [" ".join(words), HOSTILE, "", f"short {HOSTILE[:20]}", "long " * 1000]
    texts += [" ".join(chooser.choices(words, k=chooser.randint(1, 60))) for _ in range(200)]
    pair = [{"id": "doc-1", "text": "one two three four"}, {"id": HOSTILE, "text": f"one two 3 four {HOSTILE}"}]
    lost = [{"id": "earlier", "text": None}, {"id": "doc-2", "text": "one"}]
    same = [{"id": "doc-3", "text": "equal"}, {"id": "doc-4", "text": "equal"}]
    examples = [{"similarity": 0.875, "documents": documents} for documents in (pair, lost, same)]
    return run(texts, [*examples, {"similarity": 0.8}])


def leaves(value: Any) -> list[int | float]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in leaves(each)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_every_number_is_shown(stats: dict[str, Any]) -> None:
    found = Read(page(stats))
    shown = {number for piece in found.pieces for number in re.findall(r"\d[\d.,]*", piece)}
    exact = {int(value) for tag, name, value in found.attributes if (tag, name) == ("data", "value")}
    kept = {**stats["kept"], "sources": {}, "tokens": 0}
    parts = [stats["counts"], stats["read"], stats["quarantined"], kept]
    for stage in stats["stages"]:
        parts += [stage["in"], stage["out"], stage["reasons"], stage["figures"]]
        parts += [{"words": stage["observed"].get("language", {})}]
    for part in parts:
        assert {number for number in leaves(part) if f"{number:,}" not in shown} <= exact
    rows = {row[0]: row for row in found.tables["Documents removed, by source"][1:]}
    for name, counts in stats["stages"][0]["sources"].items():
        left = stats["stages"][-1]["sources"][name]["out"]
        assert rows[name][3:6] == [str(counts["in"]), str(counts["in"] - left), str(left)]
    for side, column in (("before", 1), ("after", 2)):
        scores = found.tables["Heuristic filters: score"][1:]
        total = sum(stats["stages"][0]["observed"]["score"][side].values())
        assert sum(int(row[column]) for row in scores) == total


def test_sections_have_headings_and_links(stats: dict[str, Any]) -> None:
    for each in (stats, {}):
        found = Read(page(each))
        assert re.findall("<h2[^>]*>([^<]*)</h2>", page(each))[-len(SECTIONS) :] == SECTIONS
        ids = found.values("id")
        assert len(ids) == len({*ids})
        for reference in found.values("href"):
            assert reference.removeprefix("#") in ids
        for names in found.values("aria-labelledby"):
            assert {*names.split()} <= {*ids}
    assert "#samples-heuristic-filters-too-few-words" in Read(page(stats)).values("href")


def test_the_headline_adds_up(stats: dict[str, Any]) -> None:
    counts = stats["counts"]
    assert counts["input"] == counts["kept"] + counts["dropped"] + counts["quarantined"]
    assert f"= {counts['input']:,}, every record of the input." in Read(page(stats)).text
    counts["kept"] -= 1
    text = Read(page(stats)).text
    assert f"Of {counts['input']:,} records of the input {counts['input'] - 1:,} are accounted for." in text
    assert "every record" not in text


def test_the_funnel_adds_up(stats: dict[str, Any]) -> None:
    header, *rows = Read(page(stats)).tables["What is left after each step"]
    names = [row[0] for row in rows]
    documents = [int(row[1].replace(",", "")) for row in rows]
    taken = [int(row[3].replace(",", "")) if not row[3].startswith("+") else -int(row[3][1:]) for row in rows]
    assert header[6] == "tokens (estimated)"
    assert names == [
        "Input",
        "Read as documents",
        "Heuristic filters",
        "Repeated ids quarantined",
        "Deduplication",
        "Mixing",
        "Written, with copies",
    ]
    assert documents[0] == stats["counts"]["input"]
    assert documents[-1] == stats["counts"]["kept"] + stats["counts"]["copies"]
    for before, after, difference in zip(documents, documents[1:], taken[1:], strict=False):
        assert after == before - difference
    assert taken[1] == 4
    assert taken[3] == 1


def test_uncounted_tokens_are_called_estimated(stats: dict[str, Any]) -> None:
    estimated = Read(page(stats)).text
    assert "Tokens are estimated: 4 bytes of text each." in estimated
    counted = Read(page({**stats, "tokens_counted": True, "bytes_per_token": 1.5}))
    assert "estimated" not in counted.text
    assert "12.3\u00a0k tokens (counted)" in counted.text
    assert counted.tables["What is left after each step"][-1][6] == "12.3\u00a0k"


def test_hostile_documents_stay_text(stats: dict[str, Any]) -> None:
    content = page(stats)
    found = Read(content)
    assert not {"script", "img", "iframe", "object", "link", "form"} & {*found.tags}
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert not {*content} & {*"\x00\x07\u202e\u2066\ufeff"}
    assert visible(HOSTILE) in found.passages
    assert f"one two 3 four {visible(HOSTILE)}" in found.passages
    assert any("<b>" in row[0] for row in found.tables["Heuristic filters: language"])


def test_hostile_names_stay_text() -> None:
    stage = {
        **empty_stage_counts(),
        "name": HOSTILE,
        "reasons": {HOSTILE: {"documents": 1, "bytes": 1}},
        "figures": {"clusters": 1},
    }
    stage["sources"] = {HOSTILE: {"in": 2, "out": 1}}
    stage["observed"] = {
        HOSTILE: {"before": {HOSTILE: 1}, "after": {}},
        "2": {"before": {"1": 1, "not finite": 2}, "after": {}},
    }
    sample = {
        "id": HOSTILE,
        "source": HOSTILE * 9,
        "place": 1,
        "text": HOSTILE,
        "trigger": HOSTILE + "!",
        "figures": None,
    }
    mixing = {**empty_stage_counts(), "name": "mixing", "figures": {"sources": {HOSTILE: {"tokens": 1}}}}
    content = page(
        {
            "stages": [stage, mixing],
            "quarantined": {HOSTILE: 1},
            "samples": {f"{HOSTILE}/{HOSTILE}": [sample], "gone/x": [sample]},
            "alarms": [{"stage": HOSTILE, "removed": 1.0, "limit": 0.5}],
        }
    )
    found = Read(content)
    assert not {"script", "img"} & {*found.tags}
    assert not {*content} & {*"\x00\x07\u202e\u2066\ufeff"}
    assert "2 more have no finite number." in found.text


def test_the_page_loads_nothing(stats: dict[str, Any]) -> None:
    content = page(stats)
    found = Read(content)
    assert not {"src", "srcset", "data", "action", "xlink:href"} & {name for _, name, _ in found.attributes}
    assert all(reference.startswith("#") for reference in found.values("href"))
    assert "@import" not in content
    assert "url(" not in content
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in found.values("content")


def test_warnings_come_first(stats: dict[str, Any]) -> None:
    text = Read(page(stats)).text
    assert "Heuristic filters removed 62.5% of its documents, above its max_drop_warning of 50.0%." in text
    assert text.index("Warnings") < text.index("Input")
    assert "Warnings" not in Read(page({**stats, "alarms": []})).text


def test_reasons_are_counted_by_stage(stats: dict[str, Any]) -> None:
    rows = Read(page(stats)).tables["Documents dropped, by stage and reason"]
    stage = stats["stages"][0]
    found = stage["reasons"]["too_few_words"]
    share = f"{100 * found['documents'] / stage['in']['documents']:.1f}%"
    assert ["too_few_words", "", f"{found['documents']:,}", share] == rows[2][:4]
    quarantined = Read(page(stats)).tables["Quarantined records, by reason"]
    assert [row[0] for row in quarantined[1:]] == ["not_json", "duplicate_id", "unreadable"]
    assert quarantined[1][2:] == ["3", "a line or value that is not JSON"]


def test_long_documents_are_counted_in_binary_units(stats: dict[str, Any]) -> None:
    rows = Read(page(stats)).tables["Length of documents"]
    assert rows[0] == ["bytes, from – below", "before", "after"]
    assert rows[1][0] == "0 B – 1 B"
    assert rows[-1] == ["4 KiB – 8 KiB", "1", "0"]


def test_text_removed_from_kept_documents_has_its_own_row() -> None:
    stage = {
        **empty_stage_counts(),
        "name": "pii",
        "in": {"documents": 5, "bytes": 1000},
        "out": {"documents": 5, "bytes": 900},
    }
    rows = Read(page({"stages": [stage]})).tables["Documents dropped, by stage and reason"]
    assert rows[-1] == ["text removed from documents that are kept", "", "", "", "100\u00a0B", "10.0%"]


def test_samples_show_where_and_why(stats: dict[str, Any]) -> None:
    found = Read(page(stats))
    sample = stats["samples"]["heuristic_filters/too_few_words"][0]
    assert sample["text"].split()[0] in found.marked
    assert f"{sample['source']}, place {sample['place']:,}, id {sample['id']}" in found.text
    assert re.search(r"found [123]limit 4also no_end", found.text)
    long = {**sample, "characters": 98765, "trigger": "beyond the excerpt"}
    text = Read(page({"stages": stats["stages"], "samples": {"heuristic_filters/too_few_words": [long] * 9}})).text
    assert text.count("Caused by: beyond the excerpt") == 5
    assert f"the first {len(sample['text'])} of 98,765 characters" in text


def test_examples_mark_what_differs(stats: dict[str, Any]) -> None:
    found = Read(page(stats))
    assert {"three", "3"} <= {*found.marked}
    assert "similarity 0.875" in found.text
    assert "This document is from a previous run, which kept no texts." in found.text
    assert "The parts shown do not differ in any word." in found.text
    assert [row[0] for row in found.tables["Clusters by size"][1:]] == ["2 – 3", "4 – 7"]


def test_sources_are_sorted_by_what_was_removed() -> None:
    sources = {f"s{number:02d}": {"in": 100, "out": number} for number in range(40)}
    stage = {**empty_stage_counts(), "name": "language", "sources": sources}
    rows = Read(page({"stages": [stage]})).tables["Documents removed, by source"]
    assert len(rows) == 1 + 30 + 1
    assert rows[1] == ["s00", "", "100.0%", "100", "100", "0", "Language"]
    assert rows[-1][:6] == ["10 others", "", "65.5%", "1,000", "655", "345"]


@pytest.mark.parametrize("tokens_counted", [True, False])
def test_a_run_without_documents_has_a_report(tmp_path: Path, tokens_counted: bool) -> None:
    counts = dict.fromkeys(["input", "kept", "dropped", "quarantined", "copies"], 0)
    for stages in ([], [{"name": "pii", "figures": {}, **empty_stage_counts()}]):
        stats = {
            "counts": counts,
            "bytes_per_token": 4.0,
            "tokens_counted": tokens_counted,
            "stages": stages,
            **{name: {} for name in ("read", "quarantined", "kept", "samples")},
            "alarms": [],
        }
        write_report(stats, tmp_path / "report.html")
        text = Read((tmp_path / "report.html").read_text("utf-8")).text
        assert "0 kept + 0 dropped + 0 quarantined = 0" in text
        assert "Nothing was written." in text
        assert "Every record could be read." in text


def test_the_same_stats_give_the_same_bytes(stats: dict[str, Any], tmp_path: Path) -> None:
    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: turned(each) for name, each in reversed(value.items())}
        return value if not isinstance(value, list) else [turned(each) for each in value]

    for name, each in (("one", stats), ("other", turned(stats))):
        write_report(each, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_large_runs_have_small_pages(stats: dict[str, Any]) -> None:
    sample = {**stats["samples"]["kept"][0], "text": "a\x00<字" * 1000, "id": "i" * 10**5, "source": "&" * 10**5}
    reasons = {f"reason_{number}": {"documents": 10**12, "bytes": 10**15} for number in range(100)}
    observed = {f"q{number}": {"before": {f"w{n}": n for n in range(5000)}, "after": {}} for number in range(5)}
    texts = ["天地玄黄" * 1000, "<&>\x07" * 1000]
    example = {"similarity": 1.0, "documents": [{"id": "x" * 10**5, "text": text} for text in texts]}
    stage = {
        **stats["stages"][0],
        "reasons": reasons,
        "observed": observed,
        "sources": {f"s{number}": {"in": 9, "out": 3} for number in range(10**4)},
        "figures": {"examples": [example] * 50},
    }
    samples = {f"heuristic_filters/{reason}": [sample] * 5 for reason in reasons}
    assert len(page({**stats, "stages": [stage], "samples": samples}).encode()) < 2e6


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs the browser `chromium` on the path")
def test_a_browser_shows_the_page_as_written(stats: dict[str, Any], tmp_path: Path) -> None:
    write_report(stats, tmp_path / "report.html")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    )
    seen = subprocess.run(
        ["chromium", *options.split(), f"--user-data-dir={tmp_path}/profile", f"file://{tmp_path}/report.html"],
        capture_output=True,
        timeout=HANGS,
        check=True,
    )
    written, shown = (Read(text) for text in ((tmp_path / "report.html").read_text("utf-8"), seen.stdout.decode()))
    assert "CONSOLE" not in seen.stderr.decode()  # neither errors nor requests that the policy refused
    assert shown.tags == written.tags
    assert shown.passages == written.passages
    assert shown.tables == written.tables
    assert {section.lower() for section in SECTIONS} <= {*shown.values("id")}


@pytest.mark.parametrize("values", [(0.0, 6.8e-12), (-1e-10, 1e-10), (0.0, 1.0), (1.0, 900.0), (0.0, 5e4)])
def test_every_edge_of_a_histogram_has_its_own_label(values: tuple[float, float]) -> None:
    edges = number_histogram(dict.fromkeys(values, 1), {}, "score").edges
    assert len({_edge(edge) for edge in edges}) == len(edges)
