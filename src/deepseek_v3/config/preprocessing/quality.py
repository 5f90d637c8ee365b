"""The options of the quality stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deepseek_v3.config.base import Fraction, PositiveFloat
from deepseek_v3.config.data_config import AnyPath
from deepseek_v3.config.preprocessing.stage import StageConfig
from deepseek_v3.utils.printing import value_text

Bucket = Literal["head", "middle", "tail"]


class QualityConfig(StageConfig):
    """Judges documents by a classifier, a language model or both; with neither, by the published heuristic rules.

    `classifier`: a supervised fastText model, whose probability of `label` must be at least `min_score`. (DCLM, Li
    et al. 2024, keeps the best tenth instead: take the score that does so on a sample.)

    `language_model`: an n-gram model, ARPA or binary of KenLM. Documents are sorted by perplexity as in CCNet
    (Wenzek et al. 2020): below `head_limit` into the head, else below `middle_limit` into the middle, else into the
    tail. Limits of null are those in the file beside the model, where `dsv3 quality train` writes the percentiles
    30 and 60 of reference documents. The buckets in `keep` stay: head and middle, as in RedPajama-V2 (Weber et al.
    2024).
    """

    classifier: AnyPath | None = None
    label: Annotated[str, Field(min_length=1)] = "good"
    min_score: Fraction = 0.5
    language_model: AnyPath | None = None
    head_limit: PositiveFloat | None = None
    middle_limit: PositiveFloat | None = None
    keep: Annotated[tuple[Bucket, ...], Field(min_length=1)] = ("head", "middle")

    @model_validator(mode="after")
    def _limits_ascend(self) -> QualityConfig:
        head, middle = self.head_limit, self.middle_limit
        if (head is None) != (middle is None) or (head is not None and middle is not None and head > middle):
            raise ValueError(
                f"head_limit = {value_text(head)} and middle_limit = {value_text(middle)}: expected both, the "
                "first below the second, or neither"
            )
        return self
