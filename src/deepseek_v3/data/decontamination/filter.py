"""The stage that drops documents that contain texts of evaluation sets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from deepseek_v3.config.filter_config import DecontaminationConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import Int64Array
from deepseek_v3.data.decontamination.index import NgramMatches, load_evaluation_index, split_words, word_pattern
from deepseek_v3.data.documents import text_batches
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome
from deepseek_v3.utils.errors import ConfigError, DataError


class _Overlap(NamedTuple):
    """By document: the number of matching n-grams (int64), and the share of its words that they cover."""

    ngrams: Int64Array
    shares: list[float]


class Decontaminator(Stage):
    """Drops documents that share word n-grams with evaluation sets (Brown et al. 2020, appendix C).

    Letter case and punctuation are ignored; each character of a script without spaces is a word. Takes the options
    of `DecontaminationConfig`. Reason: `evaluation_text`, with the first match in lower case as the trigger, and
    the name of the evaluation text in the figures. Raises ConfigError without evaluation sets, and DataError if one
    cannot be read.
    """

    name = "decontamination"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(DecontaminationConfig, options, "Decontaminator")
        if not self.options.evaluation:
            raise ConfigError("decontamination.evaluation: is empty, expected files or folders of evaluation sets")
        for path in self.options.evaluation:
            if not path.exists():
                raise DataError(f"decontamination.evaluation: {path} does not exist; expected a file or a folder")

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Filters a batch by the n-grams of its texts."""
        drops: list[Drop] = []
        shares: list[float] = []
        for texts in text_batches(batch.column("text").to_pylist()):
            self._filter_texts([text.lower() for text in texts], drops, shares)
        return outcome(self.name, batch, drops, {"evaluation_overlap": shares})

    def _filter_texts(self, texts: Sequence[str], drops: list[Drop], shares: list[float]) -> None:
        """Appends the dropped texts to `drops`, and the overlap of each text with evaluation sets to `shares`."""
        index = load_evaluation_index(self.options)
        lists = [split_words(text) for text in texts]
        matches = index.find(lists)
        sizes = np.array([*map(len, lists)], np.int64)
        firsts = np.cumsum(sizes) - sizes
        overlap = _overlap(matches, sizes)
        for row in np.flatnonzero(overlap.ngrams).tolist():
            if overlap.shares[row] >= self.options.min_share:
                match = int(np.searchsorted(matches.starts, firsts[row]))
                figures = {
                    "ngrams": int(overlap.ngrams[row]),
                    "found": overlap.shares[row],
                    "limit": self.options.min_share,
                    "evaluation": index.names[matches.owners[match]],
                }
                start = int(matches.starts[match] - firsts[row])
                trigger = _excerpt(texts[row], start, int(matches.lengths[match]))
                drops.append(Drop(len(shares) + row, "evaluation_text", figures, trigger))
        shares += overlap.shares


def _overlap(matches: NgramMatches, sizes: Int64Array) -> _Overlap:
    """Computes the overlap of each document; `sizes` (int64 [documents]) are their numbers of words."""
    document_of = np.repeat(np.arange(len(sizes)), sizes)
    ngrams = np.bincount(document_of[matches.starts], minlength=len(sizes))
    changes = np.zeros(len(document_of) + 1, np.int64)
    np.add.at(changes, matches.starts, 1)
    np.add.at(changes, matches.starts + matches.lengths, -1)
    covered = np.bincount(document_of[np.cumsum(changes[:-1]) > 0], minlength=len(sizes))
    return _Overlap(ngrams, np.round(covered / np.maximum(sizes, 1), 4).tolist())


def _excerpt(text: str, start: int, length: int) -> str:
    """Returns `length` words of a text from word `start` on, with the text between them."""
    found = [*islice(word_pattern(text).finditer(text), start, start + length)]
    return text[found[0].start() : found[-1].end()]
