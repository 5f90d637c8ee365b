"""Starts or resumes a run: same configuration, same input, and no other process in the output folder.

`run.json` describes the run. A finished part has a marker with checksums, and a finished pass has `complete.json`.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.data.formats.streams import InputFile
from deepseek_v3.data.pipeline.run_folder import Part, RunFolder, is_intact, read_part
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.files import atomic_write, remove_partials
from deepseek_v3.utils.locks import hold_lock
from deepseek_v3.utils.redaction import redact
from deepseek_v3.utils.text import format_value

FORMAT_VERSION = 4
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without hard links
# Options that do not change the output, and so may change when a run is resumed.
_RESOURCE_OPTIONS = ("output_dir", "engine", "ray_address", "workers", "memory")


def describe_run(config: PreprocessConfig, files: Sequence[InputFile]) -> dict[str, Any]:
    """Everything that determines the output, as JSON values: configuration, input files, files that stages read."""
    fields = {
        name: value for name, value in config.model_dump(mode="json").items() if name not in _RESOURCE_OPTIONS
    }
    described: dict[str, Any] = orjson.loads(
        orjson.dumps(
            {
                "format_version": FORMAT_VERSION,
                "config": fields,
                "inputs": [{"name": file.name, "size": file.size, "modified": file.modified} for file in files],
                "read_by_stages": _read_by_stages(config),
            },
        )
    )
    return described


def _read_by_stages(config: PreprocessConfig) -> list[dict[str, Any]]:
    """The existing files that the options of the stages name, such as models and evaluation sets."""
    named = [config.tokenizer]
    for stage in config.pipeline:
        for _, value in getattr(config, stage):
            named += value if isinstance(value, tuple) else [value]
    paths = [path for path in named if isinstance(path, Path)]
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [
        {"name": str(file), "size": file.stat().st_size, "modified": str(file.stat().st_mtime_ns)}
        for file in files
        if file.is_file()
    ]


def is_resumed(run_folder: RunFolder, described: dict[str, Any]) -> bool:
    """Whether the output folder holds an unfinished run, which this one resumes. Writes nothing.

    Raises DataError if the output folder holds anything but an unfinished run, or if that run began with another
    configuration or input.
    """
    if not run_folder.run_file.exists():
        strangers = (
            [path.name for path in run_folder.output.iterdir() if path != run_folder.work]
            if run_folder.output.exists()
            else []
        )
        if strangers:
            raise DataError(
                f"{run_folder.output}: holds {', '.join(sorted(strangers)[:5])} and no unfinished run; "
                "choose another output_dir, or remove it"
            )
        return False
    check_same_run(
        read_run_json(run_folder.run_file),
        described,
        run_folder.run_file,
        f"remove {run_folder.work} to start again",
    )
    return True


def start(run_folder: RunFolder, described: dict[str, Any]) -> None:
    """Starts a run, once nothing speaks against it any more.

    If shards start at the same time, the description of one of them is the claim that decides. Raises DataError for
    those whose description differs.
    """
    claim = run_folder.work / "claim.json"
    own = claim.with_name(f".claim.{uuid.uuid4().hex}.json")
    write_run_json(own, described)
    try:
        os.link(own, claim)  # unlike a rename, fails if the file exists
    except FileExistsError:
        check_same_run(read_run_json(claim), described, claim, f"remove {run_folder.work} to start again")
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    finally:
        own.unlink(missing_ok=True)
    write_run_json(run_folder.run_file, described)


def check_same_run(before: dict[str, Any], now: dict[str, Any], where: Path, advice: str) -> None:
    """Raises DataError with the first field or file that differs, unless both describe the same run."""
    if before["format_version"] != now["format_version"]:
        raise DataError(f"{where}: was written by another version of this program; {advice}")
    _check_files("input file", before["inputs"], now["inputs"], where, advice)
    _check_files("file", before["read_by_stages"], now["read_by_stages"], where, advice)
    config = PreprocessConfig.with_present_names(before["config"])
    for name, value in now["config"].items():
        if config.get(name) != value and _masked(config.get(name)) != value:
            raise DataError(
                f"{where}: the run began with another {name}: {format_value(config.get(name))}, "
                f"now {format_value(value)}; "
                f"set it back, choose another output_dir, or {advice}"
            )


def _masked(value: Any) -> Any:
    """Masks secrets in the stored value: former versions wrote them into `run.json`."""
    if isinstance(value, str):
        return redact(value)
    return [_masked(each) for each in value] if isinstance(value, list) else value


def _check_files(
    kind: str, before: list[dict[str, Any]], now: list[dict[str, Any]], where: Path, advice: str
) -> None:
    known = {file["name"]: file for file in before}
    found = {file["name"]: file for file in now}
    for name in sorted(known.keys() | found.keys()):
        if known.get(name) == found.get(name):
            continue
        change = "was changed" if name in known and name in found else "is new" if name in found else "is gone"
        raise DataError(
            f"{where}: the {kind} {name} {change} since the run began; put it back, choose another output_dir, "
            f"or {advice}"
        )


@contextmanager
def run_lock(run_folder: RunFolder, shared: bool) -> Iterator[None]:
    """Holds the run's lock, which shards share; raises as `hold_lock` does."""
    with hold_lock(run_folder.work / "lock", run_folder.output, "choose another output_dir", shared=shared):
        yield


def completed_parts(folder: Path) -> list[Part] | None:
    """The parts of the pass in `folder`; None if it is not complete. Raises DataError if parts are missing."""
    marker = folder / "complete.json"
    if not marker.exists():
        return None
    parts = [read_part(folder / name) for name in read_run_json(marker)["parts"]]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        raise DataError(
            f"{folder}: finished parts are missing; remove the folder .work that contains it and run again"
        )
    return found


def mark_complete(folder: Path, parts: Sequence[Part]) -> None:
    """Marks the pass in `folder` as complete."""
    write_run_json(folder / "complete.json", {"parts": [part.name for part in parts]})


def count_finished(run_folder: RunFolder) -> int:
    """The number of finished parts of all passes."""
    folders = sorted(run_folder.work.glob("pass-*")) + [run_folder.shards]
    return sum(read_part(path) is not None for folder in folders if folder.is_dir() for path in folder.iterdir())


def reopen_damaged(folder: Path, *, is_first: bool, is_released: bool) -> int:
    """Removes the damaged parts of a complete pass, which is then no longer complete; returns their number.

    Raises DataError if the pass cannot do them again, because the documents that it read are released.
    """
    marker = folder / "complete.json"
    names = read_run_json(marker)["parts"]
    parts = [read_part(folder / name) for name in names]
    damaged = [
        folder / name
        for name, part in zip(names, parts, strict=True)
        if part is None or not is_intact(part, is_released=is_released)
    ]
    if damaged and not is_first:
        raise DataError(
            f"{damaged[0]}: was changed since the run wrote it, and cannot be made again from what is left; "
            "remove the folder .work that contains it and run again"
        )
    if damaged:
        marker.unlink()
    for path in damaged:
        shutil.rmtree(path)
    return len(damaged)


def remove_partial_outputs(run_folder: RunFolder, names: Sequence[str]) -> None:
    """Removes the half-written files that killed processes left beside the outputs with these names."""
    for path in (run_folder.manifest, *(run_folder.output / name for name in names)):
        remove_partials(path)
    for folder in run_folder.output.glob("keys/*"):
        remove_partials(folder / "keys.json")


def discard_damaged(folder: Path) -> int:
    """Removes unfinished folders and damaged parts of a pass; returns the number of damaged parts."""
    damaged = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        part = read_part(path)
        if path.is_dir() and (path.name.endswith(".partial") or part is None or not is_intact(part)):
            shutil.rmtree(path, ignore_errors=True)
            damaged += not path.name.endswith(".partial")
    return damaged


def read_run_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a run. Raises DataError if it is damaged."""
    try:
        fields: dict[str, Any] = orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is damaged: {error}; remove the run's folder .work and run again") from None
    return fields


def write_run_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes a JSON file of a run atomically, with sorted keys."""
    with atomic_write(path) as partial:
        partial.write_bytes(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2) + b"\n")
