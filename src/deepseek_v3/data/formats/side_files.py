"""Files below an input that hold no documents: what accompanies data files, and the outputs of earlier runs.

The names are those that Hugging Face data sets, Spark and Delta tables and archives have. Without data files beside
them, such as in a folder of source code, these files are documents like all others.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from deepseek_v3.data.formats.file_types import format_of

_TEXTS = re.compile(
    r"(readme|licen[sc]e|copying|notice|authors|contributing|changelog|citation|code_of_conduct|security|datasheet"
    r"|dataset_card|(sha\d+|md5)?(check)?sums?)([._-].*)?|_.*",
    re.IGNORECASE,
)
_OBJECTS = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json|croissant\.json|datapackage\.json|_.*")
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
    with_data = {folder for name in names if _is_data(name) for folder in _folders(name)}
    found = {name: _side_file(name, runs, outputs, with_data) for name in names}
    return {name: side_file for name, side_file in found.items() if side_file is not None}


def _side_file(name: str, runs: set[str], outputs: set[str], with_data: set[str]) -> SideFile | None:
    folders = _folders(name)
    if "" in runs and not name.startswith("data/"):
        return SideFile(name, "is not the corpus, but another output of the run in this folder")
    if output := next((folder for folder in folders if folder and folder in outputs), None):
        return SideFile(f"{output}/", "is the output of an earlier run; name its folder `data` to read it")
    if _parent(name) in with_data and _accompanies_data(_base(name)):
        return SideFile(name, "accompanies data files, and holds no documents")
    if folder := next((folder for folder in folders if _base(folder) in _FOLDERS), None):
        return SideFile(f"{folder}/", "is a folder that Spark or Delta keeps beside data files")
    return None


def _accompanies_data(name: str) -> bool:
    format_ = format_of(name)
    kind = None if format_ is None else format_.name
    return bool((kind == "text" and _TEXTS.fullmatch(name)) or (kind == "json" and _OBJECTS.fullmatch(name)))


def _is_data(name: str) -> bool:
    """Whether a file holds many documents, by its format."""
    format_ = format_of(name)
    return format_ is not None and format_.place != "file" and not _accompanies_data(_base(name))


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _folders(name: str) -> list[str]:
    """The folders that hold a file, the outermost first; the input itself is ""."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:number]) for number in range(len(parts) + 1)]
