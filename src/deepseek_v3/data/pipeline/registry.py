"""The stages by the names that a configuration gives them. A new stage is one import and one line of `STAGES`."""

from __future__ import annotations

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.decontamination import Decontaminator
from deepseek_v3.data.deduplication import ExactDeduplicator, MinHashDeduplicator
from deepseek_v3.data.heuristics import HeuristicFilter
from deepseek_v3.data.language import LanguageFilter
from deepseek_v3.data.mixing import Mixer
from deepseek_v3.data.pii import PiiMasker
from deepseek_v3.data.preliminary_cleaning import PreliminaryCleaner
from deepseek_v3.data.quality_filtering.filter import QualityFilter
from deepseek_v3.data.stages import GlobalStage, Stage
from deepseek_v3.data.tokens.tokenizer import TokenCounter

STAGES: dict[str, type[Stage] | type[GlobalStage]] = {
    "preliminary_cleaning": PreliminaryCleaner,
    "exact_deduplication": ExactDeduplicator,
    "deduplication": MinHashDeduplicator,
    "heuristic_filters": HeuristicFilter,
    "language": LanguageFilter,
    "quality_filtering": QualityFilter,
    "pii": PiiMasker,
    "decontamination": Decontaminator,
    "mixing": Mixer,
}


def build_stage(config: PreprocessConfig, name: str) -> Stage | GlobalStage:
    """Builds the stage `name` with the options that the configuration has for it."""
    options = getattr(config, name).model_dump(mode="json")
    if name == "mixing":
        options["counter"] = TokenCounter(config.tokenizer, config.bytes_per_token)
    return STAGES[name](**options)
