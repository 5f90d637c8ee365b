"""Writes the outputs of a run: data, dropped documents, quarantine, statistics, report and manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.formats.inputs import Inputs
from deepseek_v3.data.formats.quarantine import REPAIRS, SKIPPED
from deepseek_v3.data.formats.writing import RecordWriter
from deepseek_v3.data.pipeline.global_stages import read_figures
from deepseek_v3.data.pipeline.passes import Pass
from deepseek_v3.data.pipeline.resume import describe_run, read_run_json, write_run_json
from deepseek_v3.data.pipeline.run_folder import (
    DROPPED_FILE,
    QUARANTINED_FILE,
    SHARD_PREFIX,
    STATS_FILE,
    Part,
    RunFolder,
    checksum,
    read_table,
    verify_part,
)
from deepseek_v3.data.pipeline.stats import Stats, empty_stage_counts
from deepseek_v3.data.pipeline.unique_ids import UniqueIds
from deepseek_v3.data.report.overview import QUARANTINE
from deepseek_v3.data.report.page import write_report
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger

RESULT_FILES = ("stats.json", "report.html")
_ROWS_PER_FILE = 1_000_000

_log = get_logger("Preprocess")


def write_outputs(
    config: PreprocessConfig, run_folder: RunFolder, passes: Sequence[Pass], shards: Sequence[Part], inputs: Inputs
) -> dict[str, Any]:
    """Writes all outputs and returns the manifest. After an interruption, the next call writes them again."""
    folders = [run_folder.parts(number) for number in range(len(passes) - 1)]
    parts = [folder / name for folder in folders for name in read_run_json(folder / "complete.json")["parts"]]
    parts += [shard.folder for shard in shards]
    totals = Stats()
    for part in parts:
        verify_part(part, [STATS_FILE, DROPPED_FILE, QUARANTINED_FILE])
        totals.add(Stats.from_json((part / STATS_FILE).read_bytes()))
    balance = _balance(config, run_folder, parts, totals, sum(shard.rows for shard in shards))
    files = [_move_shard(run_folder, shard) for shard in shards]
    stats = _stats(config, run_folder, passes, totals, balance)
    for name, records in stats["repaired"].items():
        _log.warning("%s records were repaired (%s): %s", f"{records:,}", name, REPAIRS[name])
    for name, number in stats["skipped"].items():
        _log.warning("%s are no documents (%s): %s", f"{number:,}", name, SKIPPED[name])
    stats_file, report_file = (run_folder.output / name for name in RESULT_FILES)
    write_run_json(stats_file, stats)
    write_report(stats, report_file)
    manifest = {
        **describe_run(config, inputs.files),
        "ignored": [ignored._asdict() for ignored in inputs.ignored],
        "counts": balance,
        "repaired": stats["repaired"],
        "skipped": stats["skipped"],
        "alarms": stats["alarms"],
        "outputs": files,
        "other_outputs": _other_outputs(run_folder.output),
    }
    write_run_json(run_folder.manifest, manifest)
    shutil.rmtree(run_folder.work, ignore_errors=True)
    return manifest


def _other_outputs(output: Path) -> list[dict[str, Any]]:
    """The entries of all other output files in the manifest."""
    paths = [*sorted(output.glob("dropped/*")), *sorted(output.glob("quarantine/*"))]
    paths += [output / name for name in RESULT_FILES]
    return [
        {"file": path.relative_to(output).as_posix(), "bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in paths
    ]


def _balance(
    config: PreprocessConfig, run_folder: RunFolder, parts: Sequence[Path], totals: Stats, written: int
) -> dict[str, int]:
    """Writes the dropped documents and quarantined records, and checks that the counts add up to the input."""
    counts = totals.counts
    balance = {
        "input": counts.get("read", {}).get("records", 0),
        "kept": written - counts.get("kept", {}).get("copies", 0),
        "dropped": _write_all(parts, DROPPED_FILE, run_folder.output / "dropped", config.output_format),
        "quarantined": _write_all(parts, QUARANTINED_FILE, run_folder.output / "quarantine", config.output_format),
        "copies": counts.get("kept", {}).get("copies", 0),
    }
    if balance["input"] != balance["kept"] + balance["dropped"] + balance["quarantined"]:
        raise AssertionError(
            f"documents were lost or doubled: {balance}; the run's folder {run_folder.work} is kept"
        )
    return balance


def _write_all(parts: Sequence[Path], name: str, folder: Path, output_format: str) -> int:
    """Writes the rows of the file `name` of all parts, in order. Returns the number of records they represent."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tables = (read_table(part / name) for part in parts)
    records = 0
    for number, batches in enumerate(_group_batches(tables)):
        with RecordWriter(folder / f"part-{number:05d}.{output_format}") as writer:
            for batch in batches:
                writer.write(batch)
                records += (
                    pc.sum(batch.column("records")).as_py() if "records" in batch.schema.names else batch.num_rows
                )
    return records


def _group_batches(tables: Iterable[pa.Table]) -> Iterator[list[pa.RecordBatch]]:
    """Groups the batches of the tables, about a million rows each."""
    group: list[pa.RecordBatch] = []
    rows = 0
    for table in tables:
        group += [batch for batch in table.to_batches() if batch.num_rows]
        rows += table.num_rows
        if rows >= _ROWS_PER_FILE:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _move_shard(run_folder: RunFolder, shard: Part) -> dict[str, Any]:
    """Moves the file of a shard to `data/`, unless it is there already, and returns its entry in the manifest."""
    name = next(name for name in shard.checksums if name.startswith(SHARD_PREFIX))
    target = run_folder.output / "data" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if (shard.folder / name).exists():
        verify_part(shard.folder, [name])
        (shard.folder / name).replace(target)
    elif not target.exists() or checksum(target) != shard.checksums[name]:
        raise DataError(f"{target}: was changed or removed since the run wrote it; remove {run_folder.output}")
    return {
        "file": f"data/{name}",
        "documents": shard.rows,
        "text_bytes": shard.text_bytes,
        "bytes": target.stat().st_size,
        "xxh3_128": shard.checksums[name],
    }


def _stats(
    config: PreprocessConfig, run_folder: RunFolder, passes: Sequence[Pass], totals: Stats, balance: dict[str, int]
) -> dict[str, Any]:
    counts = totals.counts
    kept = counts.get("kept", {})
    counted = config.tokenizer is not None and kept.get("tokens", 0) > 0
    figures = {
        stage.name: read_figures(run_folder.decisions(number, stage.name))
        for number, each in enumerate(passes)
        for stage in each.global_stages
    }
    repaired = {**counts.get("repaired", {}), "id_qualified": figures[UniqueIds.name]["qualified"]}
    stages = [
        {"name": name, "figures": figures.get(name, {}), **counts.get("stages", {}).get(name, empty_stage_counts())}
        for name in config.pipeline
    ]
    return {
        "counts": balance,
        "bytes_per_token": kept["bytes"] / kept["tokens"] if counted else config.bytes_per_token,
        "tokens_counted": counted,
        "read": counts.get("read", {}),
        "quarantined": counts.get("quarantined", {}),
        "repaired": {name: records for name, records in repaired.items() if records},
        "skipped": counts.get("skipped", {}),
        "stages": stages,
        "kept": kept,
        "samples": totals.samples,
        "alarms": [
            *_quarantine_warnings(config, balance, counts.get("quarantined", {})),
            *(warning for stage in stages for warning in _drop_warnings(config, stage)),
        ],
    }


def _quarantine_warnings(
    config: PreprocessConfig, balance: dict[str, int], reasons: dict[str, int]
) -> Iterator[dict[str, Any]]:
    limit = config.max_quarantine_warning
    share = balance["quarantined"] / max(balance["input"], 1)
    if share > limit:
        _log.warning(
            "%.1f%% of the records are in quarantine, above max_quarantine_warning of %.1f%% (%s); look at the "
            "errors in %s",
            *(100 * share, 100 * limit, ", ".join(f"{name}: {count:,}" for name, count in sorted(reasons.items()))),
            config.output_dir / "quarantine",
        )
        yield {"stage": QUARANTINE, "removed": round(share, 4), "limit": limit}


def _drop_warnings(config: PreprocessConfig, stage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    given, left = stage["in"]["documents"], stage["out"]["documents"]
    limit = getattr(config, stage["name"]).max_drop_warning
    if given and (given - left) / given > limit:
        share = round((given - left) / given, 4)
        _log.warning(
            "%s removed %.1f%% of its documents, above its max_drop_warning of %.1f%%; look at the samples in "
            "report.html",
            stage["name"],
            100 * share,
            100 * limit,
        )
        yield {"stage": stage["name"], "removed": share, "limit": limit}
