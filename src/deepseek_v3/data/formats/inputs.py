"""Finding the files of an input: below files, folders, patterns and addresses in stores."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from glob import has_magic
from itertools import pairwise, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.utils import glob_translate

from deepseek_v3.data.documents import is_hidden, walk_files
from deepseek_v3.data.formats.file_types import format_of, known_format, readable_suffixes
from deepseek_v3.data.formats.side_files import SideFile, find_side_files, missing_files
from deepseek_v3.data.formats.streams import InputFile
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.redaction import redact

# The fields in which stores give the version of an object, the most reliable first.
_VERSIONS = (
    "ETag",
    "etag",
    "oid",
    "blob_id",
    "md5Hash",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
_LIBRARIES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}
_WHILE_READ = (
    "while it was read; run the same command again if its content is the same as before, else remove the folder "
    ".work of the run"
)


class IgnoredFile(NamedTuple):
    """A file below the input that is not read, and the reason."""

    name: str
    reason: str


class Inputs(NamedTuple):
    """The files to read and the files that are skipped, both sorted by name."""

    files: list[InputFile]
    ignored: list[IgnoredFile]


class _Found(NamedTuple):
    """A file, and the reason why it is not read, or None; `label` names it, or the folder that is not read."""

    file: InputFile
    fault: str | None
    label: str


def find_inputs(input_path: str | Path | Sequence[str | Path], output_dir: Path | None = None) -> Inputs:
    """Finds the files of one or more inputs: files, folders, patterns with *, ?, [] and **, and addresses.

    The name of a file is its path below the given folder, or below the part of a pattern before its first wildcard.
    A pattern that matches a folder selects every file below it. Hidden files and folders are skipped, and so is
    __pycache__. Links are followed, but each folder is entered only once. A file that is found twice is taken once.
    Files below `output_dir`, outputs of earlier runs, and what accompanies data, such as README.md, are ignored.

    Raises DataError if an input does not exist or holds nothing that can be read, if two files would have the same
    name, and if a library that is needed to read them is not installed.
    """
    given = [input_path] if isinstance(input_path, (str, Path)) else list(input_path)
    if not given:
        raise DataError("input: nothing was given; expected a file, a folder, a pattern or an address")
    names: dict[str, _Found] = {}
    for one in sorted(map(str, given)):
        for found in _find_one(one, output_dir):
            known = names.get(found.file.path)
            # Keeps the longer name, so that the order of the inputs does not matter.
            if known is None or _rank(known.file.name) < _rank(found.file.name):
                names[found.file.path] = found
    return _separate(sorted(names.values(), key=lambda found: (found.file.name, found.file.path)))


def _rank(name: str) -> tuple[int, str]:
    return name.count("/"), name


def _separate(found: list[_Found]) -> Inputs:
    """Separates the readable files. Raises DataError if two names are equal or if a library is missing."""
    files = [one.file for one in found if one.fault is None]
    for file, following in pairwise(files):
        if file.name == following.name:
            raise DataError(
                f"{file.path} and {following.path}: would both be called {file.name!r}; give the folder that holds "
                "both instead, or a pattern such as folder/*/*.jsonl, so that their names differ"
            )
    for file in files:
        known_format(file).require(file)
    ignored = dict.fromkeys(IgnoredFile(one.label, one.fault) for one in found if one.fault is not None)
    return Inputs(files, [*ignored])


def _find_one(given: str, output_dir: Path | None) -> list[_Found]:
    """The files of one input. Raises DataError unless at least one of them can be read."""
    try:
        found = list(_walk_store(given, output_dir) if "://" in given else _walk_disk(Path(given), output_dir))
    except OSError as error:
        raise DataError(
            redact(f"{error.filename or given}: cannot be read: {error.strerror or error}", given)
        ) from None
    if not any(one.fault is None for one in found):
        others = f"found only {found[0].label}: {found[0].fault}; " if found else ""
        raise DataError(f"{given}: holds no text: {others}expected {readable_suffixes()}")
    return found


def _walk_disk(given: Path, output_dir: Path | None) -> Iterator[_Found]:
    root, pattern = (str(given), None) if given.exists() else _split_pattern(given.as_posix())
    if not Path(root).exists():
        raise DataError(f"{given}: does not exist; expected a file, a folder, a pattern or an address")
    if Path(root).is_file():
        paths = {Path(root).name: Path(root)}
    else:
        paths = {path.relative_to(root).as_posix(): path for path in walk_files(Path(root))}
    side_files = {} if Path(root).is_file() else find_side_files(paths)
    if not Path(root).is_file():
        yield from _missing(root, paths, pattern)
    here = Path.cwd()
    for name, path in paths.items():
        absolute = os.path.join(here, path)  # noqa: PTH118 -- a tenth of the time of Path: folders hold many files
        if not path.is_file():
            fault = "is a broken link, or not a regular file"
            yield _Found(InputFile(name, absolute, 0, ""), fault, name)
        elif output_dir is not None and _is_in(os.path.dirname(absolute), output_dir):  # noqa: PTH120
            fault = "is in the output_dir of this run"
            yield _Found(InputFile(name, absolute, 0, ""), fault, str(output_dir))
        elif _matches(pattern, name):
            yield _with_fault(_local_file(name, absolute), side_files.get(name))


def _local_file(name: str, path: str) -> InputFile:
    status = os.stat(path)  # noqa: PTH116
    state = f"{status.st_ino}:{status.st_ctime_ns}"
    return InputFile(name, path, status.st_size, str(status.st_mtime_ns), state)


def check_unchanged(file: InputFile) -> None:
    """Raises DataError if a file was changed, replaced or removed since `find_inputs` found it."""
    try:
        if file.is_remote:
            store, key = _open_store(file.path)
            store.invalidate_cache()
            infos = _list_store(store, key, file.path)
            if key not in infos:
                raise FileNotFoundError
            now = replace(file, size=infos[key]["size"] or 0, modified=_version(infos[key]))
        else:
            now = _local_file(file.name, file.path)
    except FileNotFoundError:
        raise DataError(redact(f"{file.path}: vanished {_WHILE_READ}", file.path)) from None
    if now != file:
        fields = [name for name in ("size", "modified", "state") if getattr(now, name) != getattr(file, name)]
        found = f"{fields[0]} {getattr(file, fields[0])}, now {getattr(now, fields[0])}"
        raise DataError(redact(f"{file.path}: changed {_WHILE_READ} ({found})", file.path))


@lru_cache
def _is_in(folder: str, outer: Path) -> bool:
    """Whether an absolute folder is `outer`, or below it, also through links."""
    return Path(folder).resolve().is_relative_to(outer.resolve())


def _walk_store(given: str, output_dir: Path | None) -> Iterator[_Found]:
    store, path = _open_store(given)
    if store.protocol == "file" or "file" in store.protocol:
        yield from _walk_disk(Path(path), output_dir)
        return
    root, pattern = _split_pattern(path.rstrip("/"))
    infos = _list_store(store, root, given)
    if not infos:
        raise DataError(f"{given}: nothing was found there; check the address and that you may read it")
    names = {key: _name_below(root, key, _is_web(store)) for key in infos}
    side_files = find_side_files(names.values()) if len(names) > 1 else {}
    if len(names) > 1:
        yield from _missing(store.unstrip_protocol(root), names.values(), pattern)
    for key, info in infos.items():
        name = names[key]
        if _matches(pattern, name) and not is_hidden(name):
            file = InputFile(name, store.unstrip_protocol(key), info["size"] or 0, _version(info))
            yield _with_fault(file, side_files.get(name))


def _missing(root: str, names: Collection[str], pattern: re.Pattern[str] | None) -> Iterator[_Found]:
    """The files that numbered files below `root` say are missing, where the pattern selects them."""
    for name, fault in missing_files(names).items():
        if _matches(pattern, name):
            yield _Found(InputFile(name, f"{root}/{name}", 0, ""), fault, name)


def _version(info: dict[str, Any]) -> str:
    """What a store gives as the version of an object."""
    return next((str(info[field]) for field in _VERSIONS if info.get(field) is not None), "")


def _name_below(root: str, key: str, is_web: bool) -> str:
    """The name of an object of a store: its path below `root`, on the web without query parameters."""
    name = PurePosixPath(key).name if key == root else PurePosixPath(key).relative_to(root).as_posix()
    return name.partition("?")[0] if is_web else name


def _list_store(store: AbstractFileSystem, root: str, given: str) -> dict[str, dict[str, Any]]:
    """The store's information on each file below an address, with its `size`, which is None if it is unknown."""
    try:
        found: dict[str, dict[str, Any]] = store.find(root, detail=True)
        for key, info in found.items():
            if info.get("size") is None:  # the listing of a web server has no sizes
                found[key] = {"size": None, **info, **store.info(key)}
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 -- each store's library raises its own types of errors
        raise DataError(redact(f"{given}: cannot be listed: {error}", given)) from None
    return found


def _is_web(store: AbstractFileSystem) -> bool:
    """Whether the addresses may have query parameters, such as a signature, that do not belong to a file's name."""
    protocols = [store.protocol] if isinstance(store.protocol, str) else store.protocol
    return not {"http", "https"}.isdisjoint(protocols)


def _open_store(given: str) -> tuple[AbstractFileSystem, str]:
    try:
        return url_to_fs(given)
    except ImportError as error:
        library = _LIBRARIES.get(given.partition("://")[0])
        run = f"run `pip install {library}`" if library else "install what it names"
        raise DataError(redact(f"{given}: cannot be opened: {error}; {run}", given)) from None
    except ValueError as error:
        problem = f"{given}: cannot be opened: {error}; expected a path or an address such as s3://bucket/folder"
        raise DataError(redact(problem, given)) from None


def _with_fault(file: InputFile, side_file: SideFile | None) -> _Found:
    if file.name != (printable := file.name.encode(errors="replace").decode()):
        return _Found(replace(file, name=printable), "its name is not UTF-8; rename it", printable)
    if side_file is not None:
        return _Found(file, side_file.reason, side_file.name)
    format_ = format_of(file.name)
    if format_ is None:
        return _Found(file, f"no format is known by the suffix {PurePosixPath(file.name).suffix!r}", file.name)
    return _Found(file, format_.fault(file), file.name)


def _split_pattern(pattern: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder before the first wildcard, and a pattern for the paths below it, or None without a wildcard."""
    parts = pattern.split("/")
    fixed = list(takewhile(lambda part: not has_magic(part), parts))
    if len(fixed) == len(parts):
        return pattern, None
    try:
        matcher = re.compile(glob_translate("/".join(parts[len(fixed) :])))
    except ValueError as error:
        raise DataError(f"{pattern}: {error}; write ** between slashes, as in folder/**/*.jsonl") from None
    return "/".join(fixed) or ("/" if pattern.startswith("/") else "."), matcher


def _matches(pattern: re.Pattern[str] | None, name: str) -> bool:
    """Whether a pattern matches a file, or a folder that contains it."""
    parts = name.split("/")
    return pattern is None or any(pattern.match("/".join(parts[: n + 1])) for n in range(len(parts)))
