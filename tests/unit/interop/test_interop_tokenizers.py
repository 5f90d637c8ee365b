"""The tokenizer of a directory gives the same ids in Transformers, and keeps its markers and chat template."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as HuggingFaceTokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import save_pretrained
from deepseek_v3.interop.huggingface.released_config import tokenizer_config, write_configs
from helpers.models import small_config, small_model

BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
ROLES = ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")  # tokens that the release adds, but not as special ones
TEXTS = ["the cat sat on the mat; def f(x): return x\n" * 5, "Grüße 日本語 привет мир " * 5]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<\uff5cUser\uff5c>' if message['role'] == 'user' else '<\uff5cAssistant\uff5c>' }}{{ message['content'] }}"
    "{% if message['role'] != 'user' %}{{ eos_token }}{% endif %}{% endfor %}"
)
CHAT = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
PIECES = [
    *(
        "абвгд ЖЗИ",
        "日本語の文章。漢字",
        "العربية نص",
        "हिन्दी पाठ",
        "한국어 텍스트",
        "ไทย ข้อความ",
        "עברית",
        "ελληνικά",
    ),
    *(
        "Grüße naïve café ﬁ Å",
        "😀👨\u200d👩\u200d👧🇩🇪🏳️\u200d🌈",
        "\t\r\x00\x07\x1b\x7f\u200b\u200d\ufeff\u2028\u0085",
    ),
    *("def f(x):\n    return x**2  # {}[]()<>=!", "    ", "        ", " \n \n", "0123456789٣४", "the cat sat on"),
    *(
        " The",
        "'s 're I'LL",
        "e\u0301\u0300",
        "\U0010ffff\ue000",
        "<|",
        "|>",
        "endoftext",
        "</s>",
        "\uff5c",
        "\u2581",
    ),
]


def mixed_lines(names: tuple[str, ...], count: int) -> list[str]:
    """Lines of many scripts, emoji, control characters, code, runs of spaces, and `names`."""
    return list(_lines([*PIECES, *names], names, random.Random(0), count))


def _lines(pieces: list[str], names: tuple[str, ...], draw: random.Random, count: int) -> Iterator[str]:
    for _ in range(count):
        line = ""
        for _ in range(draw.randint(1, 8)):
            piece, start = draw.choice(pieces), draw.randrange(4)
            line += piece if piece in names or draw.random() < 0.4 else piece[start : start + draw.randint(1, 6)]
            line += " " * draw.choice([0, 0, 1, 40])
        yield line


def published(folder: Path, config: dict[str, Any], begins: bool = False, template_file: bool = False) -> Path:
    """A directory with a tokenizer like the release's: markers after the tokens, and a chat template."""
    fields = json.loads(Tokenizer.train(TEXTS, 600).to_json())
    tokens = [token for token in fields["model"]["vocab"] if not token.startswith("<|")]
    fields["model"]["vocab"] = {token: id_ for id_, token in enumerate(tokens)}
    fields["added_tokens"] = []
    tokenizer = HuggingFaceTokenizer.from_str(json.dumps(fields))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (BEGIN, END)])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ROLES])
    if begins:
        marker = (BEGIN, tokenizer.token_to_id(BEGIN))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[marker])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"__type": "AddedToken", "content": BEGIN}, "eos_token": END}
    own = {"tokenizer_class": "LlamaTokenizerFast", "model_max_length": 131072, **names, **config}
    if template_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    else:
        own["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(own), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return folder


def exported(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    write_configs(folder, {"model_type": "deepseek_v3"}, tokenizer, 4096)
    return folder


def test_a_trained_tokenizer_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    """No text is a marker, not even its name."""
    ours = Tokenizer.train(TEXTS, 600)
    theirs = AutoTokenizer.from_pretrained(exported(ours, tmp_path / "hf"))
    lines = mixed_lines(("<|endoftext|>", "<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"), 5000)
    ids = ours.encode_batch(lines)
    assert theirs(lines).input_ids == ids
    assert theirs.eos_token_id == theirs.pad_token_id == ours.end_of_text
    assert theirs.batch_decode(ids[:500]) == lines[:500] == [ours.decode(each) for each in ids[:500]]


@pytest.mark.parametrize("begins", [False, True])
def test_a_published_tokenizer_gives_the_same_ids(tmp_path: Path, begins: bool) -> None:
    """Transformers reads the name of a marker as the marker unless it is asked to split it; here it is text.

    Tokens that are added but not special are markers in Transformers in either case.
    """
    source = published(tmp_path / "source", {"add_bos_token": begins}, begins)
    ours = Tokenizer.load(source)
    theirs = AutoTokenizer.from_pretrained(exported(ours, tmp_path / "hf"))
    lines = mixed_lines((BEGIN, END), 2500)
    ids = ours.encode_batch(lines)
    found = theirs(lines, add_special_tokens=False, split_special_tokens=True).input_ids
    assert found == ids
    markers = {theirs.bos_token_id, theirs.eos_token_id}
    for line, plain in zip(lines, theirs(lines, add_special_tokens=False).input_ids, strict=True):
        assert bool(markers & set(plain)) == (BEGIN in line or END in line)
    assert theirs("the cat").input_ids == [*ours.prompt_start, *ours.encode("the cat")]
    assert ours.prompt_start == ((theirs.bos_token_id,) if begins else ())


@pytest.mark.parametrize("template_file", [False, True])
def test_an_export_keeps_markers_and_chat_template(tmp_path: Path, template_file: bool) -> None:
    source = published(tmp_path / "source", {}, template_file=template_file)
    original = AutoTokenizer.from_pretrained(source)
    folder = exported(Tokenizer.load(source), tmp_path / "hf")
    again = exported(Tokenizer.load(folder), tmp_path / "again")
    for found in (AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(again)):
        assert type(found) is type(original)
        assert found.get_vocab() == original.get_vocab()
        assert (found.bos_token, found.eos_token) == (BEGIN, END)
        text = original.apply_chat_template(CHAT, tokenize=False)
        assert found.apply_chat_template(CHAT, tokenize=False) == text
        ids = found.apply_chat_template(CHAT, return_dict=False)
        assert ids == original.apply_chat_template(CHAT, return_dict=False)
        user, assistant = (original.convert_tokens_to_ids(role) for role in ROLES)
        assert [ids[0], ids[1], ids[-1]] == [original.bos_token_id, user, original.eos_token_id]
        assert assistant in ids
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_a_template_without_a_config_gets_a_class(tmp_path: Path) -> None:
    source = published(tmp_path / "source", {}, template_file=True)
    (source / "tokenizer_config.json").unlink()
    ours = Tokenizer.load(source)
    found = AutoTokenizer.from_pretrained(exported(ours, tmp_path / "hf"))
    assert found.eos_token == END
    assert found("the cat").input_ids == ours.encode("the cat")


def test_code_that_a_config_names_is_not_written(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    ours = Tokenizer.load(published(tmp_path / "source", code))
    fields = json.loads((exported(ours, tmp_path / "hf") / "tokenizer_config.json").read_text())
    assert "auto_map" not in fields
    assert fields["chat_template"] == TEMPLATE


def test_a_marker_that_was_named_is_the_marker_of_the_export(tmp_path: Path) -> None:
    source = published(tmp_path / "source", {})
    named = Tokenizer.load(source, [ROLES[0], ROLES[1]])
    folder = exported(named, tmp_path / "hf")
    assert Tokenizer.load(folder).ends == named.ends != Tokenizer.load(source).ends
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == list(named.ends)
    assert AutoTokenizer.from_pretrained(folder).eos_token == ROLES[0]
    assert tokenizer_config(named, 1)["bos_token"]["content"] == BEGIN


@pytest.mark.parametrize("begins", [False, True])
def test_the_configs_name_the_id_of_the_begin_marker(tmp_path: Path, begins: bool) -> None:
    source = published(tmp_path / "source", {"add_bos_token": begins}, begins)
    folder = exported(Tokenizer.load(source), tmp_path / "hf")
    expected = AutoTokenizer.from_pretrained(source).bos_token_id
    assert expected is not None
    for found in (AutoConfig, GenerationConfig):
        assert found.from_pretrained(folder).bos_token_id == expected


def test_generation_stops_at_the_ids_of_the_tokenizer_alone(tmp_path: Path) -> None:
    """Without ids in the files Transformers would take 0 and 1, those of the release."""
    model = small_model(small_config(vocab_size=300))
    save_pretrained(model, tmp_path / "none")
    config = AutoConfig.from_pretrained(tmp_path / "none")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    tokenizer = Tokenizer.train(TEXTS, 290)
    save_pretrained(model, tmp_path / "own", tokenizer=tokenizer)
    for found in (AutoConfig, GenerationConfig):
        config = found.from_pretrained(tmp_path / "own")
        assert (config.bos_token_id, config.eos_token_id) == (None, tokenizer.end_of_text)
