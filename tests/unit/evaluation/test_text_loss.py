"""Losses of texts by source, against sums made by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deepseek_v3.data.tokens.tokenize_corpus import TokenFormat, tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.evaluation.scoring import Scorer
from deepseek_v3.evaluation.text_loss import (
    SourceLoss,
    WindowRule,
    loss_table,
    measure_texts,
    total_of,
)
from deepseek_v3.evaluation.text_sources import (
    EncodedDocument,
    ReadingRules,
    _cut,
    encoded_documents,
    parse_sources,
)
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.progress import ProgressDisplay
from helpers.models import small_config, small_model
from helpers.runs import write_corpus

TEXTS = ["def a(x): return x + 1\n" * 5, "é", "<|endoftext|> is text here", "naïve 日本 🙂"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    torch.manual_seed(0)
    return small_model(small_config(vocab_size=320, max_position_embeddings=16), torch.float64).requires_grad_(
        False
    )


def _documents(tokenizer: Tokenizer, *given: object, **rules: object) -> list[EncodedDocument]:
    sources = parse_sources([str(one) for one in given])
    return [*encoded_documents(sources, tokenizer, ReadingRules(**rules))]  # type: ignore[arg-type]


def _measure(
    model: DeepSeekV3, tokenizer: Tokenizer, documents: list[EncodedDocument], rule: WindowRule
) -> list[SourceLoss]:
    log = get_logger("Test")
    with ProgressDisplay() as display, display.task("Scoring", None, "tokens", log) as progress:
        return measure_texts(Scorer(model), documents, tokenizer.text_start, rule, progress)


def _json_lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _write_shards(folder: Path, name: str = "tokens", token_format: TokenFormat = TokenFormat.SHARDS) -> None:
    text = str(write_corpus(folder / "text", 12))
    rules = {"vocab_size": 300, "tokenizer": None, "holdout": 0.3, "fim_rate": 0.0, "seed": 0}
    tokenize_corpus(text, folder / name, sequence_length=32, workers=1, token_format=token_format, **rules)  # type: ignore[arg-type]


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (7, 1)])
def test_losses_equal_a_loop_over_tokens(
    model: DeepSeekV3, tokenizer: Tokenizer, tmp_path: Path, context: int, stride: int
) -> None:
    (tmp_path / "one.txt").write_text(TEXTS[0], encoding="utf-8")
    rest = _json_lines(tmp_path / "rest.jsonl", [{"text": text} for text in TEXTS[1:]])
    documents = _documents(tokenizer, tmp_path / "one.txt", f"others={rest}")
    found = _measure(model, tokenizer, documents, WindowRule.checked(context, stride, 16))
    for loss, texts in zip(found, [TEXTS[:1], TEXTS[1:]], strict=True):
        nats, tokens = 0.0, 0
        for text in texts:
            ids = tokenizer.encode(text)
            for index, target in enumerate(ids):
                end = index + 1  # of the first window, or of the later one that holds the target
                if end > context:
                    end = min(context + -(-(end - context) // stride) * stride, len(ids))
                inputs = [tokenizer.end_of_text, *ids][max(0, end - context) : index + 1]
                nats -= model(torch.tensor([inputs]))[0, -1].log_softmax(-1)[target].item()
                tokens += 1
        num_bytes = sum(len(text.encode()) for text in texts)
        assert (loss.documents, loss.tokens, loss.num_bytes) == (len(texts), tokens, num_bytes)
        assert loss.loss == pytest.approx(nats / tokens, abs=1e-9)
        assert loss.perplexity == pytest.approx(math.exp(nats / tokens))
        assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes)
    assert [loss.name for loss in found] == ["one.txt", "others"]


def test_the_total_counts_every_token_and_byte_the_same() -> None:
    parts = [SourceLoss("a", 1, 10, 40, 20.0), SourceLoss("b", 2, 30, 60, 30.0)]
    total = total_of(parts)
    assert (total.documents, total.loss, total.bits_per_byte) == (3, 50 / 40, 50 / math.log(2) / 100)
    assert [line.split()[0] for line in loss_table(parts)[2:]] == ["a", "b", "total"]
    assert len(loss_table(parts[:1])) == 3
    assert SourceLoss("c", 1, 1, 1, 1e4).perplexity == math.inf


def test_shards_give_the_numbers_of_their_text(model: DeepSeekV3, tmp_path: Path) -> None:
    _write_shards(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokens")
    whole = {tuple(document.ids): document.num_bytes for document in _documents(tokenizer, tmp_path / "text")}
    held_out = _documents(tokenizer, tmp_path / "tokens")
    assert held_out
    assert all(whole[tuple(document.ids)] == document.num_bytes for document in held_out)
    _write_shards(tmp_path, "megatron", TokenFormat.MEGATRON)
    for path in (tmp_path / "megatron", tmp_path / "megatron" / "train"):
        assert _documents(tokenizer, path)
        assert all(whole[tuple(document.ids)] == document.num_bytes for document in _documents(tokenizer, path))
    with pytest.raises(DataError, match="another tokenizer"):
        _documents(Tokenizer.train(["other words"], 270), tmp_path / "tokens")


def test_documents_lie_between_markers() -> None:
    blocks = [np.array(block) for block in ([0, 1, 2], [3, 0, 0], [], [4, 0, 5], [6])]
    assert [ids.tolist() for ids in _cut(iter(blocks), end_of_text=0)] == [[1, 2, 3], [4], [5, 6]]


def test_documents_of_shards_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_shards(tmp_path)
    tokenizer = Tokenizer.load(tmp_path / "tokens")
    expected = [document.ids.tolist() for document in _documents(tokenizer, tmp_path / "tokens")]
    monkeypatch.setattr("deepseek_v3.data.tokens.source._BLOCK_TOKENS", 7)
    assert [document.ids.tolist() for document in _documents(tokenizer, tmp_path / "tokens")] == expected


def test_sources_are_the_values_of_a_field(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [
        {"t": "a", "meta": {"from": 2}},
        {"t": " \n", "meta": {"from": 2}},
        {"t": "b", "meta": {"from": "x"}},
    ]
    lines = _json_lines(tmp_path / "records.jsonl", records)
    table = tmp_path / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{"t": "c", "meta": {"from": "x"}}]), table)
    found = _documents(tokenizer, lines, table, text_field="t", source_field="meta.from")
    assert [(document.source, tokenizer.decode(document.ids.tolist())) for document in found] == [
        ("2", "a"),
        ("x", "b"),
        ("x", "c"),
    ]


@pytest.mark.parametrize("record", [{"text": "a"}, {"text": "a", "from": None}, {"text": "a", "from": [1]}])
def test_a_record_without_a_source_is_named(
    tokenizer: Tokenizer, tmp_path: Path, record: dict[str, object]
) -> None:
    lines = _json_lines(tmp_path / "records.jsonl", [{"text": "b", "from": "x"}, record])
    with pytest.raises(DataError, match=r"records.jsonl:2: has no string or integer in field 'from'"):
        _documents(tokenizer, lines, source_field="from")


def test_reading_stops_after_enough_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [_json_lines(tmp_path / f"{name}.jsonl", [{"text": "abc"}] * 5) for name in "ab"]
    found = _documents(tokenizer, *lines, max_tokens=len(tokenizer.encode("abc")) + 1)
    assert [document.source for document in found] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("wiki=data/a.txt", ("wiki", "data/a.txt")),
        ("data/a=b.txt", ("a=b.txt", "data/a=b.txt")),
        ("s3://bucket/a=b", ("a=b", "s3://bucket/a=b")),
        ("two words=x", ("two words", "x")),
        ("wiki=s3://bucket/a", ("wiki", "s3://bucket/a")),
        ("data/folder/", ("folder", "data/folder/")),
    ],
)
def test_names_of_sources(given: str, expected: tuple[str, str]) -> None:
    (source,) = parse_sources([given])
    assert (source.name, source.path) == expected


def test_a_path_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").write_text("c", encoding="utf-8")
    assert [(one.name, one.path) for one in parse_sources(["a=b", "."])] == [("a=b", "a=b"), (tmp_path.name, ".")]
    with pytest.raises(DataError, match="the same name 'a=b'"):
        parse_sources(["a=b", "x/a=b"])
    with pytest.raises(DataError, match="is empty"):
        parse_sources([""])


def test_too_many_sources_and_no_tokens(model: DeepSeekV3, tokenizer: Tokenizer) -> None:
    ids = np.zeros(0, np.int64)
    rule = WindowRule(16, 16)
    with pytest.raises(DataError, match="more than 1,000 sources"):
        _measure(model, tokenizer, [EncodedDocument(str(number), ids, 0) for number in range(1001)], rule)
    with pytest.raises(DataError, match="no token to score"):
        _measure(model, tokenizer, [EncodedDocument("a", ids, 0)], rule)


@pytest.mark.parametrize(("context", "stride"), [(17, None), (8, 9), (None, 17)])
def test_windows_must_fit_the_context(context: int | None, stride: int | None) -> None:
    with pytest.raises(DataError, match="expected at most"):
        WindowRule.checked(context, stride, 16)
