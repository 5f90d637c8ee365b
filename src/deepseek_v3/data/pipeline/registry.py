"""Where the stages live. Nothing heavy is imported here: a run brings in the stages that it has."""

from __future__ import annotations

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.utils.process_pool import start_fork_server

STAGES = {
    "preliminary_cleaning": "deepseek_v3.data.preliminary_cleaning:PreliminaryCleaner",
    "exact_deduplication": "deepseek_v3.data.deduplication:ExactDeduplicator",
    "deduplication": "deepseek_v3.data.deduplication:MinHashDeduplicator",
    "heuristic_filters": "deepseek_v3.data.heuristics:HeuristicFilter",
    "language": "deepseek_v3.data.language:LanguageFilter",
    "quality_filtering": "deepseek_v3.data.quality_filtering.filter:QualityFilter",
    "pii": "deepseek_v3.data.pii:PiiMasker",
    "decontamination": "deepseek_v3.data.decontamination:Decontaminator",
    "mixing": "deepseek_v3.data.mixing:Mixer",
}
_TASKS = "deepseek_v3.data.pipeline.tasks"  # and with it all that tasks are made of, but for the stages
_KERNELS = "deepseek_v3.data.deduplication.kernels.numba_kernels"  # passed over where Numba is not installed


def preload(config: PreprocessConfig) -> None:
    """Starts the process that worker processes are forked from, which imports what they will need.

    It does so beside the caller, who may have imports and plans of its own to make meanwhile.
    """
    modules = [_TASKS, *(STAGES[name].split(":")[0] for name in config.pipeline)]
    if {"deduplication", "exact_deduplication"} & {*config.pipeline}:
        modules.append(_KERNELS)
    start_fork_server(modules)
