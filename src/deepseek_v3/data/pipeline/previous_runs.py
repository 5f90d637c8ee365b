"""Keys that a finished run keeps, so that later runs find the duplicates of its documents.

A global stage numbers the documents of previous runs before those of the present run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.resume import read_run_json, write_run_json
from deepseek_v3.data.pipeline.run_folder import IDS_FILE, RECORDS_FILE, Part, finish_part, read_table, write_table
from deepseek_v3.data.stages import NumberedPart
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.text import format_value

_INDEX = "keys.json"
STAGES_WITH_KEYS = ("exact_deduplication", "deduplication")
_OPTIONS_WITHOUT_EFFECT_ON_KEYS = ("max_drop_warning", "accelerator", "cluster_threshold")


def key_options(config: PreprocessConfig, stage: str) -> dict[str, Any]:
    """The options of a stage that determine its keys, as JSON values."""
    if stage not in STAGES_WITH_KEYS:
        return {}
    options = getattr(config, stage).model_dump(mode="json")
    return {name: value for name, value in options.items() if name not in _OPTIONS_WITHOUT_EFFECT_ON_KEYS}


def keep_keys(stage: str, options: dict[str, Any], parts: Sequence[Part], output: Path) -> None:
    """Moves the keys of a stage for all parts to `output/keys/<stage>`, and adds the ids of the documents."""
    folder = output / "keys" / stage
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        keys = part.folder / "keys" / stage
        if keys.is_dir():
            ids = read_table(part.folder / RECORDS_FILE).select(["id"])
            write_table(ids, keys / IDS_FILE)
            finish_part(folder / part.name, keys, part.rows, 0, None)
            keys.rename(folder / part.name)
    write_run_json(folder / _INDEX, {"options": options, "parts": [[part.name, part.rows] for part in parts]})


def previous_parts(stage: str, options: dict[str, Any], runs: Sequence[Path]) -> list[NumberedPart]:
    """The parts of previous runs. Their documents are numbered from 0 in the order of `runs`.

    Raises DataError if a run kept no keys of this stage, and ConfigError if it made them with other options.
    """
    parts: list[NumberedPart] = []
    first = 0
    for run in runs if stage in STAGES_WITH_KEYS else ():
        folder = run / "keys" / stage
        if not (folder / _INDEX).exists():
            raise DataError(
                f"previous_runs: {run} holds no keys of {stage}; name the output_dir of a finished run with "
                f"keep_keys: true and {stage} in its pipeline"
            )
        index = read_run_json(folder / _INDEX)
        for name, value in index["options"].items():
            if options.get(name) != value:
                raise ConfigError(
                    f"{stage}.{name} = {format_value(options.get(name))}, and the keys in {run} were made "
                    f"with {format_value(value)}; "
                    "set the same value, or leave this run out of previous_runs"
                )
        for name, rows in index["parts"]:
            parts.append(NumberedPart(folder / name, None, first, rows))
            first += rows
    return parts
