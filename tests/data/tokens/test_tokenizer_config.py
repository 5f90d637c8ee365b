"""The files beside a tokenizer.json name its markers, what ends a text, and the chat template."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_config import read_tokenizer_config
from deepseek_v3.utils.errors import DataError

MARKERS = ["<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"]  # with the ids 0 to 3


def folder_of(tmp_path: Path, **files: dict[str, Any]) -> Path:
    Tokenizer.train(["the cat"], 270).save(tmp_path / "tokenizer.json")
    for name, fields in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    return tmp_path


def renamed(tmp_path: Path, name: str) -> Path:
    """A tokenizer whose end-of-text marker has another name."""
    folder = folder_of(tmp_path)
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", name)
    (folder / "tokenizer.json").write_text(text)
    return folder


@pytest.mark.parametrize("name", ["<EOT>", "<|im_end|>", "<end of turn>", "[EOS]"])
@pytest.mark.parametrize("as_object", [False, True])
def test_the_marker_may_have_any_name(tmp_path: Path, name: str, as_object: bool) -> None:
    folder = renamed(tmp_path, name)
    marker = {"__type": "AddedToken", "content": name, "lstrip": False} if as_object else name
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": marker}))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.end_of_text, tokenizer.ends) == (0, (0,))
    assert 0 not in tokenizer.encode(f"the {name}")


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, (0,)),
        ({"tokenizer_config": {"eos_token": MARKERS[3]}}, (3,)),
        ({"tokenizer_config": {"eos_token": None}}, (0,)),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": 2}}, (2,)),
        ({"generation_config": {"eos_token_id": [2, 1]}}, (2, 1)),
        ({"generation_config": {"eos_token_id": [2, 1, 2]}}, (2, 1)),
        ({"tokenizer_config": {"eos_token": MARKERS[3]}, "generation_config": {"eos_token_id": [1, 3]}}, (3, 1)),
        ({"config": {"eos_token_id": 1}}, (1,)),
        ({"generation_config": {"eos_token_id": 2}, "config": {"eos_token_id": 1}}, (2,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 1}}, (1,)),
        ({"generation_config": {"eos_token_id": []}}, (0,)),
        ({"generation_config": {"eos_token_id": [269, 400]}}, (0,)),
    ],
    ids=str,
)
def test_files_name_what_ends_a_text(tmp_path: Path, files: dict[str, Any], ends: tuple[int, ...]) -> None:
    tokenizer = Tokenizer.load(folder_of(tmp_path, **files))
    assert tokenizer.ends == tuple(id_ for id_ in ends if id_ < tokenizer.vocab_size)
    assert tokenizer.end_of_text == ends[0]


@pytest.mark.parametrize(
    ("fields", "start"),
    [
        ({}, ()),
        ({"bos_token": MARKERS[1]}, ()),
        ({"bos_token": MARKERS[1], "add_bos_token": True}, (1,)),
        ({"bos_token": {"content": MARKERS[1]}, "add_bos_token": True}, (1,)),
        ({"bos_token": MARKERS[1], "add_bos_token": False}, ()),
        ({"bos_token": None, "add_bos_token": True}, ()),
    ],
    ids=str,
)
def test_a_config_says_what_begins_a_prompt(tmp_path: Path, fields: dict[str, Any], start: tuple[int, ...]) -> None:
    assert Tokenizer.load(folder_of(tmp_path, tokenizer_config=fields)).prompt_start == start


def test_a_template_file_comes_before_that_of_the_config(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, tokenizer_config={"chat_template": "old", "x": 1, "auto_map": {"AutoTokenizer": "a"}}
    )
    assert read_tokenizer_config(folder) == {"chat_template": "old", "x": 1}
    (folder / "chat_template.jinja").write_text("{{ 'neu: ü' }}\n", encoding="utf-8")
    assert read_tokenizer_config(folder) == {"chat_template": "{{ 'neu: ü' }}\n", "x": 1}
    (folder / "tokenizer_config.json").unlink()
    assert read_tokenizer_config(folder) == {"chat_template": "{{ 'neu: ü' }}\n"}
    (folder / "chat_template.jinja").unlink()
    assert read_tokenizer_config(folder) is None


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "tokenizer_config",
            {"eos_token": ["a"]},
            "tokenizer_config.json: eos_token = [a], expected the name of a",
        ),
        (
            "tokenizer_config",
            {"bos_token": 5},
            "tokenizer_config.json: bos_token = 5, expected the name of a token",
        ),
        ("tokenizer_config", {"eos_token": {"content": 5}}, "eos_token = 5, expected the name of a token"),
        ("tokenizer_config", {"eos_token": "<z>"}, "tokenizer.json: has no token '<z>' to end a text"),
        ("tokenizer_config", {"bos_token": "<z>", "add_bos_token": True}, "has no token '<z>' to begin a text"),
        ("generation_config", {"eos_token_id": -1}, "generation_config.json: eos_token_id = -1, expected an id"),
        ("generation_config", {"eos_token_id": True}, "eos_token_id = true, expected an id or a list of ids"),
        (
            "generation_config",
            {"eos_token_id": [1, 2.0]},
            "eos_token_id = [1, 2.0], expected an id or a list of ids",
        ),
        ("config", {"eos_token_id": "<z>"}, "/config.json: eos_token_id = '<z>', expected an id or a list of ids"),
    ],
)
def test_values_that_name_no_token_are_refused(
    tmp_path: Path, name: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as refusal:
        Tokenizer.load(folder_of(tmp_path, **{name: fields}))
    assert message in str(refusal.value)


def test_ends_may_be_given_by_hand(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tokenizer_config={"eos_token": MARKERS[3]})
    assert Tokenizer.load(folder, [MARKERS[1], 2]).ends == (1, 2)
    with pytest.raises(DataError, match="has no token '<z>' to end a text"):
        Tokenizer.load(folder, ["<z>"])
    for id_ in (-1, 2**32, 2**70):
        assert Tokenizer.load(folder, [1, id_]).ends == (1,)
