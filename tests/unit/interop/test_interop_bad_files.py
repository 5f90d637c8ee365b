"""Directories that cannot be used: one line that names the file and what is wrong, and nothing is left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import load_pretrained, save_pretrained
from deepseek_v3.interop.huggingface.import_command import import_checkpoint
from deepseek_v3.interop.load_model import load_model
from deepseek_v3.utils.errors import CheckpointError, UserError
from helpers.models import small_config, small_model

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
Damage = Callable[[Path], Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("good") / "hf"
    tokenizer = Tokenizer.train(["the cat"] * 3, 270)
    config = small_config(vocab_size=280, num_nextn_predict_layers=1)
    save_pretrained(small_model(config), path, tokenizer=tokenizer, max_shard_size="100KB", quantization="fp8")
    assert {path.name for path in path.glob("*.safetensors")} == {FIRST, SECOND, SECOND.replace("2-", "3-", 1)}
    return path


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def written(name: str, content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        change(fields)
        (folder / name).write_text(json.dumps(fields))

    return damage


def config(**fields: Any) -> Damage:
    return changed("config.json", lambda found: found.update(fields))


def indexed(**files: Any) -> Damage:
    return changed(INDEX, lambda found: found["weight_map"].update(files))


def header(change: Callable[[dict[str, Any], str], Any]) -> Damage:
    """Changes the header of the second file, given with the name of its first tensor, or replaces its text."""

    def damage(folder: Path) -> None:
        data = (folder / SECOND).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        text = change(entries, next(name for name in entries if name != "__metadata__"))
        text = text if isinstance(text, bytes) else json.dumps(entries).encode()
        (folder / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])

    return damage


def entry(**fields: Any) -> Damage:
    return header(lambda entries, name: entries[name].update(fields))


def replaced(name: str, make: Callable[[Path], Any]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def pickled(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def tensors(change: Callable[[dict[str, Any]], Any], file: str = FIRST) -> Damage:
    """Changes the tensors of a file, and the index with them."""

    def damage(folder: Path) -> None:
        weights = load_file(folder / file)
        before = set(weights)
        change(weights)
        save_file(weights, folder / file)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {
            name: place for name, place in index["weight_map"].items() if name not in before
        } | dict.fromkeys(weights, file)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


GATE = "model.layers.0.mlp.gate_proj.weight"
SCALE = f"{GATE}_scale_inv"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no shard": (replaced(FIRST, lambda _: None), f"{FIRST} cannot be read: No such file"),
    "no safetensors": (written(FIRST, "a page of HTML"), f"{FIRST} is no safetensors file: "),
    "empty shard": (written(FIRST, ""), f"{FIRST} is no safetensors file: "),
    "short shard": (lambda f: os.truncate(f / FIRST, (f / FIRST).stat().st_size - 1), "it was cut short"),
    "short header": (lambda f: os.truncate(f / FIRST, 90), "bytes of header in a file of 90 bytes"),
    "shard is a pipe": (replaced(FIRST, os.mkfifo), f"{FIRST} cannot be read: Not a regular file"),
    "shard is a device": (replaced(FIRST, lambda path: path.symlink_to("/dev/zero")), "Not a regular file"),
    "shard is a folder": (replaced(FIRST, Path.mkdir), f"{FIRST} cannot be read: Is a directory"),
    "shard is a loop": (replaced(FIRST, lambda path: path.symlink_to(FIRST)), "Too many levels of symbolic links"),
    "file above": (indexed(a="../x.safetensors"), "a is in ../x.safetensors, expected the name of a .safetensors"),
    "file elsewhere": (indexed(a="/etc/x.safetensors"), "a is in /etc/x.safetensors, expected the name of"),
    "file of code": (indexed(a="x.bin"), "a is in x.bin, expected the name of a .safetensors file"),
    "file is a number": (indexed(a=5), "a is in 5, expected the name of a .safetensors file"),
    "file with NUL": (indexed(a="\0.safetensors"), r"\u0000.safetensors"),
    "file of two lines": (indexed(a="a\nb.safetensors"), r'"a\nb.safetensors" cannot be read: No such file'),
    "file of a long name": (indexed(a="a" * 5000 + ".safetensors"), "(5,012 characters) cannot be read: File name"),
    "no weight_map": (written(INDEX, '{"metadata": {}}'), 'has no "weight_map" from tensors to files'),
    "weight_map is a list": (written(INDEX, '{"weight_map": ["a"]}'), 'has no "weight_map"'),
    "weight_map is empty": (written(INDEX, '{"weight_map": {}}'), 'has no "weight_map"'),
    "index is a list": (written(INDEX, "[]"), f"{INDEX}: holds a list, expected an object"),
    "index is short": (written(INDEX, '{"weight_map":'), f"{INDEX}:1:15: is not JSON"),
    "index is deep": (written(INDEX, "[" * 10**5), "nested too deeply"),
    "twice in the index": (written(INDEX, '{"weight_map": {"a": "b", "a": "c"}}'), "a is given twice"),
    "index is a pipe": (replaced(INDEX, os.mkfifo), f"{INDEX}: is a pipe"),
    "index leads nowhere": (replaced(INDEX, lambda path: path.symlink_to("none")), f"{INDEX}: cannot be read"),
    "no index": (replaced(INDEX, lambda _: None), f"has {FIRST} and no {INDEX}"),
    "not in its file": (indexed(zz=FIRST), f"zz is in no file, and by {INDEX} in {FIRST}"),
    "in another file": (indexed(**{NORM: FIRST}), f"{NORM} is in {SECOND}, and by {INDEX} in {FIRST}"),
    "not in the index": (changed(INDEX, lambda index: index["weight_map"].pop(NORM)), f"by {INDEX} in none"),
    "long names": (indexed(**{"z" * 10**5: FIRST, "a\nb": FIRST}), r'"a\nb" is in no file'),
    "in two files": (lambda f: shutil.copy(f / FIRST, f / SECOND), f" is in {FIRST} and in {SECOND}"),
    "two sets of weights": (lambda f: shutil.copy(f / FIRST, f / "model.safetensors"), "and model.safetensors.ind"),
    "no weights": (without_weights, "has no model.safetensors and no model.safetensors.index.json"),
    "pickled weights": (pickled, "has its weights in pytorch_model.bin, which may run code when it is read"),
    "no config": (replaced("config.json", lambda _: None), "config.json: cannot be read: No such file"),
    "config is a pipe": (replaced("config.json", os.mkfifo), "config.json: is a pipe"),
    "config is no JSON": (written("config.json", "{"), "config.json:1:2: is not JSON"),
    "another architecture": (
        config(architectures=["LlamaForCausalLM"]),
        "architectures = [LlamaForCausalLM], expec",
    ),
    "its name alone": (config(architectures="LlamaForCausalLM"), "architectures = [LlamaForCausalLM], expected"),
    "another model": (
        config(model_type="deepseek_v2"),
        "model_type = deepseek_v2, expected deepseek_v3 or kimi_k2",
    ),
    "another quantization": (config(quantization_config={"quant_method": "awq"}), "{quant_method: awq, fmt: null"),
    "other blocks": (
        config(quantization_config={"weight_block_size": [64, 64]}),
        "weight_block_size: [64, 64]}, exp",
    ),
    "float offsets": (entry(data_offsets=[0.0, 4.0]), "has the data_offsets [0.0, 4.0], expected its first byte"),
    "negative offsets": (entry(data_offsets=[-8, 0]), "has the data_offsets [-8, 0], expected"),
    "one offset": (entry(data_offsets=[0]), "has the data_offsets [0], expected"),
    "no offsets": (entry(data_offsets=None), "has the data_offsets null, expected"),
    "huge offsets": (entry(data_offsets=[0, 2**62]), "bytes, expected 4 for its shape"),
    "negative shape": (entry(shape=[-1, -4]), "has the shape [-1, -4]"),
    "huge shape": (entry(shape=[2**62, 2**62]), "has 4 bytes, expected "),
    "larger than any number": (
        entry(shape=[2**70, 0], data_offsets=[0, 0]),
        "has the shape [1180591620717411303424",
    ),
    "shape of letters": (entry(shape="ab"), "has the shape ab"),
    "many axes": (entry(shape=[1] * 10**5), "has the shape [1, 1, 1, 1"),
    "another dtype": (entry(dtype="F7"), "has the dtype F7, expected one of F64, I64, "),
    "no dtype": (entry(dtype=["F32"]), "has the dtype [F32], expected one of"),
    "overlap": (
        header(lambda entries, name: entries.update(x=dict(entries[name]))),
        "inside the header or another",
    ),
    "entry is a number": (header(lambda entries, name: entries.update({name: 5})), "has the dtype null"),
    "header is a list": (header(lambda *_: b"[]"), "its header begins with b'[', expected {"),
    "header is deep": (header(lambda *_: b'{"a":' + b"[" * 10**5), "its header is nested too deeply"),
    "header in UTF-16": (header(lambda entries, _: json.dumps(entries).encode("utf-16")), "its header begins with"),
    "header in Latin-1": (header(lambda *_: b'{"\xff": 1}'), "can't decode byte 0xff"),
    "twice in the header": (header(lambda *_: b'{"x": 1, "x": 2}'), "the key 'x' is given twice"),
    "half a character": (
        header(lambda entries, name: entries.update({"\ud800": entries.pop(name)})),
        "half of a sur",
    ),
    "number of 5,000 digits": (header(lambda *_: b'{"x": ' + b"1" * 5000 + b"}"), "is no safetensors file: "),
    "NaN": (tensors(lambda weights: weights[NORM].fill_(float("nan")), SECOND), f"{NORM} holds NaN or infinity"),
    "no scales": (tensors(lambda weights: weights.pop(SCALE)), f"{GATE}: is in FP8 without {SCALE}"),
    "scales of a wrong shape": (
        tensors(lambda weights: weights.update({SCALE: torch.ones(1)})),
        f"{SCALE}: found shape (1,), expected (1, 1) for blocks of 128×128",
    ),
    "layer of 5,000 digits": (
        tensors(lambda weights: weights.update({f"model.layers.{'9' * 5000}.x": torch.ones(1)})),
        "1 unexpected: model.layers.999",
    ),
    "name of two lines": (
        tensors(lambda weights: weights.update({"a\nb": torch.ones(1)})),
        r'1 unexpected: "a\nb"',
    ),
    "sizes beyond memory": (config(hidden_size=2**31), "the sizes in config.json are larger than any memory"),
    "smaller vocabulary": (
        config(vocab_size=100),
        "embed_tokens.weight: found shape (280, 40), expected (100, 40)",
    ),
    "no tokenizer": (replaced("tokenizer.json", lambda _: None), "has no tokenizer.json, which turns text into"),
    "broken tokenizer": (
        written("tokenizer.json", "{}"),
        "tokenizer.json: is not a tokenizer of the tokenizers lib",
    ),
    "tokenizer config is a list": (written("tokenizer_config.json", "[]"), "holds a list"),
    "marker is a number": (
        written("tokenizer_config.json", '{"eos_token": 5}'),
        "eos_token = 5, expected the name",
    ),
    "start is a list": (
        written("tokenizer_config.json", '{"bos_token": ["a"]}'),
        "bos_token = [a], expected the na",
    ),
    "unknown marker": (
        written("tokenizer_config.json", '{"eos_token": "<z>"}'),
        "has no token '<z>' to end a text",
    ),
    "unknown start": (
        written("tokenizer_config.json", '{"bos_token": "<z>", "add_bos_token": true}'),
        "has no token '<z>' to begin a text",
    ),
    "NaN in a list": (written("tokenizer_config.json", '{"x": [[1, NaN]]}'), "x: found nan, expected a finite"),
    "config leads nowhere": (
        replaced("tokenizer_config.json", lambda path: path.symlink_to("none")),
        "tokenizer_config.json: cannot be read: No such file",
    ),
    "template is a folder": (lambda f: (f / "chat_template.jinja").mkdir(), "chat_template.jinja: is a folder"),
    "negative id": (written("generation_config.json", '{"eos_token_id": -1}'), "eos_token_id = -1, expected an id"),
    "id is a word": (written("generation_config.json", '{"eos_token_id": ["a"]}'), "eos_token_id = [a], expected"),
}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    message.encode()
    assert len(message.splitlines()) == 1
    assert len(message) < 3000
    return message


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_bad_directory_is_refused_in_one_line(folder: Path, damage: Damage, message: str) -> None:
    damage(folder)
    found = refusal(lambda: import_checkpoint(folder, folder.parent / "out"))
    assert found.startswith(str(folder))
    assert message in found
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
    found = refusal(lambda: load_model(folder, torch.device("cpu")))
    assert message.replace(f"{NORM} holds NaN or infinity", f"1 tensor holds NaN or infinity: {NORM}") in found


def test_a_copy_of_nan_is_the_same_nan(folder: Path) -> None:
    for name in (FIRST, SECOND, SECOND.replace("2-", "3-", 1)):
        weights = load_file(folder / name)
        for tensor in (tensor for key, tensor in weights.items() if key.endswith("embed_tokens.weight")):
            tensor[3, 5] = float("nan")
        save_file(weights, folder / name)
    message = refusal(lambda: load_pretrained(folder))
    assert "1 tensor holds NaN or infinity: model.embed_tokens.weight" in message


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in ("deepseek-ai/DeepSeek-V3", str(tmp_path / "file"), "n" * 300, "s3://bucket/model"):
        assert "is no folder, expected a directory in Hugging Face's format" in refusal(
            lambda path=path: load_pretrained(path)
        )


def test_a_file_that_becomes_shorter_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"\.safetensors: has become shorter while it was read"):
        load_pretrained(folder)


def test_a_disk_that_fails_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"\.safetensors: cannot be read: Input/output error"):
        load_pretrained(folder)


def test_ids_that_no_token_has_end_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    written("generation_config.json", f'{{"eos_token_id": [0, 270, {10**12}, {10**30}]}}')(folder)
    assert load_model(folder, torch.device("cpu")).tokenizer.ends == (0,)
    for id_ in (270, 10**12, 10**30):
        assert f"has no token of id {id_}, so generation cannot stop there" in caplog.text


def test_files_may_be_links(folder: Path, tmp_path: Path) -> None:
    """As in the cache of the Hub, whose files are links to blobs."""
    for path in list(folder.iterdir()):
        path.rename(tmp_path / f"blob_{path.name}")
        path.symlink_to(tmp_path / f"blob_{path.name}")
    assert load_model(folder, torch.device("cpu")).tokenizer.vocab_size <= 280


@pytest.mark.parametrize(("context", "depth"), [(1, 0), (1, 1), (2, 2)])
def test_a_context_without_anything_to_predict_is_refused(tmp_path: Path, context: int, depth: int) -> None:
    tokenizer = Tokenizer.train(["the cat"] * 3, 270)
    config = small_config(vocab_size=280, max_position_embeddings=context, num_nextn_predict_layers=depth)
    save_pretrained(small_model(config), tmp_path / "hf", tokenizer=tokenizer)
    for call in (
        lambda: import_checkpoint(tmp_path / "hf", tmp_path / "out"),
        lambda: load_model(tmp_path / "hf", torch.device("cpu")),
    ):
        assert f"max_position_embeddings = {context}, expected at least {max(2, depth + 1)}" in refusal(call)
