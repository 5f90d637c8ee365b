"""`dsv3 tokenizer`: its tables, its file of results, and the tokenizers that it finds or refuses."""

import json
import re
from pathlib import Path

import pytest

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.tokenizer_command import open_tokenizer
from deepseek_v3.model.pretrained import model_entries
from deepseek_v3.utils.checkpointing.directory import save_checkpoint
from helpers.runs import dsv3, message_of, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text", documents=8)


def _saved(tokenizer: Tokenizer, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return path


def _checkpoint(tokenizer: Tokenizer, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, {**model_entries({}, load_config("tiny"), tokenizer), "step": 3, "tokens": 9})
    return path


def test_tokenizers_are_compared_by_source(tmp_path: Path, corpus: Path) -> None:
    small = _saved(Tokenizer.train(["a"], 260), tmp_path / "small.json")
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    large = _saved(Tokenizer.train(texts, 300), tmp_path / "large" / "tokenizer.json")
    lines = tmp_path / "notes.jsonl"
    lines.write_text(json.dumps({"text": "é"}) + "\n", encoding="utf-8")
    data = ["--data", corpus, "--data", f"notes={lines}", "--output", tmp_path / "results.json"]
    result = dsv3("tokenizer", small, large.parent, *data)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["tokenizers"]
    for number, (one, path) in enumerate(zip(found, (small, large.parent), strict=True), start=1):
        row = [f"{number} {path}", f"{one['vocabulary']}", f"{one['total']['tokens']:,}"]
        row += [f"{one['total'][name]:.3f}" for name in ("bytes_per_token", "characters_per_token")]
        assert re.search(" +".join(map(re.escape, row)) + r" .* 9 of 9$", result.output, re.MULTILINE)
        assert f"{path}: end of text <|endoftext|> (0); other special tokens: <|fim_begin|> (1)" in result.output
    ratios = [f"{one['sources']['text']['bytes_per_token']:.3f}" for one in found]
    assert re.search(rf"^text +8 +[\d,]+ +{ratios[0]} +{ratios[1]}$", result.output, re.MULTILINE)
    assert result.output.endswith(f"Next:\n  dsv3 tokenize --input {corpus} --tokenizer {large.parent}\n")
    again = dsv3("tokenizer", small, *data)
    assert "exists and is left as it is" in message_of(again)


def test_a_text_that_is_not_kept_is_reported(tmp_path: Path) -> None:
    fields = {**json.loads(Tokenizer.train([], 260).to_json()), "normalizer": {"type": "Lowercase"}}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    lines = tmp_path / "notes.jsonl"
    records = [{"body": "a", "from": "x"}, {"body": "A", "from": "y", "id": "the second"}]
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    result = dsv3("tokenizer", path, "--data", lines, "--text-field", "body", "--source-field", "from")
    assert result.exit_code == 0, result.output
    assert f"{path}: 1 document not kept, the first in y, document the second, character 0: 'A' becomes 'a'" in (
        result.output
    )
    assert result.output.endswith(f"--tokenizer {path} --text-field body\n")


def test_tokenizers_in_every_place(tmp_path: Path, corpus: Path) -> None:
    tokenizer = Tokenizer.train(["abcab"] * 3, 262)
    file = _saved(tokenizer, tmp_path / "hf" / "tokenizer.json")
    checkpoint = _checkpoint(tokenizer, tmp_path / "run" / "checkpoint_step_3.pt")
    _checkpoint(Tokenizer.train([], 260), tmp_path / "run" / "checkpoint_step_2.pt")
    shards = tmp_path / "tokens"
    rules = {"vocab_size": None, "holdout": 0.3, "fim_rate": 0.0, "seed": 0, "sequence_length": 32, "workers": 1}
    tokenize_corpus(str(corpus), shards, tokenizer=file, **rules)  # type: ignore[arg-type]
    for path in (file, file.parent, checkpoint, checkpoint.parent, shards):
        assert open_tokenizer(path).to_json() == tokenizer.to_json()
    result = dsv3("tokenizer", checkpoint.parent, "--data", corpus)
    assert result.output.endswith(f"Next:\n  dsv3 eval {checkpoint.parent} --data {corpus}\n")


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    def message(path: Path, data: Path = corpus) -> str:
        return message_of(dsv3("tokenizer", path, "--data", data))

    assert "nowhere: does not exist; expected a tokenizer.json" in message(tmp_path / "nowhere")
    assert "holds no tokenizer.json and no checkpoint" in message(corpus)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    assert "tokenizer.json: is not a tokenizer" in message(tmp_path / "tokenizer.json")
    (tmp_path / "broken.pt").write_bytes(b"PK")
    assert "is not an archive of tensors" in message(tmp_path / "broken.pt")
    save_checkpoint(tmp_path / "other.pt", {"a": 1})
    assert "has no tokenizer; expected a checkpoint" in message(tmp_path / "other.pt")
    good = _saved(Tokenizer.train([], 260), tmp_path / "good.json")
    assert "nowhere: does not exist" in message(good, tmp_path / "nowhere")
    (tmp_path / "index.json").write_text("{}", encoding="utf-8")
    assert "holds tokens, expected text" in message(good, tmp_path)
