"""Options of the stage `mixing`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from deepseek_v3.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Real
from deepseek_v3.config.data_config import AnyPath
from deepseek_v3.config.preprocessing.stage import StageConfig


class MixingConfig(StageConfig):
    """How much of each source goes into the corpus, and how large the corpus is.

    `weights`: shares of the tokens by source; a name is a pattern such as `wiki/*.jsonl` over the files' names, the
    first that fits counts, and they are brought to a sum of 1. Without weights everything is one source.
    `tokens`: the size of the corpus; `for_config` takes it from a model's YAML file (its `training.total_tokens`).
    With neither, all tokens that there are. `max_epochs`: no document is repeated more often; 4 epochs train nearly
    as well as fresh text (Muennighoff et al. 2023, §6). `seed` chooses the documents.
    """

    alarm: Annotated[Real, Field(gt=0, le=1)] = 1.0  # a token budget is meant to leave documents out
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    tokens: PositiveInt | None = None
    for_config: AnyPath | None = None
    max_epochs: Annotated[Real, Field(ge=1, le=10_000)] = 4.0
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_budget(self) -> MixingConfig:
        if self.tokens is not None and self.for_config is not None:
            raise ValueError("tokens and for_config both give the size of the corpus, expected one of them")
        return self
