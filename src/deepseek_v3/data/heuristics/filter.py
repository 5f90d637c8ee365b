"""The stage that asks the published rules of each document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.heuristics.c4 import KeptLines, c4
from deepseek_v3.data.heuristics.fineweb import fineweb, lines_left_by_c4, lines_of_documents
from deepseek_v3.data.heuristics.gopher_quality import gopher_quality
from deepseek_v3.data.heuristics.gopher_repetition import gopher_repetition
from deepseek_v3.data.heuristics.rules import RuleResult
from deepseek_v3.data.heuristics.text_table import TextTable, build_text_table
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome


class HeuristicFilter(Stage):
    """Drops documents that break a rule of Gopher, C4 or FineWeb; C4 also removes lines from those that it keeps.

    The reason is the first rule broken, in the order Gopher's repetition, Gopher's quality, C4, FineWeb; the last
    judges the lines that C4 leaves. Figures: `found`, `limit`, and in `also` the codes of the other rules broken.
    Options are those of `HeuristicsConfig`; raises ConfigError for others. `reference.py` defines each rule.
    """

    name: ClassVar[str] = "heuristic_filters"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(HeuristicsConfig, options, "HeuristicFilter")

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Judges a batch of `RECORDS`. Never raises for any text."""
        table = build_text_table(batch.column("text"), self.options.remove_citations)
        findings, kept = apply_rules(table, self.options)
        if kept is not None:
            batch = with_texts(batch, kept.texts())
        return outcome(self.name, batch, _drops(findings, batch.num_rows))


def apply_rules(table: TextTable, options: HeuristicsConfig) -> tuple[list[RuleResult], KeptLines | None]:
    """What the rules that are on found, in the order in which they are asked, and what C4 leaves, if it is on."""
    findings: list[RuleResult] = []
    if "gopher_repetition" in options.rules:
        findings += gopher_repetition(table, options)
    if "gopher_quality" in options.rules:
        findings += gopher_quality(table, options)
    if "c4" not in options.rules:
        if "fineweb" in options.rules:
            findings += fineweb(lines_of_documents(table), options)
        return findings, None
    found, kept = c4(table, options)
    findings += found
    if "fineweb" in options.rules:
        left = ~np.logical_or.reduce([finding.broken for finding in found])
        findings += [finding.restricted_to(left) for finding in fineweb(lines_left_by_c4(table, kept), options)]
    return findings, kept


def _drops(findings: Sequence[RuleResult], documents: int) -> list[Drop]:
    """Documents that break a rule, with the first one broken as their reason."""
    broken = np.array([finding.broken for finding in findings], np.bool_).reshape(len(findings), documents)
    drops = []
    for row in np.flatnonzero(broken.any(axis=0)).tolist():
        first, *others = [findings[index] for index in np.flatnonzero(broken[:, row])]
        figures = {"found": first.found[row].item(), "limit": first.limit, "also": [rule.code for rule in others]}
        drops.append(Drop(row, first.code, figures, first.trigger(row)))
    return drops
