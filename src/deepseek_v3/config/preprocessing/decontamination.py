"""The options of the stage that removes documents that hold texts of evaluation sets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from deepseek_v3.config.base import Fraction, Integer
from deepseek_v3.config.data_config import AnyPath
from deepseek_v3.config.preprocessing.stage import StageConfig

NgramLength = Annotated[Integer, Field(ge=1, le=100)]


class DecontaminationConfig(StageConfig):
    """What must not be learnt, and how much of it a document must share to be dropped.

    `evaluation`: files or folders of evaluation sets, of which each of `fields` of each record is a text. Texts
    match by `ngram` consecutive words, shorter ones as a whole if they have at least `min_ngram` words: 13 and 8 in
    GPT-3 (Brown et al. 2020, appendix C). A document goes if there is a match and matches cover at least
    `min_share` of its words; 0: with any match.
    """

    evaluation: tuple[AnyPath, ...] = ()
    fields: Annotated[tuple[str, ...], Field(min_length=1)] = ("text",)
    ngram: NgramLength = 13
    min_ngram: NgramLength = 8
    min_share: Fraction = 0.0

    @model_validator(mode="after")
    def _lengths_ascend(self) -> DecontaminationConfig:
        if self.min_ngram > self.ngram:
            raise ValueError(f"min_ngram = {self.min_ngram}: expected at most ngram = {self.ngram}")
        return self
