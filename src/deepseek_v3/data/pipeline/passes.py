"""Groups the stages of a configuration into passes over the corpus."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.registry import build_stage
from deepseek_v3.data.pipeline.unique_ids import UniqueIds
from deepseek_v3.data.stages import GlobalStage, Stage


@dataclass(frozen=True)
class Pass:
    """One pass over the corpus: applies the decisions of `global_stages`, then `stages`, to each part."""

    global_stages: tuple[GlobalStage, ...]
    stages: tuple[Stage, ...]


def build_passes(config: PreprocessConfig) -> tuple[Pass, ...]:
    """Builds the stages of a configuration and groups them into passes.

    There are at least two passes, since the check for unique ids needs all ids of the corpus. Neighbouring global
    stages share a pass, unless one of them changes the texts that the next one compares.
    """
    groups: list[tuple[list[GlobalStage], list[Stage]]] = [([], [])]
    for name in config.pipeline:
        stage = build_stage(config, name)
        global_stages, stages = groups[-1]
        if isinstance(stage, Stage):
            stages.append(stage)
            continue
        if len(groups) == 1 or stages or global_stages[-1].changes_texts:
            groups.append(([], []))
        groups[-1][0].append(stage)
    if len(groups) == 1:
        groups.append(([], []))
    groups[1][0].insert(0, UniqueIds())
    return tuple(Pass(tuple(global_stages), tuple(stages)) for global_stages, stages in groups)
