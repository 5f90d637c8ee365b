"""Counts of a tokenizer on a corpus against counts by hand, and the reasons for text that is not kept."""

import json
from typing import Any

import pytest

from deepseek_v3.data.documents import Document
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.data.tokens.tokenizer_stats import TokenizerStats
from deepseek_v3.utils.errors import DataError

TEXTS = {"code": ["def a(x): return x\n", "<|endoftext|> as text"], "prose": ["naïve 日本 🙂", "a\r\n\tb  c"]}


def _batch(texts: dict[str, list[str]]) -> list[tuple[str, Document]]:
    return [(name, Document(f"{name}:{n}", text)) for name, each in texts.items() for n, text in enumerate(each)]


def _changed(**fields: Any) -> Tokenizer:
    known = json.loads(Tokenizer.train([], 260).to_json())
    return Tokenizer(json.dumps({**known, **fields}))


def test_counts_equal_those_by_hand() -> None:
    tokenizer = Tokenizer.train([text for texts in TEXTS.values() for text in texts] * 3, 290)
    stats = TokenizerStats("mine", tokenizer)
    for pair in _batch(TEXTS):
        stats.add([pair])
    used = set()
    for name, texts in TEXTS.items():
        encoded = [tokenizer.encode(text) for text in texts]
        used.update(id_ for ids in encoded for id_ in ids)
        counts = stats.sources[name]
        assert (counts.documents, counts.tokens, counts.changed) == (2, sum(map(len, encoded)), 0)
        num_bytes, characters = sum(len(text.encode()) for text in texts), sum(map(len, texts))
        assert (counts.num_bytes, counts.characters) == (num_bytes, characters)
        assert counts.bytes_per_token == num_bytes / counts.tokens
        assert counts.characters_per_token == characters / counts.tokens
    assert stats.total.tokens == sum(counts.tokens for counts in stats.sources.values())
    assert stats.unused_ids() == [id_ for id_ in range(4, tokenizer.vocab_size) if id_ not in used]
    assert stats.vocabulary == tokenizer.vocab_size
    assert stats.bytes_per_second > 0
    written = json.loads(json.dumps(stats.as_json()))
    assert written["special_tokens"]["<|endoftext|>"] == written["end_of_text"]["id"] == 0
    assert written["total"]["tokens"] == stats.total.tokens
    assert written["first_change"] is None


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        (
            {"normalizer": {"type": "NFKC"}},
            "the ﬁnal",
            "character 4: 'the ﬁnal' becomes 'the final'; its normalizer (NFKC)",
        ),
        (
            {"normalizer": {"type": "Lowercase"}},
            "abC",
            "character 2: 'abC' becomes 'abc'; its normalizer (Lowercase)",
        ),
        (
            {"normalizer": {"type": "Strip", "strip_left": False, "strip_right": True}},
            "ab ",
            "character 2: 'ab ' becomes nothing after 2 characters; its normalizer (Strip)",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "ab",
            "character 0: 'ab' becomes ' ab'; its decoder (ByteLevel) does not restore",
        ),
    ],
)
def test_the_first_text_that_changes_is_named(fields: dict[str, Any], text: str, expected: str) -> None:
    stats = TokenizerStats("mine", _changed(**fields))
    stats.add(_batch({"a": [" kept"], "b": [text, text]}))
    assert (stats.total.changed, stats.sources["a"].changed) == (2, 0)
    assert stats.first_change is not None
    assert stats.first_change.startswith(f"b, document b:0, {expected}")


def test_unknown_words_are_the_reason() -> None:
    vocabulary = {"[UNK]": 0, "known": 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": 2, "content": "[EOS]", **special}]
    stats = TokenizerStats("mine", _changed(model=model, added_tokens=added, pre_tokenizer=None, decoder=None))
    stats.add(_batch({"a": ["known", "new"]}))
    assert stats.total.changed == 1
    assert "its vocabulary lacks some characters, which become '[UNK]'" in str(stats.first_change)
    assert stats.unused_ids() == []


def test_too_many_sources_are_refused() -> None:
    with pytest.raises(DataError, match="more than 1,000 sources"):
        TokenizerStats("mine", _changed()).add([(str(number), Document("x", "a")) for number in range(1001)])
