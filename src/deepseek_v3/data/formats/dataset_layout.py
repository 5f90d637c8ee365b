"""What the names of files say about a data set of Hugging Face: missing files, and splits for evaluation.

The names are those of `save_to_disk` (train/data-00000-of-00003.arrow) and of the hub
(data/train-00000-of-00003.parquet).
"""

from __future__ import annotations

import re
from collections.abc import Collection

_NUMBERED = re.compile(r"(?P<stem>.*-)(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.[\w.]+)")
_EVALUATION_SPLIT = re.compile(
    r"(?:.*/)?(?P<split>test|validation|valid|val|dev|eval)(?:-|/data-)\d{5}-of-\d{5}\.(?:arrow|parquet)"
)


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
