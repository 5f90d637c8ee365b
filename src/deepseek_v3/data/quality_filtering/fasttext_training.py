"""Training of a fastText classifier of good and bad documents (Joulin et al. 2016), in NumPy.

Training runs in one thread from one seed, so the same documents give the same model, byte for byte.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from deepseek_v3.data.arrays import Float32Array, Int64Array
from deepseek_v3.data.quality_filtering.fasttext import FastText, split_words, word_hashes, word_ngrams
from deepseek_v3.data.quality_filtering.fasttext_format import FastTextFile
from deepseek_v3.utils.errors import DataError

GOOD, BAD = "good", "bad"


@dataclass(frozen=True)
class TrainingOptions:
    """Hyperparameters of training.

    The vector `width`, `word_ngrams` and `epochs` follow Joulin et al. 2016, §3.1; the initial `learning_rate` is
    the largest that they try. There are fewer `buckets` of hashed n-grams than their 10 million, since each takes
    4 · width bytes in the model's file. `seed` determines the initial vectors and the order of the documents.
    """

    width: int = 10
    word_ngrams: int = 2
    buckets: int = 2**20
    epochs: int = 5
    learning_rate: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class HeldOutMetrics:
    """Metrics of a classifier on held-out documents; `good` is the positive class."""

    documents: int
    precision: float
    recall: float
    auc: float


def train_classifier(good: Iterable[str], bad: Iterable[str], options: TrainingOptions) -> FastTextFile:
    """Trains a classifier on good and bad texts. Raises DataError if there are no texts of one kind."""
    vocabulary: defaultdict[bytes, int] = defaultdict(count().__next__)
    texts = [[_number_words(text, vocabulary) for text in kind] for kind in (good, bad)]
    for name, kind in zip((GOOD, BAD), texts, strict=True):
        if not kind:
            raise DataError(f"{name} documents: found none to train on; give files with more of them")
    labels, sizes = [GOOD, BAD], [*map(len, texts)]
    if sizes[0] < sizes[1]:  # fastText lists the more frequent label first
        labels, sizes, texts = labels[::-1], sizes[::-1], texts[::-1]
    features = _features([*texts[0], *texts[1]], [*vocabulary], options)
    targets = np.repeat([0, 1], sizes)
    input_rows, output_rows = _train_by_sgd(features, targets, len(vocabulary) + options.buckets, options)
    return FastTextFile(
        words=dict(vocabulary),
        labels=labels,
        label_counts=sizes,
        word_ngrams=options.word_ngrams,
        min_characters=0,
        max_characters=0,
        buckets=options.buckets,
        loss="softmax",
        bucket_rows=None,
        input=input_rows,
        output=output_rows,
    )


def held_out_metrics(model: FastTextFile, path: Path, good: Sequence[str], bad: Sequence[str]) -> HeldOutMetrics:
    """Computes precision and recall of `good` at a probability of 0.5, and the area under the ROC curve.

    `path` names the model in errors.
    """
    classifier = FastText(model, path)
    scores = classifier.probabilities([*good, *bad])[:, classifier.index(GOOD)]
    is_good = np.arange(len(scores)) < len(good)
    chosen = scores >= 0.5
    hits = int((chosen & is_good).sum())
    # The share of pairs of a good and a bad document in which the good one scores higher (Mann and Whitney 1947).
    rank_sum = rankdata(scores)[is_good].sum() - len(good) * (len(good) + 1) / 2
    return HeldOutMetrics(
        documents=len(scores),
        precision=hits / max(int(chosen.sum()), 1),
        recall=hits / max(len(good), 1),
        auc=float(rank_sum / max(len(good) * len(bad), 1)),
    )


def _number_words(text: str, vocabulary: defaultdict[bytes, int]) -> Int64Array:
    return np.fromiter(map(vocabulary.__getitem__, split_words(text)), np.int64)


def _features(
    documents: Sequence[Int64Array], words: Sequence[bytes], options: TrainingOptions
) -> list[tuple[Int64Array, Float32Array]]:
    """Returns, for each document, the rows of its words and n-grams, and the share of each in all: [rows, 1]."""
    hashes = word_hashes(words)
    features = []
    for tokens in documents:
        rows = tokens
        if options.word_ngrams > 1:
            found, _ = word_ngrams(hashes[tokens], np.array([0, len(tokens)]), options.word_ngrams)
            rows = np.concatenate([rows, len(words) + (found % np.uint64(options.buckets)).astype(np.int64)])
        different, counts = np.unique(rows, return_counts=True)
        features.append((different, (counts / len(rows)).astype(np.float32)[:, None]))
    return features


def _train_by_sgd(
    features: Sequence[tuple[Int64Array, Float32Array]], targets: Int64Array, rows: int, options: TrainingOptions
) -> tuple[Float32Array, Float32Array]:
    """Trains by stochastic gradient descent, one document per step, with a learning rate that falls linearly to 0.

    Returns the input matrix, float32 [rows, width], and the output matrix, float32 [2, width].
    """
    random = np.random.default_rng(options.seed)
    bound = 1 / options.width
    input_rows = random.uniform(-bound, bound, (rows, options.width)).astype(np.float32)
    output_rows = np.zeros((2, options.width), np.float32)
    truths = np.eye(2, dtype=np.float32)
    steps = options.epochs * len(features)
    for step in range(steps):
        if step % len(features) == 0:
            order = random.permutation(len(features))
        document = order[step % len(features)]
        chosen, shares = features[document]
        hidden = (input_rows[chosen] * shares).sum(axis=0)
        powers = np.exp(output_rows @ hidden)
        error = truths[targets[document]] - powers / powers.sum()
        error *= np.float32(options.learning_rate * (1 - step / steps))
        input_rows[chosen] += shares * (error @ output_rows)
        output_rows += np.outer(error, hidden)
    return input_rows, output_rows
