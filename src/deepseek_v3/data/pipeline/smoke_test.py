"""Checks that the data pipeline works on this machine: cleans, filters and tokenizes synthetic text."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from deepseek_v3.config.loading import section_from_dict
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.pipeline.run import run_pipeline
from deepseek_v3.data.pipeline.run_folder import checksum
from deepseek_v3.data.sample_corpora import write_damaged_corpus
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import configure_logging, get_logger

_DOCUMENTS = 3000
_PIPELINE = ("preliminary_cleaning", "exact_deduplication", "deduplication", "heuristic_filters", "pii")

_log = get_logger("Check")


def smoke_test() -> None:
    """Writes a damaged corpus, cleans it with one worker and with two, tokenizes it, and checks the results.

    Takes less than 30 s. Raises DataError with the first check that fails.
    """
    configure_logging()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broken = write_damaged_corpus(folder / "raw", _DOCUMENTS)
        runs = [_run(folder, workers) for workers in (1, 2)]
        for what, holds in _checks(folder, broken, *runs):
            if not holds:
                raise DataError(f"the data pipeline does not work on this machine: {what}: no")
            _log.info("%s: yes", what)


def _run(folder: Path, workers: int) -> dict[str, Any]:
    fields = {
        "input_path": str(folder / "raw"),
        "output_dir": str(folder / f"clean-{workers}"),
        "pipeline": list(_PIPELINE),
        "workers": workers,
        "work_unit_size": "256KB",
        "shard_size": "1MB",
    }
    return run_pipeline(section_from_dict(PreprocessConfig, fields, "smoke test"))


def _checks(
    folder: Path, broken: dict[str, int], one: dict[str, Any], two: dict[str, Any]
) -> Iterator[tuple[str, bool]]:
    counts = one["counts"]
    stats = orjson.loads((folder / "clean-1" / "stats.json").read_bytes())
    duplicates = sum(stage["in"]["documents"] - stage["out"]["documents"] for stage in stats["stages"][1:3])
    yield (
        "every record is kept, dropped or quarantined",
        counts["input"] == sum(counts[name] for name in ("kept", "dropped", "quarantined")),
    )
    yield "every kind of damage is in quarantine", broken.keys() == stats["quarantined"].keys()
    yield "copies and near copies are found", 0.15 * _DOCUMENTS < duplicates < 0.25 * _DOCUMENTS
    yield (
        "one worker and two write the same bytes",
        _checksums(folder / "clean-1") == _checksums(folder / "clean-2"),
    )
    yield "both runs count the same", counts == two["counts"]
    summary = tokenize_corpus(
        str(folder / "clean-1" / "data"),
        folder / "tokens",
        vocab_size=512,
        tokenizer=None,
        holdout=0.02,
        fim_rate=0.0,
        seed=0,
    )
    documents = summary.train.documents + summary.holdout.documents
    yield "every kept document becomes tokens", documents == counts["kept"]


def _checksums(output: Path) -> dict[str, str]:
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(output).as_posix(): checksum(path) for path in files}
