"""The stage that filters documents by the published rules of Gopher, C4 and FineWeb."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import HeuristicsConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray
from deepseek_v3.data.content import contents_of, looks_like_code
from deepseek_v3.data.documents import with_texts
from deepseek_v3.data.heuristics.c4 import KeptLines, c4
from deepseek_v3.data.heuristics.code import broken_code_rules
from deepseek_v3.data.heuristics.fineweb import fineweb, lines_left_by_c4, lines_of_documents
from deepseek_v3.data.heuristics.gopher_quality import gopher_quality
from deepseek_v3.data.heuristics.gopher_repetition import gopher_repetition
from deepseek_v3.data.heuristics.rules import RuleResult
from deepseek_v3.data.heuristics.text_table import TextTable, build_text_table
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome


class HeuristicFilter(Stage):
    """Drops documents that break a rule of Gopher, C4 or FineWeb; C4 also removes lines from kept documents.

    Source code has rules of its own (`code.py`), unless the group `code` is left out; `profile` says which apply.

    The reason is the first rule broken, in the order Gopher's repetition, Gopher's quality, C4, FineWeb; FineWeb's
    rules apply to the lines that C4 leaves. Figures: the value `found`, its `limit`, and in `also` the codes of
    the other rules broken. Takes the options of `HeuristicsConfig`; raises ConfigError for any other.
    `reference.py` defines each rule.
    """

    name: ClassVar[str] = "heuristic_filters"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(HeuristicsConfig, options, "HeuristicFilter")

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Filters a batch of `RECORDS`. Accepts every text."""
        if "code" not in self.options.rules:
            before = batch.column("text")
            texts, drops = self._judge_prose(before)
            return outcome(self.name, batch if texts is before else with_texts(batch, texts), drops)
        is_code = self._is_code(batch)
        rows = np.flatnonzero(~is_code)
        texts, drops = self._judge_prose(batch.column("text").take(pa.array(rows)))
        drops = [replace(drop, row=int(rows[drop.row])) for drop in drops]
        drops += self._judge_code(batch, np.flatnonzero(is_code).tolist())
        texts = pc.replace_with_mask(batch.column("text"), pa.array(~is_code), texts)
        profiles = np.where(is_code, "code", "prose").tolist()
        return outcome(self.name, with_texts(batch, texts), drops, {"profile": profiles})

    def _is_code(self, batch: pa.RecordBatch) -> BoolArray:
        """Marks source code: by the name or type of the document, or else by its text."""
        if self.options.rules == ("code",):
            return np.ones(batch.num_rows, np.bool_)
        contents = contents_of(batch)
        unknown = [row for row, content in enumerate(contents) if content is None]
        is_code = np.array([content == "code" for content in contents], np.bool_)
        is_code[unknown] = [
            looks_like_code(text) for text in batch.column("text").take(pa.array(unknown, pa.int64())).to_pylist()
        ]
        return is_code

    def _judge_prose(self, texts: pa.Array) -> tuple[pa.Array, list[Drop]]:
        """The texts without the lines that C4 removes, and the documents to drop."""
        table = build_text_table(texts, self.options)
        results, kept = apply_rules(table, self.options)
        broken = np.array([result.broken for result in results], np.bool_).reshape(len(results), len(texts))
        if kept is not None:
            texts = kept.texts(table, np.logical_not(broken.any(axis=0)))
        return texts, _drops(results, broken)

    def _judge_code(self, batch: pa.RecordBatch, rows: list[int]) -> list[Drop]:
        drops = []
        texts = batch.column("text").take(pa.array(rows, pa.int64())).to_pylist()
        for row, text in zip(rows, texts, strict=True):
            if broken := [*broken_code_rules(text, self.options)]:
                first, *others = broken
                figures = {"found": first.found, "limit": first.limit, "also": [rule.code for rule in others]}
                drops.append(Drop(row, first.code, figures, first.trigger))
        return drops


def apply_rules(table: TextTable, options: HeuristicsConfig) -> tuple[list[RuleResult], KeptLines | None]:
    """Returns the results of the enabled rules, in the order in which they apply, and the lines that C4 leaves.

    The second is None if C4 is not enabled.
    """
    results: list[RuleResult] = []
    if "gopher_repetition" in options.rules:
        results += gopher_repetition(table, options)
    if "gopher_quality" in options.rules:
        results += gopher_quality(table, options)
    if "c4" not in options.rules:
        if "fineweb" in options.rules:
            results += fineweb(lines_of_documents(table), options)
        return results, None
    c4_results, kept = c4(table, options)
    results += c4_results
    if "fineweb" in options.rules:
        left = ~np.logical_or.reduce([result.broken for result in c4_results])
        results += [result.restricted_to(left) for result in fineweb(lines_left_by_c4(table, kept), options)]
    return results, kept


def _drops(results: Sequence[RuleResult], broken: BoolArray) -> list[Drop]:
    """Returns the documents that break a rule, with the first broken rule as their reason.

    `broken`, bool [results, documents], marks the rules that each document breaks.
    """
    drops = []
    for row in np.flatnonzero(broken.any(axis=0)).tolist():
        first, *others = [results[index] for index in np.flatnonzero(broken[:, row])]
        figures = {"found": first.found[row].item(), "limit": first.limit, "also": [rule.code for rule in others]}
        drops.append(Drop(row, first.code, figures, first.trigger(row)))
    return drops
