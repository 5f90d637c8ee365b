"""The stages of a configuration, in the passes over the corpus that they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.registry import STAGES
from deepseek_v3.data.pipeline.unique_ids import UniqueIds
from deepseek_v3.data.stages import GlobalStage, Stage
from deepseek_v3.data.tokens.tokenizer import TokenCounter
from deepseek_v3.utils.lazily import imported


@dataclass(frozen=True)
class Pass:
    """One reading of the corpus: first the decisions of `corpus` stages are carried out, then `stages` applied."""

    global_stages: tuple[GlobalStage, ...]
    stages: tuple[Stage, ...]


def build_passes(config: PreprocessConfig) -> tuple[Pass, ...]:
    """The passes of a configuration: at least two, since ids must be unique in the whole corpus.

    Neighbouring corpus stages share a pass, unless one of them changes texts that the next one judges.
    """
    groups: list[tuple[list[GlobalStage], list[Stage]]] = [([], [])]
    for name in config.pipeline:
        stage = _stage(config, name)
        corpus, stages = groups[-1]
        if isinstance(stage, Stage):
            stages.append(stage)
            continue
        if len(groups) == 1 or stages or corpus[-1].changes_texts:
            groups.append(([], []))
        groups[-1][0].append(stage)
    if len(groups) == 1:
        groups.append(([], []))
    groups[1][0].insert(0, UniqueIds())
    return tuple(Pass(tuple(corpus), tuple(stages)) for corpus, stages in groups)


def _stage(config: PreprocessConfig, name: str) -> Stage | GlobalStage:
    options: dict[str, Any] = getattr(config, name).model_dump(mode="json")
    if name == "mixing":
        options["counter"] = TokenCounter(config.tokenizer, config.bytes_per_token)
    stage: Stage | GlobalStage = imported(STAGES[name])(**options)
    return stage
