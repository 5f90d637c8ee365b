"""The report of a run: one HTML file that loads nothing else and runs no script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_v3.charts.markup import html_page
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
# The style of this report, in addition to the style that all pages share.
_STYLE = """\
.card.input { border-color: var(--ink); } .card.kept { border-color: var(--after); }
.card.dropped { border-color: var(--before); } .card.quarantined { border-color: var(--other); }
.card.copies { border-top-style: dashed; border-color: var(--after); }
.whole .bar { height: 0.875rem; }
.sum { color: var(--soft); font-size: 0.875rem; margin-top: 0.5rem; font-variant-numeric: tabular-nums; }
.funnel { list-style: none; margin: 0 0 0.5rem; padding: 0; }
.funnel li { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; padding: 0.375rem 0; }
.funnel span { font-variant-numeric: tabular-nums; color: var(--soft); font-size: 0.9375rem; }
.funnel .step { color: var(--ink); }
.funnel b { display: inline-block; min-width: 4.5rem; text-align: right; font-weight: 600; color: var(--ink); }
.funnel div { flex-basis: 100%; }
.funnel .bar { height: 0.75rem; }
.funnel .bar + .bar { height: 0.25rem; margin-top: 2px; }
.words caption { display: none; }
.words th[scope=row] { min-width: 4rem; }
.words th, .words td { padding-left: 0.75rem; }
.words th:first-child { padding-left: 0; }
.samples { border-bottom: 1px solid var(--line); padding: 0.25rem 0; }
.samples summary { color: var(--soft); font-size: 0.9375rem; }
.samples summary code { color: var(--ink); margin-right: 0.5rem; }
.sample { background: var(--panel); border-radius: 4px; padding: 0.75rem 1rem; margin: 0.5rem 0; min-width: 0; }
.sample p { margin: 0 0 0.375rem; font-size: 0.875rem; overflow-wrap: anywhere; }
.origin { color: var(--soft); }
.figures span { margin-right: 1.25rem; color: var(--soft); }
.figures b { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 1rem; }
@media print { .sample, .funnel li { break-inside: avoid; } }
"""


def write_report(stats: dict[str, Any], path: Path) -> None:
    """Writes the report of `stats`, the content of stats.json. The same stats give the same bytes."""
    with atomic_write(path) as partial:
        partial.write_bytes(page(stats).encode())


def page(stats: dict[str, Any]) -> str:
    """The whole page. Sections leave out what `stats` lacks."""
    sections = {title: show(stats) for title, show in _SECTIONS.items()}
    return html_page(_TITLE, overview_section(stats), sections, _STYLE)
