"""The report on sources: documents removed from each, and tokens of each in the mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

from deepseek_v3.charts.markup import Html, TableBody, element, html_table
from deepseek_v3.charts.svg import bar
from deepseek_v3.data.report.overview import stage_title
from deepseek_v3.utils.text import format_figure, format_integer, format_percent, truncate

_SHOWN = 30
_NAME_CHARACTERS = 80


class Source(NamedTuple):
    """Documents of a source before the first and after the last stage, and the stage that removed most of them."""

    name: str
    given: int
    left: int
    main_stage: str

    @property
    def removed(self) -> int:
        """The number of documents that the stages removed."""
        return self.given - self.left

    @property
    def removed_share(self) -> float:
        """The removed documents as a share of all."""
        return self.removed / max(self.given, 1)


def sources_section(stats: dict[str, Any]) -> Html:
    """A table of the 30 sources with the largest share of removed documents, and one line for all others."""
    found = _count_by_source([stage for stage in stats.get("stages", []) if stage.get("sources")])
    if not found:
        return element("p", "No stage ran on any document.")
    found.sort(key=lambda source: (-source.removed_share, -source.removed, source.name))
    rest = found[_SHOWN:]
    rows = [_row(source) for source in found[:_SHOWN]]
    if rest:
        others = f"{len(rest):,} others"
        rows.append(_row(Source(others, sum(s.given for s in rest), sum(s.left for s in rest), "")))
    header = ["source", "", "share removed", "documents", "removed", "left", "mostly by"]
    return html_table("Documents removed, by source", header, TableBody(rows), left=[6])


def mixture_section(stats: dict[str, Any]) -> Html:
    """A table of the tokens of each source in the corpus, beside their targets."""
    mixed = [stage["figures"] for stage in stats.get("stages", []) if stage.get("figures", {}).get("sources")]
    if not mixed:
        return element("p", "Sources were not mixed: the output holds every document once.")
    figures = mixed[-1]
    parts = sorted(figures["sources"].items(), key=lambda item: (-item[1].get("tokens", 0), item[0]))
    total = figures.get("tokens", sum(part.get("tokens", 0) for _, part in parts))
    rows = [
        (
            element("bdi", truncate(name, _NAME_CHARACTERS)),
            bar(("kept", part.get("tokens", 0) / max(total, 1))),
            format_percent(part.get("tokens", 0), total),
            *(
                format_figure(part.get(key)) if key in part else "–"
                for key in ("tokens", "target", "documents", "epochs")
            ),
        )
        for name, part in parts
    ]
    header = ["source", "", "share", "tokens", "target", "documents", "epochs"]
    return html_table(f"Tokens by source, {total:,} in all", header, TableBody(rows))


def _count_by_source(stages: list[dict[str, Any]]) -> list[Source]:
    """The sources that the first stage received. A stage that does not list a source received none of it."""
    if not stages:
        return []
    found = []
    for name, counts in stages[0]["sources"].items():
        taken = [(_removed(stage, name), stage_title(stage["name"])) for stage in stages]
        most = max(taken, key=lambda pair: pair[0])
        left = stages[-1]["sources"].get(name, {}).get("out", 0)
        found.append(Source(name, counts.get("in", 0), left, most[1] if most[0] else ""))
    return found


def _removed(stage: dict[str, Any], name: str) -> int:
    counts = stage["sources"].get(name, {})
    taken: int = counts.get("in", 0) - counts.get("out", 0)
    return taken


def _row(source: Source) -> tuple[str, ...]:
    return (
        element("bdi", truncate(source.name, _NAME_CHARACTERS)),
        bar(("dropped", source.removed_share)),
        format_percent(source.removed, source.given),
        format_integer(source.given),
        format_integer(source.removed),
        format_integer(source.left),
        source.main_stage,
    )
