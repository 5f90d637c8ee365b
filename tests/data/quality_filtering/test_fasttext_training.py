"""Classifier training separates documents, is deterministic, and reports held-out metrics."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from deepseek_v3.data.quality_filtering.fasttext import FastText, load_fasttext
from deepseek_v3.data.quality_filtering.fasttext_training import TrainingOptions, held_out_metrics, train_classifier
from deepseek_v3.utils.errors import DataError

OPTIONS = TrainingOptions(buckets=500)


def documents(kind: str, number: int, seed: int = 0) -> list[str]:
    """Returns texts of words that both kinds share, and of some words of one kind."""
    draw = random.Random(f"{kind} {seed}")
    common = [f"word{i}" for i in range(40)]
    own = [f"{kind}{i}" for i in range(8)]
    return [" ".join(draw.choice(own if draw.random() < 0.3 else common) for _ in range(30)) for _ in range(number)]


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name in ("one", "other"):
        train_classifier(documents("fine", 40), documents("poor", 30), OPTIONS).write(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    other_seed = train_classifier(
        documents("fine", 40), documents("poor", 30), TrainingOptions(buckets=500, seed=1)
    )
    assert (other_seed.input != load_fasttext(tmp_path / "one")._model.input).any()


def test_the_classifier_separates_unseen_documents() -> None:
    model = train_classifier(documents("fine", 150), documents("poor", 200), OPTIONS)
    assert model.labels == ["bad", "good"]  # the more frequent first, as in fastText's files
    assert model.label_counts == [200, 150]
    held = held_out_metrics(model, Path("m"), documents("fine", 60, 1), documents("poor", 60, 1))
    assert held.documents == 120
    assert min(held.precision, held.recall, held.auc) > 0.95


def test_word_ngrams_learn_the_order_of_words() -> None:
    draw = random.Random(0)
    pairs = [(draw.choice(["up", "down"]), draw.choice(["left", "right"])) for _ in range(300)]
    good = [f"{one} {other} x" for one, other in pairs]
    bad = [f"{other} {one} x" for one, other in pairs]
    both = train_classifier(good, bad, TrainingOptions(buckets=500, epochs=20))
    alone = train_classifier(good, bad, TrainingOptions(buckets=1, word_ngrams=1, epochs=20))
    assert held_out_metrics(both, Path("m"), good[:50], bad[:50]).auc == 1
    assert held_out_metrics(alone, Path("m"), good[:50], bad[:50]).auc < 0.7


def test_auc_is_the_share_of_pairs_in_order() -> None:
    model = train_classifier(documents("fine", 20), documents("poor", 20), TrainingOptions(buckets=10, epochs=1))
    good, bad = [*documents("fine", 9, 2), *documents("poor", 3, 3)], documents("poor", 14, 4)
    held = held_out_metrics(model, Path("m"), good, bad)
    classifier = FastText(model, Path("m"))
    score = {text: classifier.probabilities([text])[0, classifier.index("good")] for text in (*good, *bad)}
    pairs = [(score[one] > score[other]) + (score[one] == score[other]) / 2 for one in good for other in bad]
    assert held.auc == pytest.approx(np.mean(pairs))
    chosen = [text for text in (*good, *bad) if score[text] >= 0.5]
    hits = sum(text in good for text in chosen)
    assert held.precision == pytest.approx(hits / max(len(chosen), 1))
    assert held.recall == pytest.approx(hits / len(good))


def test_fasttext_reads_a_trained_model(tmp_path: Path) -> None:
    try:
        module = import_module("fasttext_pybind")
    except ImportError:
        pytest.skip("needs fastText's own code, such as the package fasttext-predict")
    path = tmp_path / "model.bin"
    train_classifier(documents("fine", 50), documents("poor", 50), OPTIONS).write(path)
    outside = module.fasttext()
    outside.loadModel(str(path))
    ours = load_fasttext(path)
    for text in [*documents("fine", 5, 1), *documents("poor", 5, 1)]:
        score, label = outside.predict(text + "\n", 1, 0.0, "strict")[0]
        found = ours.probabilities([text])[0]
        assert ours.labels[found.argmax()] == label.removeprefix("__label__")
        assert found.max() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("good", "bad", "missing"), [([], ["x"], "good"), (["x"], [], "bad")])
def test_both_classes_are_required(good: list[str], bad: list[str], missing: str) -> None:
    with pytest.raises(DataError, match=f"{missing} documents: found none"):
        train_classifier(good, bad, OPTIONS)
