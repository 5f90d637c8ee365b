"""Deduplication of documents in memory, by the stages that the pipeline also runs."""

from __future__ import annotations

from deepseek_v3.data.documents import Documents
from deepseek_v3.data.in_memory import run_global_stage
from deepseek_v3.data.stages import Filtered, GlobalStage


class Deduplicator(GlobalStage):
    """A global stage that can also be run without the pipeline, on documents in memory."""

    def deduplicate(self, documents: Documents) -> Filtered:
        """Removes duplicates from texts, Documents, mappings or Arrow data: a list, an iterator or a table.

        Returns the unique documents as the caller's own kind of object, their ids (or positions, counted from 0),
        and figures: `documents`, `unique`, `duplicates`, `reasons`, and the stage's own. Works in a temporary
        folder that takes a little more space than the texts. Raises DataError for an item that is not a document.
        """
        filtered, figures = run_global_stage(self, documents)
        stats = {**figures, "unique": filtered.stats["kept"], "reasons": filtered.stats["reasons"]}
        return Filtered(filtered.documents, filtered.ids, stats)
