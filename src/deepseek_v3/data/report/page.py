"""The report of a run: one HTML file that loads nothing else and runs no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_v3.charts.markup import Html, concat, element
from deepseek_v3.charts.style import STYLE
from deepseek_v3.data.report.distributions import distributions_section
from deepseek_v3.data.report.drops import quarantine_section, reasons_section, samples_section
from deepseek_v3.data.report.duplicates import duplicates_section
from deepseek_v3.data.report.overview import funnel_section, overview_section
from deepseek_v3.data.report.sources import mixture_section, sources_section
from deepseek_v3.utils.files import atomic_write

_TITLE = "Data preprocessing report"
_SECTIONS = {
    "Funnel": funnel_section,
    "Reasons": reasons_section,
    "Quarantine": quarantine_section,
    "Distributions": distributions_section,
    "Duplicates": duplicates_section,
    "Mixture": mixture_section,
    "Sources": sources_section,
    "Samples": samples_section,
}
# Even if a text got past the escaping, the browser would neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_TITLE}</title>
<style>
{STYLE}</style>
</head>
"""


def write_report(stats: dict[str, Any], path: Path) -> None:
    """Writes the report of `stats`, the content of stats.json. The same stats give the same bytes."""
    with atomic_write(path) as partial:
        partial.write_bytes(page(stats).encode())


def page(stats: dict[str, Any]) -> str:
    """The whole page. Sections leave out what `stats` lacks."""
    links = [element("a", title, href=f"#{title.lower()}") for title in _SECTIONS]
    parts = [_section(title, show(stats)) for title, show in _SECTIONS.items()]
    body = element(
        "body",
        element("header", element("h1", _TITLE), overview_section(stats)),
        element("nav", *links, aria_label="Sections"),
        element("main", *parts),
    )
    return f"{_PAGE}{body}\n</html>\n"


def _section(title: str, content: Html) -> Html:
    key = title.lower()
    heading = element("h2", title, id=key)
    return concat(["\n", element("section", heading, content, aria_labelledby=key)])
