"""The reasons of dropped documents and quarantined records for the report, with samples of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from deepseek_v3.charts.markup import Html, TableBody, byte_size, code, concat, element, html_table, passage, slug
from deepseek_v3.charts.svg import bar
from deepseek_v3.data.formats.quarantine import REASONS, REPAIRS, SKIPPED
from deepseek_v3.data.report.duplicates import occurrences
from deepseek_v3.data.report.overview import stage_title
from deepseek_v3.utils.text import format_figure, format_integer, format_percent, truncate

_KEPT = "kept"
_SHOWN = 5  # samples of each reason
_CHARACTERS = 600
_ALL_CHARACTERS = 150_000  # the most of all samples together, which keeps the page below 2 MB
_NAME_CHARACTERS = 160
_MEANINGS = {**REASONS, "duplicate_id": "a record whose id, source and place another record has"}


def reasons_section(stats: dict[str, Any]) -> Html:
    """A table of all reasons, with bars on one scale for all stages."""
    stages = stats.get("stages", [])
    most = max((reason.get("documents", 0) for stage in stages for reason in _of(stage).values()), default=0)
    bodies = [_stage_reasons(stage, most, stats.get("samples", {})) for stage in stages]
    if not bodies:
        return element("p", "No stage ran.")
    header = ["reason", "", "documents", "share", "text", "share"]
    note = "Shares refer to the documents that the stage received. A reason with samples links to them."
    table = html_table("Documents dropped, by stage and reason", header, *bodies)
    return concat([table, element("p", note, class_="note"), *map(_common_ngrams, stages)])


def _common_ngrams(stage: dict[str, Any]) -> Html:
    """A table of the n-grams of evaluation texts that decontamination did not count, or nothing."""
    figures = stage.get("figures") or {}
    rows = [
        (
            element("bdi", truncate(str(one.get("text", "")), _NAME_CHARACTERS)),
            format_integer(one.get("documents", 0)),
            element("bdi", truncate(str(one.get("evaluation", "")), _NAME_CHARACTERS)),
        )
        for one in figures.get("common", [])
    ]
    if not rows:
        return concat([])
    spared = (
        f"{figures.get('common_ngrams', 0):,} n-grams occur in more documents than max_documents allows. "
        f"{figures.get('spared_documents', 0):,} documents match nothing else, and are kept."
    )
    header = ["text", "documents", "evaluation text"]
    table = html_table("Common texts in evaluation sets, which did not count", header, TableBody(rows), left=[2])
    return concat([table, element("p", spared, class_="note")])


def quarantine_section(stats: dict[str, Any]) -> Html:
    """Tables of the reasons why records were quarantined, of repairs of others, and of what was skipped."""
    quarantined = _by_code("Quarantined records, by reason", "quarantined", stats, _MEANINGS)
    repaired = _by_code("Repaired records, by kind of repair", "repaired", stats, REPAIRS)
    skipped = _by_code("No documents by the rules of their format", "skipped", stats, SKIPPED)
    return concat([quarantined or element("p", "Every record could be read."), repaired, skipped])


def _by_code(title: str, name: str, stats: dict[str, Any], meanings: Mapping[str, str]) -> Html:
    """A table of the counts `stats[name]` by code, or nothing if there are none."""
    found = sorted(stats.get(name, {}).items(), key=lambda item: (-item[1], item[0]))
    if not found:
        return concat([])
    most = max(found[0][1], 1)  # an empty file counts as no record
    rows = [
        (code(reason), bar((name, number / most)), format_integer(number), meanings.get(reason, ""))
        for reason, number in found
    ]
    return html_table(title, ["reason", "", "records", "meaning"], TableBody(rows), left=[3])


def _stage_reasons(stage: dict[str, Any], most: int, samples: dict[str, Any]) -> TableBody:
    given, left, found = stage.get("in", {}), stage.get("out", {}), _of(stage)
    documents, num_bytes = given.get("documents", 0), given.get("bytes", 0)
    rows: list[tuple[str, ...]] = [
        (
            _name(stage["name"], reason, samples),
            bar(("dropped", each.get("documents", 0) / max(most, 1))),
            format_integer(each.get("documents", 0)),
            format_percent(each.get("documents", 0), documents),
            byte_size(each.get("bytes", 0)),
            format_percent(each.get("bytes", 0), num_bytes),
        )
        for reason, each in sorted(found.items(), key=lambda item: (-item[1].get("documents", 0), item[0]))
    ]
    shorter = num_bytes - left.get("bytes", 0) - sum(each.get("bytes", 0) for each in found.values())
    if shorter > 0:
        rows.append(
            (
                "text removed from documents that are kept",
                "",
                "",
                "",
                byte_size(shorter),
                format_percent(shorter, num_bytes),
            )
        )
    heading = f"{stage_title(stage['name'])}: {documents:,} in, {left.get('documents', 0):,} out"
    return TableBody(rows, heading)


def _of(stage: dict[str, Any]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = stage.get("reasons", {})
    return found


def _name(stage: str, reason: str, samples: dict[str, Any]) -> Html:
    shown = code(reason)
    return element("a", shown, href=f"#{anchor(stage, reason)}") if samples.get(f"{stage}/{reason}") else shown


def samples_section(stats: dict[str, Any]) -> Html:
    """All samples, collapsed, in the order of the stages, and samples of the output."""
    found: dict[str, list[dict[str, Any]]] = stats.get("samples", {})
    number = sum(len(each[:_SHOWN]) for each in found.values())
    if not number:
        return element("p", "No documents came in.")
    characters = min(_CHARACTERS, _ALL_CHARACTERS // number)
    order = [stage["name"] for stage in stats.get("stages", [])]
    stages = sorted(
        {key.split("/", 1)[0] for key in found} - {_KEPT}, key=lambda name: (order + [name]).index(name)
    )
    parts = [_stage_samples(stage, found, stats, characters) for stage in stages]
    if found.get(_KEPT):
        parts += [
            element("h3", "Kept"),
            _group(anchor(_KEPT, ""), "documents of the output", found[_KEPT], characters),
        ]
    return concat(parts)


def _stage_samples(
    name: str, found: dict[str, list[dict[str, Any]]], stats: dict[str, Any], characters: int
) -> Html:
    stage: dict[str, Any] = next((stage for stage in stats.get("stages", []) if stage["name"] == name), {})
    groups = []
    for key in sorted(key for key in found if key.startswith(f"{name}/")):
        reason = key.split("/", 1)[1]
        documents = stage.get("reasons", {}).get(reason, {}).get("documents")
        title = concat([code(reason), "" if documents is None else f" {documents:,} documents dropped"])
        groups.append(_group(anchor(name, reason), title, found[key], characters))
    return concat([element("h3", stage_title(name)), *groups])


def _group(key: str, title: str, found: list[dict[str, Any]], characters: int) -> Html:
    shown = [_sample(sample, characters) for sample in found[:_SHOWN]]
    # The id is inside, so that a link to it opens the collapsed element.
    return element("details", element("summary", title), element("div", *shown, id=key), class_="samples")


def _sample(sample: dict[str, Any], characters: int) -> Html:
    text, trigger = sample.get("text") or "", sample.get("trigger")
    shown = text[:characters]
    spans = occurrences(shown, trigger) if trigger else []
    details = [*_figures(sample.get("figures")), *_length(len(shown), sample.get("characters", len(text)))]
    decided = (
        [element("p", "Caused by: ", element("mark", element("bdi", trigger)))] if trigger and not spans else []
    )
    return element(
        "article",
        _origin(sample),
        element("p", concat(details), class_="figures") if details else "",
        *decided,
        passage(shown, spans),
        class_="sample",
    )


def _origin(sample: dict[str, Any]) -> Html:
    source = element("bdi", truncate(str(sample.get("source", "")), _NAME_CHARACTERS))
    name = element("bdi", truncate(str(sample.get("id", "")), _NAME_CHARACTERS))
    return element("p", source, f", place {format_figure(sample.get('place'))}, id ", name, class_="origin")


def _figures(figures: str | None) -> list[Html]:
    """The figures of a drop: the measured value and its limit first, then all others by name."""
    found: dict[str, Any] = orjson.loads(figures) if figures else {}
    shown = sorted(name for name in found if found[name] not in ([], {}, None))
    names = sorted(shown, key=lambda name: name not in ("found", "limit"))
    return [element("span", f"{name} ", element("b", element("bdi", format_figure(found[name])))) for name in names]


def _length(shown: int, whole: int) -> list[Html]:
    if shown >= whole:
        return []
    return [element("span", f"the first {shown:,} of {whole:,} characters")]


def anchor(stage: str, reason: str) -> str:
    """The HTML id of the samples of a reason."""
    return slug("samples", stage, reason)
