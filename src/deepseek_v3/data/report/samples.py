"""Some documents of each reason, with what decided about them, and some that were kept."""

from __future__ import annotations

from typing import Any

import orjson

from deepseek_v3.data.report.differences import occurrences
from deepseek_v3.data.report.markup import Html, code, element, joined, passage, shortened, slug
from deepseek_v3.data.report.wording import count, figure, stage_title

_KEPT = "kept"
_SHOWN = 5  # of each reason
_CHARACTERS = 600
_ALL_CHARACTERS = 150_000  # of all samples together, which keeps the page below 2 MB
_NAME_CHARACTERS = 160


def anchor(stage: str, reason: str) -> str:
    """The id of a reason's samples on the page."""
    return slug("samples", stage, reason)


def samples(stats: dict[str, Any]) -> Html:
    """All samples, folded up, in the order of the stages."""
    found: dict[str, list[dict[str, Any]]] = stats.get("samples", {})
    number = sum(len(each[:_SHOWN]) for each in found.values())
    if not number:
        return element("p", "No documents came in.")
    characters = min(_CHARACTERS, _ALL_CHARACTERS // number)
    order = [stage["name"] for stage in stats.get("stages", [])]
    stages = sorted(
        {key.split("/", 1)[0] for key in found} - {_KEPT}, key=lambda name: (order + [name]).index(name)
    )
    parts = [_stage(stage, found, stats, characters) for stage in stages]
    if found.get(_KEPT):
        parts += [
            element("h3", "Kept"),
            _group(anchor(_KEPT, ""), "documents of the output", found[_KEPT], characters),
        ]
    return joined(parts)


def _stage(name: str, found: dict[str, list[dict[str, Any]]], stats: dict[str, Any], characters: int) -> Html:
    stage: dict[str, Any] = next((stage for stage in stats.get("stages", []) if stage["name"] == name), {})
    groups = []
    for key in sorted(key for key in found if key.startswith(f"{name}/")):
        reason = key.split("/", 1)[1]
        documents = stage.get("reasons", {}).get(reason, {}).get("documents")
        title = joined([code(reason), "" if documents is None else f" {count(documents)} documents dropped"])
        groups.append(_group(anchor(name, reason), title, found[key], characters))
    return joined([element("h3", stage_title(name)), *groups])


def _group(key: str, title: str, found: list[dict[str, Any]], characters: int) -> Html:
    shown = [_sample(sample, characters) for sample in found[:_SHOWN]]
    # A link to something inside opens what is folded up.
    return element("details", element("summary", title), element("div", *shown, id=key), class_="samples")


def _sample(sample: dict[str, Any], characters: int) -> Html:
    text, trigger = sample.get("text") or "", sample.get("trigger")
    shown = text[:characters]
    spans = occurrences(shown, trigger) if trigger else []
    details = [*_figures(sample.get("figures")), *_length(len(shown), sample.get("characters", len(text)))]
    decided = (
        [element("p", "Decided by: ", element("mark", element("bdi", trigger)))] if trigger and not spans else []
    )
    return element(
        "article",
        _origin(sample),
        element("p", joined(details), class_="figures") if details else "",
        *decided,
        passage(shown, spans),
        class_="sample",
    )


def _origin(sample: dict[str, Any]) -> Html:
    source = element("bdi", shortened(str(sample.get("source", "")), _NAME_CHARACTERS))
    name = element("bdi", shortened(str(sample.get("id", "")), _NAME_CHARACTERS))
    return element("p", source, f", place {figure(sample.get('place'))}, id ", name, class_="origin")


def _figures(figures: str | None) -> list[Html]:
    """The figures of a decision: what was found beside its limit first, then all others by name."""
    found: dict[str, Any] = orjson.loads(figures) if figures else {}
    shown = sorted(name for name in found if found[name] not in ([], {}, None))
    names = sorted(shown, key=lambda name: name not in ("found", "limit"))
    return [element("span", f"{name} ", element("b", element("bdi", figure(found[name])))) for name in names]


def _length(shown: int, whole: int) -> list[Html]:
    if shown >= whole:
        return []
    return [element("span", f"the first {count(shown)} of {count(whole)} characters")]
