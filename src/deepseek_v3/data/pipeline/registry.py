"""The stages by the names that a configuration uses. A new built-in stage is an import and a line of `STAGES`.

Stages of other packages come from `config/extensions.py`. Stages are pickled to send them to worker processes, and
a pickle names the class by its module. That module must be importable in the worker: the worker processes of this
machine inherit `sys.path`, and on a Ray cluster every machine needs the module.
"""

from __future__ import annotations

from typing import Any

from deepseek_v3.config.extensions import find_filter
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
from deepseek_v3.data.tokens.token_counter import TokenCounter
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.text import format_value

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
    """Builds the stage `name` with the options that the configuration has for it.

    Raises ConfigError if another package adds the stage and its class does not fit.
    """
    options = getattr(config, name).model_dump(mode="json")
    if name == "mixing":
        options["counter"] = TokenCounter(config.tokenizer, config.bytes_per_token)
    if name in STAGES:
        return STAGES[name](**options)
    return _build_extension(name, options)


def _build_extension(name: str, options: dict[str, Any]) -> Stage | GlobalStage:
    extension = find_filter(name)
    assert extension is not None, "the configuration was checked"
    stage = extension.load()(**options)
    if not isinstance(stage, (Stage, GlobalStage)) or stage.name != name:
        kind, found = type(stage).__name__, getattr(stage, "name", None)
        raise ConfigError(
            f"filter {name}: its `load` gives a {kind} with the name {format_value(found)}; expected a subclass of "
            f"Stage or GlobalStage (deepseek_v3.data.stages) with the name {name}"
        )
    return stage
