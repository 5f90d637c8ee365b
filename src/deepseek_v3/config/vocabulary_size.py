"""The vocabulary size of a model whose config leaves `model.vocab_size` open: that of its tokenizer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deepseek_v3.config.base import PositiveInt
from deepseek_v3.config.data_config import DataConfig

PUBLISHED_VOCABULARY = 129_280

_MULTIPLE = 128  # divides into tensor-core tiles, and over ranks that shard embedding and head


def fill_vocabulary(fields: dict[str, Any]) -> str | None:
    """Sets `model.vocab_size` in the fields of a run if it is missing or null.

    The size is the tokenizer's number of ids, rounded up to a multiple of 128. The tokenizer is that of the tokens
    at `data.path` or in `data.sources`, or the one that `data.corpus` will train; the largest counts, so that
    building the shards does not change the model. Without any, the size is the published 129,280. Returns the
    reason for the log; None if nothing was changed.
    """
    model, data = fields.get("model"), fields.get("data") or {}
    if not isinstance(model, dict) or model.get("vocab_size") is not None or not isinstance(data, dict):
        return None
    path = data.get("path", DataConfig.model_fields["path"].default)
    corpus, listed = data.get("corpus"), data.get("sources")
    sources = [source for source in listed if isinstance(source, dict)] if isinstance(listed, list) else []
    sizes = {
        f"the tokenizer of {place}": _count(_tokenizer_size(place) or _megatron_size(place, files.get("tokenizer")))
        for files in sources or [data]
        if (place := files.get("path", path))
    }
    sizes["data.corpus"] = _count(corpus.get("vocab_size")) if isinstance(corpus, dict) else 0
    known = {source: size for source, size in sizes.items() if size}
    if not known:
        model["vocab_size"] = PUBLISHED_VOCABULARY
        return f"{PUBLISHED_VOCABULARY:,} ids, as published: no tokens at {path} and no data.corpus yet"
    source = max(known, key=lambda name: known[name])
    model["vocab_size"] = -(-known[source] // _MULTIPLE) * _MULTIPLE
    return f"{model['vocab_size']:,} ids, for the {known[source]:,} of {source}, in multiples of {_MULTIPLE}"


def _count(value: object) -> int:
    """A positive number in any notation that a config accepts; 0 for other values."""
    try:
        return TypeAdapter(PositiveInt).validate_python(value)
    except ValidationError:
        return 0


def _tokenizer_size(path: object) -> object:
    """`vocab_size` in the index of token shards; None if it cannot be read."""
    if not isinstance(path, str | Path):
        return None
    index = _json_in(Path(path) / "index.json")
    return index.get("vocab_size") if isinstance(index, dict) else None


def _megatron_size(path: object, tokenizer: object) -> int | None:
    """The ids of the tokenizer.json of a Megatron-LM dataset; None if it cannot be read.

    The file is `tokenizer`, or the one beside the dataset. `path` is its prefix, or the folder of `train`.
    """
    if not isinstance(path, str | Path):
        return None
    if isinstance(tokenizer, str | Path):
        return _num_ids(Path(tokenizer))
    if _is_file(f"{path}/train.idx"):
        return _num_ids(Path(path))
    return _num_ids(Path(path).parent) if _is_file(f"{path}.idx") else None


def _is_file(path: str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 -- False for names too long


def _num_ids(tokenizer: Path) -> int | None:
    """One more than the largest id in a tokenizer.json, or in the one of a folder; None for any other file."""
    inside = tokenizer / "tokenizer.json"
    fields = _json_in(inside if _is_file(str(inside)) else tokenizer)
    try:
        vocabulary, added = fields["model"]["vocab"], fields.get("added_tokens") or []
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*ids, *(token["id"] for token in added)])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _json_in(path: Path) -> Any:
    """The content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
