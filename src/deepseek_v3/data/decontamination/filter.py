"""The stage that drops documents that contain texts of evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from typing_extensions import override

from deepseek_v3.config.filter_config import DecontaminationConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import BoolArray, Int64Array, find_sorted
from deepseek_v3.data.decontamination import corpus_matches
from deepseek_v3.data.decontamination.index import load_evaluation_index
from deepseek_v3.data.documents import Documents
from deepseek_v3.data.in_memory import run_global_stage
from deepseek_v3.data.stages import Drop, Filtered, GlobalStage, IdLookup, NumberedPart, Outcome, outcome
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.logging import get_logger

_OVERLAPS_FILE = "overlaps.npy"

_log = get_logger("Decontamination")


class Decontaminator(GlobalStage):
    """Drops documents that share word n-grams with evaluation sets (Brown et al. 2020, appendix C).

    Letter case and punctuation are ignored; each character of a script without spaces is a word. An n-gram that
    occurs in more than `max_documents` documents does not count, so the stage needs the whole corpus. Takes the
    options of `DecontaminationConfig`. Reason: `evaluation_text`, with the first match in lower case as the
    trigger, and the name of the evaluation text in the figures. Raises ConfigError without evaluation sets, and
    DataError if one cannot be read.
    """

    name = "decontamination"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(DecontaminationConfig, options, "Decontaminator")
        if not self.options.evaluation:
            raise ConfigError("decontamination.evaluation: is empty, expected files or folders of evaluation sets")
        for path in self.options.evaluation:
            if not path.exists():
                raise DataError(f"decontamination.evaluation: {path} does not exist; expected a file or a folder")

    def filter(self, documents: Documents) -> Filtered:
        """Filters texts, Documents, mappings or Arrow data as one corpus, without a pipeline.

        `stats` also holds the stage's own figures. Raises DataError for an item that is not a document.
        """
        filtered, figures = run_global_stage(self, documents)
        return filtered._replace(stats={**figures, **filtered.stats})

    @override
    def write_keys(self, table: pa.Table, folder: Path) -> None:
        corpus_matches.write_keys(load_evaluation_index(self.options), table.column("text").to_pylist(), folder)

    @override
    def resolve(
        self, parts: Sequence[NumberedPart], matches: Sequence[Path], refined: Sequence[Path], folder: Path
    ) -> dict[str, Any]:
        """Counts the documents of each n-gram, and writes the overlap of each document by those that count."""
        index = load_evaluation_index(self.options)
        documents = corpus_matches.count_documents(parts, len(index.owners))
        limit = self.options.max_documents
        is_common = np.zeros(len(documents), np.bool_) if limit is None else documents > limit
        overlaps = corpus_matches.overlaps(parts, is_common)
        np.save(folder / _OVERLAPS_FILE, overlaps)
        matching = corpus_matches.matching_documents(parts)
        common = corpus_matches.common_examples(parts, documents, is_common, index)
        figures = {
            "evaluation_texts": len(index.names),
            "common_ngrams": int(is_common.sum()),
            "spared_documents": matching - len(overlaps),
            "common": common,
        }
        if common:
            _log.warning(
                "%s n-grams of evaluation texts occur in more than max_documents = %s documents and do not count; "
                "%s documents match nothing else. In %s documents: %r, of %s",
                *(f"{figures['common_ngrams']:,}", limit, f"{figures['spared_documents']:,}"),
                *(f"{common[0]['documents']:,}", common[0]["text"], common[0]["evaluation"]),
            )
        return figures

    @override
    def apply(self, batch: pa.RecordBatch, documents: Int64Array, folder: Path, ids_of: IdLookup) -> Outcome:
        overlaps = np.load(folder / _OVERLAPS_FILE)
        found = find_sorted(overlaps["document"], documents)
        shares = np.where(found >= 0, overlaps["share"][found] if len(overlaps) else 0.0, 0.0)
        drops = [
            self._drop(row, overlaps[found[row]], batch.column("text")[row].as_py())
            for row in np.flatnonzero((found >= 0) & (shares >= self.options.min_share)).tolist()
        ]
        return outcome(self.name, batch, drops, {"evaluation_overlap": shares.tolist()})

    @override
    def removed(self, parts: Sequence[NumberedPart], folder: Path) -> BoolArray:
        overlaps = np.load(folder / _OVERLAPS_FILE)
        mask = np.zeros(sum(part.rows for part in parts), np.bool_)
        mask[overlaps["document"][overlaps["share"] >= self.options.min_share]] = True
        return mask

    def _drop(self, row: int, overlap: np.void, text: str) -> Drop:
        index = load_evaluation_index(self.options)
        figures = {
            "ngrams": int(overlap["ngrams"]),
            "found": float(overlap["share"]),
            "limit": self.options.min_share,
            "evaluation": index.names[index.owners[overlap["ngram"]]],
        }
        trigger = corpus_matches.excerpt(text, int(overlap["start"]), int(overlap["length"]))
        return Drop(row, "evaluation_text", figures, trigger)
