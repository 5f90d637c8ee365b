"""What names say about the files of an input: which accompany data, are outputs of earlier runs, or are missing.

The names are those that Hugging Face data sets, Spark and Delta tables and archives have. A folder is one of data
if it holds data files, and at most as many documents of other names. In a folder of source code or documentation,
with a few data files in it, the same names are documents like all others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from deepseek_v3.data.formats.file_types import format_of

_TEXTS = re.compile(
    r"(readme|licen[sc]e|copying|notice|authors|contributing|changelog|citation|code_of_conduct|security|datasheet"
    r"|dataset_card|(sha\d+|md5)?(check)?sums?)([._-].*)?",
    re.IGNORECASE,
)
_OBJECTS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|croissant\.json|datapackage\.json")
_OF_LIBRARY = {"dataset_info.json", "state.json"}  # what the library datasets leaves beside Arrow files
_CACHE = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # results of its `map` and `filter`
# What Spark, Hadoop, Delta, Databricks and Parquet write beside data files, with or without a suffix.
_MARKERS = re.compile(
    r"_(success|committed|started|metadata|common_metadata|last_checkpoint|schema|symlink_format_manifest|manifest)"
    r"([._].*)?",
    re.IGNORECASE,
)
# JSON files that describe a package or configure a tool: no data, and no documents.
_PACKAGE_FILES = re.compile(
    r"(package|package-lock|npm-shrinkwrap|composer|bower|lerna|component|deno|nx|turbo|angular|tsconfig|jsconfig"
    r"|tslint|eslintrc|renovate|vercel|manifest)([._-].*)?\.json|.*rc\.json",
    re.IGNORECASE,
)
# Files of a data set of Hugging Face: of `save_to_disk`, train/data-00000-of-00003.arrow; on the hub,
# data/train-00000-of-00003.parquet.
_NUMBERED = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.[\w.]+)")
_EVALUATION_SPLIT = re.compile(
    r"(?:.*/)?(?P<split>test|validation|valid|val|dev|eval)(?:-|/data-)\d{5}-of-\d{5}\.(?:arrow|parquet)"
)
_FOLDERS = {"_delta_log", "_temporary", "_spark_metadata"}
_RUN = {"manifest.json", "stats.json", "report.html"}  # what a finished run of the pipeline leaves beside `data`
_TOKENS = {"index.json", "tokenizer.json"}


class SideFile(NamedTuple):
    """Why a file is not read: `name` is the file, or the folder with all that it holds."""

    name: str
    reason: str


def find_side_files(names: Collection[str]) -> dict[str, SideFile]:
    """Those of the files of an input that are not read, by name. Names are paths below the input."""
    files: dict[str, set[str]] = {}
    for name in names:
        files.setdefault(_parent(name), set()).add(_base(name))
    runs = {folder for folder, found in files.items() if found >= _RUN}
    outputs = runs | {folder for folder, found in files.items() if found >= _TOKENS}
    with_data = _folders_of_data(names)
    cached = {folder for folder, found in files.items() if not found.isdisjoint(_OF_LIBRARY)}
    found = {name: _side_file(name, runs, outputs, with_data, cached) for name in names}
    return {name: side_file for name, side_file in found.items() if side_file is not None}


def missing_files(names: Collection[str]) -> dict[str, str]:
    """The first missing file of each group of numbered files, and how many are missing."""
    groups: dict[tuple[str, int, str], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            key = match["stem"], int(match["total"]), match["suffix"]
            groups.setdefault(key, set()).add(int(match["number"]))
    missing: dict[str, str] = {}
    for (stem, total, suffix), numbers in groups.items():
        first = next((number for number in range(total) if number not in numbers), None)
        if first is not None:
            name = f"{stem}{first:05d}-of-{total:05d}{suffix}"
            missing[name] = f"is missing: only {len(numbers)} of {total} numbered files are there"
    return missing


def evaluation_splits(names: Collection[str]) -> list[str]:
    """The splits among the files of data sets that are meant for evaluation, by their names."""
    return sorted({match["split"] for name in names if (match := _EVALUATION_SPLIT.fullmatch(name))})


def _side_file(
    name: str, runs: set[str], outputs: set[str], with_data: set[str], cached: set[str]
) -> SideFile | None:
    folders = _folders(name)
    if "" in runs and not name.startswith("data/"):
        return SideFile(name, "is not the corpus, but another output of the run in this folder")
    if output := next((folder for folder in folders if folder and folder in outputs), None):
        return SideFile(f"{output}/", "is the output of an earlier run; name its folder `data` to read it")
    if _parent(name) in with_data and _accompanies_data(_base(name)):
        return SideFile(name, "accompanies data files, and holds no documents")
    if _parent(name) in cached and _CACHE.fullmatch(_base(name)):
        return SideFile(name, "is a cache of the library datasets, and no part of the data set")
    if folder := next((folder for folder in folders if _base(folder) in _FOLDERS), None):
        return SideFile(f"{folder}/", "is a folder that Spark or Delta keeps beside data files")
    return None


def _folders_of_data(names: Collection[str]) -> set[str]:
    """The folders that hold, at any depth, data files and at most as many documents with names of their own."""
    data: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    for name in names:
        format_, base = format_of(name), _base(name)
        if format_ is None or _accompanies_data(base) or _PACKAGE_FILES.fullmatch(base):
            continue
        counts = documents if format_.place == "file" else data
        counts.update(_folders(name))
    return {folder for folder, number in data.items() if number >= documents[folder]}


def _accompanies_data(name: str) -> bool:
    format_ = format_of(name)
    kind = None if format_ is None else format_.name
    if kind not in ("text", "json"):
        return False
    return bool(_MARKERS.fullmatch(name) or (_TEXTS if kind == "text" else _OBJECTS).fullmatch(name))


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _folders(name: str) -> list[str]:
    """The folders that hold a file, the outermost first; the input itself is ""."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:number]) for number in range(len(parts) + 1)]
