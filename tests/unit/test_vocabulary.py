"""A vocabulary that a config leaves open follows the tokenizer; one that is given is kept and checked."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_v3.config.loading import load_config
from deepseek_v3.planning.counts import count_parameters
from run_helpers import dsv3, message_of, run_fields, write_corpus, write_run


def write(folder: Path, vocab_size: Any, corpus: int | str | None, tokenizer: int | None) -> Path:
    """A run's YAML file, and the index of its tokens where there are any; "absent" leaves the field out."""
    fields = run_fields(folder)
    fields["model"]["vocab_size"] = vocab_size
    if vocab_size == "absent":
        del fields["model"]["vocab_size"]
    fields["data"]["corpus"] = {"source": "text", "vocab_size": corpus} if corpus else None
    if tokenizer:
        (folder / "tokens").mkdir()
        (folder / "tokens" / "index.json").write_text(json.dumps({"vocab_size": tokenizer}))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("given", [None, "absent"])
@pytest.mark.parametrize(
    ("corpus", "tokenizer", "expected"),
    [
        (None, 32_768, 32_768),
        (None, 32_769, 32_896),
        (None, 300, 384),
        (4096, None, 4096),
        ("4k", None, 4096),
        (4000, 3100, 4096),  # a corpus too small for its vocabulary: the model is the one of the first start
        (512, 32_000, 32_000),
        (None, None, 129_280),
    ],
)
def test_an_open_vocabulary_follows_the_tokenizer(tmp_path, given, corpus, tokenizer, expected):
    config = load_config(write(tmp_path, given, corpus, tokenizer))
    assert config.model.vocab_size == expected
    assert count_parameters(config.model).embedding == expected * config.model.hidden_size


def test_a_vocabulary_that_is_given_is_kept(tmp_path):
    assert load_config(write(tmp_path, 500, 300, 400)).model.vocab_size == 500
    path = write(tmp_path, None, 300, None)
    assert load_config(path, ["model.vocab_size=1000"]).model.vocab_size == 1000


def test_overrides_open_it_and_name_other_tokens(tmp_path):
    path = write(tmp_path, 500, None, None)
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.json").write_text('{"vocab_size": 700}')
    assert load_config(path, ["model.vocab_size=null", f"data.path={other}"]).model.vocab_size == 768


@pytest.mark.parametrize("index", ["", "{", "[]", '{"vocab_size": "many"}', '{"vocab_size": -1}', "\x00"])
def test_an_index_that_says_nothing_is_passed_over(tmp_path, index):
    path = write(tmp_path, None, 300, 400)
    (tmp_path / "tokens" / "index.json").write_text(index)
    assert load_config(path).model.vocab_size == 384


def test_one_line_of_the_log_says_what_it_became(tmp_path, caplog):
    path = write(tmp_path, None, None, 1000)
    with caplog.at_level(logging.INFO, "deepseek_v3"):
        load_config(path)
        assert not caplog.messages
        load_config(path, log=True)
    expected = (
        f"Vocabulary: 1,024 ids, for the 1,000 of the tokenizer of {tmp_path / 'tokens'}, in multiples of 128"
    )
    assert caplog.messages == [expected]


def test_training_plans_and_resumes_with_it(tmp_path):
    path = write_run(tmp_path, steps=2)
    fields = yaml.safe_load(path.read_text())
    del fields["model"]["vocab_size"]
    fields["data"]["corpus"]["vocab_size"] = 2000  # more than the text has pairs for
    path.write_text(yaml.safe_dump(fields))
    first = dsv3("train", "--device", "cpu", "--config", path)
    assert first.exit_code == 0, first.output
    assert "Vocabulary: 2,048 ids" in first.output
    total = ["--set", "training.total_tokens=512", "--resume", "latest"]
    again = dsv3("train", "--device", "cpu", "--config", path, *total)
    assert again.exit_code == 0, again.output
    found = json.loads(dsv3("config", "counts", path, "--json").output)
    assert found["parameters"]["embedding"] == 2048 * 32
    assert dsv3("plan", "--gpus", 1, "--config", path).exit_code == 0


def test_a_vocabulary_too_small_for_the_tokens_is_still_refused(tmp_path):
    write_corpus(tmp_path / "text")
    words = ["--input", tmp_path / "text", "--vocab-size", 340, "--output", tmp_path / "tokens"]
    assert dsv3("tokenize", *words).exit_code == 0
    path = write(tmp_path, 270, None, None)
    message = message_of(dsv3("train", "--device", "cpu", "--config", path))
    assert "model.vocab_size = 270 has room for fewer; raise it, set it to null, which follows" in message
