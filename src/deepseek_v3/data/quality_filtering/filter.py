"""The stage that filters documents by a quality model, or by the published rules if no model is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepseek_v3.config.filter_config import Bucket, QualityConfig
from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.data.arrays import Float32Array
from deepseek_v3.data.documents import with_column
from deepseek_v3.data.heuristics import HeuristicFilter
from deepseek_v3.data.quality_filtering.fasttext import load_fasttext
from deepseek_v3.data.quality_filtering.ngram_training import PerplexityLimits
from deepseek_v3.data.quality_filtering.perplexity_score import load_language_model
from deepseek_v3.data.stages import DROPPED, Drop, Outcome, Stage, outcome
from deepseek_v3.utils.errors import DataError


class QualityFilter(Stage):
    """Drops documents of low quality.

    Takes the options of `QualityConfig`. A classifier adds the column `quality_score` (float32), a language model
    the columns `perplexity` (float32) and `bucket`. Reasons: `low_quality_score`, `perplexity_head`,
    `perplexity_middle`, `perplexity_tail`; without a model, those of `HeuristicFilter`. Raises DataError if a
    model, its label or its limits are missing.
    """

    name = "quality_filtering"

    def __init__(self, **options: Any) -> None:
        self.options = section_from_dict(QualityConfig, options, "QualityFilter")
        for field in ("classifier", "language_model"):
            path = getattr(self.options, field)
            if path is not None and not path.is_file():
                raise DataError(
                    f"quality_filtering.{field} = {path}: is not a file; train a model with `dsv3 quality train`"
                )

    def apply(self, batch: pa.RecordBatch) -> Outcome:
        """Filters a batch: first by the classifier, then by the language model."""
        if self.options.classifier is None and self.options.language_model is None:
            return self._apply_rules(batch)
        texts = batch.column("text").to_pylist()
        drops: dict[int, Drop] = {}
        observed: dict[str, Sequence[Any]] = {}
        if self.options.classifier is not None:
            scores = _quality_scores(self.options.classifier, self.options.label, texts)
            batch = with_column(batch, pa.field("quality_score", pa.float32()), pa.array(scores))
            observed["quality_score"] = scores.tolist()
            drops |= self._low_scores(observed["quality_score"], texts)
        if self.options.language_model is not None:
            perplexities = load_language_model(self.options.language_model).perplexities(texts).astype(np.float32)
            buckets = self._buckets(perplexities)
            batch = with_column(batch, pa.field("perplexity", pa.float32()), pa.array(perplexities))
            batch = with_column(batch, pa.field("bucket", pa.string()), buckets)
            observed |= {"perplexity": perplexities.tolist(), "bucket": buckets}
            drops = self._high_perplexities(observed["perplexity"], buckets, texts) | drops
        return outcome(self.name, batch, [*drops.values()], observed)

    def _apply_rules(self, batch: pa.RecordBatch) -> Outcome:
        result = HeuristicFilter(preset=self.options.preset).apply(batch)
        names = pa.array([self.name] * result.dropped.num_rows, pa.string())
        return replace(result, dropped=with_column(result.dropped, DROPPED.field("stage"), names))

    def _low_scores(self, scores: Sequence[float], texts: Sequence[str]) -> dict[int, Drop]:
        limit = self.options.min_score
        return {
            row: Drop(row, "low_quality_score", {"found": round(score, 4), "limit": limit}, texts[row])
            for row, score in enumerate(scores)
            if score < limit
        }

    def _high_perplexities(
        self, perplexities: Sequence[float], buckets: Sequence[Bucket], texts: Sequence[str]
    ) -> dict[int, Drop]:
        return {
            row: Drop(row, f"perplexity_{bucket}", {"found": round(perplexities[row], 1)}, texts[row])
            for row, bucket in enumerate(buckets)
            if bucket not in self.options.keep
        }

    def _buckets(self, perplexities: Float32Array) -> list[Bucket]:
        head, middle = self._limits()
        names: tuple[Bucket, ...] = ("head", "middle", "tail")
        return [names[index] for index in np.searchsorted([head, middle], perplexities, side="right").tolist()]

    def _limits(self) -> tuple[float, float]:
        options = self.options
        if options.head_limit is not None and options.middle_limit is not None:
            return options.head_limit, options.middle_limit
        assert options.language_model is not None
        limits = PerplexityLimits.read(options.language_model)
        if limits is None:
            raise DataError(
                f"{options.language_model}: has no limits file beside it; set quality_filtering.head_limit and "
                "middle_limit, or train the model with `dsv3 quality train --text`"
            )
        return limits.head, limits.middle


def _quality_scores(path: Path, label: str, texts: Sequence[str]) -> Float32Array:
    model = load_fasttext(path)
    return model.probabilities(texts)[:, model.index(label)]
