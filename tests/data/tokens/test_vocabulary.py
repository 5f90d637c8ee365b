"""Tokenizers that would drop text, or whose ids no model has room for, are refused with the reason."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.utils.errors import DataError

Fields = dict[str, Any]


def trained() -> Fields:
    return json.loads(Tokenizer.train([], 260).to_json())


def without(*tokens: str) -> Callable[[Fields], None]:
    def damage(fields: Fields) -> None:
        for token in tokens:
            del fields["model"]["vocab"][token]

    return damage


def with_id(id_: int) -> Callable[[Fields], None]:
    return lambda fields: fields["model"]["vocab"].update(zz=id_)


def added_with_id(id_: int) -> Callable[[Fields], None]:
    return lambda fields: fields["added_tokens"][-1].update(id=id_)


def with_model(**model: Any) -> Callable[[Fields], None]:
    return lambda fields: fields.update(model=model)


def without_bytes(fields: Fields) -> None:
    fields.update(pre_tokenizer=None, decoder=None)


def without_a_byte_and_with_unknown(fields: Fields) -> None:
    without("z")(fields)
    fields["model"]["unk_token"] = "<unk>"


def with_bpe(**options: Any) -> Callable[[Fields], None]:
    return lambda fields: fields["model"].update(options)


def with_pre_tokenizer(found: Any) -> Callable[[Fields], None]:
    return lambda fields: fields.update(pre_tokenizer=found)


REFUSED: dict[str, tuple[Callable[[Fields], None], str]] = {
    "an id of 2^31": (
        with_id(2**31),
        "'zz' has id 2,147,483,648 among 261 tokens, expected ids below 66,058",
    ),
    "an id of 2^32 - 1": (with_id(2**32 - 1), "has id 4,294,967,295"),
    "an id of 2^32": (with_id(2**32), "has id 4,294,967,296"),
    "an id of 10^8": (with_id(10**8), "has id 100,000,000"),
    "an added token of id 2^31": (added_with_id(2**31), "token '<|fim_end|>' has id 2,147,483,648"),
    "two tokens of one id": (with_id(10), "id 10 stands for two tokens, "),
    "one byte missing": (without("z"), "its vocabulary lacks 1 of the 256 bytes, .*: 0x7A \\('z'\\)"),
    "bytes missing": (without(*"abcdefgh"), "lacks 8 of the 256 bytes, .*: 0x61 .*, 0x65 \\('e'\\), …, and"),
    "a byte inside characters missing": (without("\u0123"), "lacks 1 of the 256 bytes, .*: 0x81"),
    "not of bytes": (without_bytes, "its BPE is not of bytes, .* names no unk_token"),
    "a byte and the unknown token missing": (
        without_a_byte_and_with_unknown,
        "lacks 1 of the 256 bytes, .* its unk_token '<unk>' is not in its vocabulary",
    ),
    "bytes missing at the end of a word": (
        with_bpe(end_of_word_suffix="</w>"),
        "lacks 243 of the 256 bytes, .*: 0x00 \\('\u0100</w>'\\)",
    ),
    "bytes missing inside a word": (with_bpe(continuing_subword_prefix="##"), "lacks 243 .*: 0x00 \\('##"),
    "a merge shorter than its prefix": (
        with_bpe(continuing_subword_prefix="##", merges=[["a", "b"]]),
        "is not a tokenizer of the tokenizers library: slice index",
    ),
    "a list as pre-tokenizer": (with_pre_tokenizer([]), "is not a tokenizer of the tokenizers library"),
    "a step without a type": (with_pre_tokenizer({}), "is not a tokenizer of the tokenizers library"),
    "a name as a step": (
        with_pre_tokenizer({"type": "Sequence", "pretokenizers": ["ByteLevel"]}),
        "is not a tokenizer of the tokenizers library",
    ),
    "a list as unknown token": (with_bpe(unk_token=["z"]), "is not a tokenizer of the tokenizers library"),
    "Unigram without its name": (with_model(unk_id=None, vocab=[["a", -1.0]]), "is Unigram and names no unk_id"),
    "Unigram": (with_model(type="Unigram", unk_id=None, vocab=[["a", -1.0]]), "is Unigram and names no unk_id"),
    "WordPiece": (
        with_model(
            type="WordPiece",
            vocab={"a": 0},
            unk_token="[UNK]",
            continuing_subword_prefix="##",
            max_input_chars_per_word=9,
        ),
        "its unk_token '\\[UNK\\]' is not in its vocabulary",
    ),
    "WordLevel": (
        with_model(type="WordLevel", vocab={"a": 0, "<unk>": 1, "b": 2**31}, unk_token="<unk>"),
        "token 'b' has id 2,147,483,648",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tokenizer_that_would_lose_text_is_refused(name: str) -> None:
    damage, message = REFUSED[name]
    fields = trained()
    damage(fields)
    with pytest.raises(DataError, match=rf"^tokenizer\.json: .*{message}"):
        Tokenizer.from_json(json.dumps(fields))


def test_bytes_that_stand_in_no_text_may_be_missing() -> None:
    fields = trained()
    for sign in "ÀÁõö÷øùúûüýþÿ":  # 0xC0, 0xC1 and from 0xF5 on, which such vocabularies spell like Latin-1
        del fields["model"]["vocab"][sign]
    tokenizer = Tokenizer.from_json(json.dumps(fields))
    text = "".join(map(chr, [*range(1, 0x300), 0x4E00, 0xFFFF, 0x10000, 0x10FFFF]))
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("unknown", "lacking"), [("", []), ("<unk>", []), ("a", ["z"])])
def test_an_unknown_token_is_needed_only_where_bytes_are_missing(unknown: str, lacking: list[str]) -> None:
    fields = trained()
    without(*lacking)(fields)
    fields["model"]["unk_token"] = unknown
    assert len(Tokenizer.from_json(json.dumps(fields)).encode("xyz")) == 3


def test_a_model_without_its_type_is_known_by_its_fields() -> None:
    fields = trained()
    del fields["model"]["type"]
    tokenizer = Tokenizer.from_json(json.dumps(fields))
    assert tokenizer.is_byte_exact
    assert tokenizer.byte_lengths[tokenizer.encode("añ")].sum() == 3


@pytest.mark.parametrize(
    ("step", "warns"),
    [
        ({"type": "WhitespaceSplit"}, True),
        ({"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}, True),
        ({"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}, False),
    ],
)
def test_a_pre_tokenizer_that_removes_text_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, step: Fields, warns: bool
) -> None:
    fields = trained()
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, fields["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.decode(tokenizer.encode("a b")) == "ab") == warns
    message = f"its pre-tokenizer ({step['type']}) removes the characters at which it cuts text"
    assert (message in caplog.text) == warns


def test_gaps_between_ids_are_taken() -> None:
    fields = trained()
    with_id(5000)(fields)
    assert Tokenizer.from_json(json.dumps(fields)).vocab_size == 5001


@pytest.mark.parametrize("lacking", [[], ["<0x41>", "<0x9F>"]])
def test_byte_fallback_needs_every_byte(lacking: list[str]) -> None:
    tokens = ["</s>", "\u2581", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: id_ for id_, token in enumerate(t for t in tokens if t not in lacking)}
    theirs = HuggingFaceTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    theirs.normalizer = normalizers.Replace(" ", "\u2581")
    theirs.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    theirs.add_special_tokens(["</s>"])
    if lacking:
        with pytest.raises(DataError, match=r"lacks 2 of the 256 bytes, .*: 0x41 \('<0x41>'\), 0x9F"):
            Tokenizer.from_json(theirs.to_str())
    else:
        tokenizer = Tokenizer.from_json(theirs.to_str())
        assert tokenizer.decode(tokenizer.encode("añ😀")) == "añ😀"


def test_a_path_that_no_file_can_have_is_named() -> None:
    with pytest.raises(DataError, match=r"^.a.*b.: cannot be read: its name holds a NUL character; expected"):
        Tokenizer.load("a\0b")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Path.mkdir, "tokenizer\\.json: is a folder, expected a tokenizer"),
        (os.mkfifo, "tokenizer\\.json: is a pipe, expected a tokenizer"),
        (lambda path: path.symlink_to("/dev/zero"), "tokenizer\\.json: is a device, expected a tokenizer"),
    ],
)
def test_a_pipe_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None], reason: str) -> None:
    make(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=reason):
        Tokenizer.load(tmp_path)
