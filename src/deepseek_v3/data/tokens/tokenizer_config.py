"""The files beside a `tokenizer.json` in a Hugging Face directory: special tokens, chat template, and token ids.

`tokenizer_config.json` names the special tokens and may hold the chat template, which newer versions of
Transformers write to `chat_template.jinja`. `generation_config.json` and `config.json` give the ids that end texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_v3.config.text_files import printable_path, read_json_object, read_text
from deepseek_v3.utils.errors import ConfigError, DataError
from deepseek_v3.utils.files import atomic_write
from deepseek_v3.utils.text import format_value

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
_ID_FILES = ("generation_config.json", "config.json")  # the first one that gives an id counts, as in Transformers
_MAX_BYTES = 2**26  # the config of a tokenizer lists its added tokens, sometimes thousands
# Entries that name code to import; none of it is ever run or written.
_CODE = ("auto_map", "custom_pipelines")


def read_tokenizer_config(folder: Path) -> dict[str, Any] | None:
    """The fields of the folder's `tokenizer_config.json`, with the chat template inside; None without that file.

    Entries that name code are left out. Raises DataError for a file that is not a JSON object, and for markers
    that are no names.
    """
    fields: dict[str, Any] | None = None
    if _is_there(folder / CONFIG_FILE):
        fields = {key: value for key, value in _json(folder / CONFIG_FILE).items() if key not in _CODE}
    if _is_there(folder / TEMPLATE_FILE):
        try:
            fields = {**(fields or {}), "chat_template": read_text(folder / TEMPLATE_FILE, _MAX_BYTES)}
        except ConfigError as error:
            raise DataError(str(error)) from None
    for role in ("bos_token", "eos_token"):
        special_token(fields or {}, role, folder)
    return fields


def write_tokenizer_config(folder: Path, fields: Mapping[str, Any]) -> None:
    """Writes the folder's `tokenizer_config.json`. Raises OSError."""
    with atomic_write(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def ends_in_folder(folder: Path, config: Mapping[str, Any] | None) -> list[str | int]:
    """The tokens that end a text, the end-of-text marker first; empty if the files name none.

    The marker is the `eos_token` of the tokenizer's config. Generation also stops at the `eos_token_id` of the
    model, one id or several. Raises DataError for values of another type.
    """
    ends: list[str | int] = []
    if name := special_token(config or {}, "eos_token", folder):
        ends.append(name)
    for file in _ID_FILES:
        if _is_there(folder / file) and (ids := _json(folder / file).get("eos_token_id")) is not None:
            return [*ends, *_ids(ids, folder / file)]
    return ends


def special_token(config: Mapping[str, Any], role: str, folder: Path | str = "") -> str | None:
    """The name of a special token such as `eos_token`, given as a text or as an object with its `content`."""
    token = config.get(role)
    if isinstance(token, Mapping):
        token = token.get("content")
    if token is not None and not isinstance(token, str):
        raise DataError(
            f"{printable_path(Path(folder) / CONFIG_FILE)}: {role} = {format_value(token)}, expected the name of a "
            "token; correct it"
        )
    return token


def _ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [value]
    for id_ in ids:
        if type(id_) is not int or id_ < 0:
            raise DataError(
                f"{printable_path(file)}: eos_token_id = {format_value(value)}, expected an id or a list of ids; "
                "correct it"
            )
    return ids


def _is_there(path: Path) -> bool:
    """Whether a folder has this entry, even a link that leads nowhere, as after a download that was cut short."""
    return os.path.lexists(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, _MAX_BYTES)
    except ConfigError as error:
        raise DataError(str(error)) from None
