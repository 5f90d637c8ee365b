"""Keys that outlive a run, and the documents of earlier runs as parts in front of this one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.resume import read_run_json, write_run_json
from deepseek_v3.data.pipeline.run_folder import IDS_FILE, RECORDS_FILE, Part, read_table, write_table
from deepseek_v3.data.stages import NumberedPart
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.text import format_value

_INDEX = "keys.json"


STAGES_WITH_KEYS = ("exact_deduplication", "deduplication")
_NO_PART_OF_KEYS = ("max_drop_warning", "accelerator", "cluster_threshold")


def key_options(config: PreprocessConfig, stage: str) -> dict[str, Any]:
    """The options that a stage's keys depend on, as JSON."""
    if stage not in STAGES_WITH_KEYS:
        return {}
    options = getattr(config, stage).model_dump(mode="json")
    return {name: value for name, value in options.items() if name not in _NO_PART_OF_KEYS}


def keep_keys(stage: str, options: dict[str, Any], parts: Sequence[Part], output: Path) -> None:
    """Moves a stage's keys of all parts to `output/keys/<stage>`, with the documents' ids."""
    folder = output / "keys" / stage
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        keys = part.folder / "keys" / stage
        if keys.is_dir():
            ids = read_table(part.folder / RECORDS_FILE).select(["id"])
            write_table(ids, keys / IDS_FILE)
            keys.rename(folder / part.name)
    write_run_json(folder / _INDEX, {"options": options, "parts": [[part.name, part.rows] for part in parts]})


def previous_parts(stage: str, options: dict[str, Any], runs: Sequence[Path]) -> list[NumberedPart]:
    """The documents of earlier runs as a stage numbers them, from 0 in the order of `runs`.

    Raises DataError where a run kept no keys of this stage, ConfigError where they were made with other options.
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
                    "use the same options to compare with an earlier run"
                )
        for name, rows in index["parts"]:
            parts.append(NumberedPart(folder / name, None, first, rows))
            first += rows
    return parts
