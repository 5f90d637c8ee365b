"""Speed of encoding on one core, ours and the tokenizers library's, and of `dsv3 tokenize` on one and two cores."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from corpus import DOCUMENTS, read_corpus
from process_stats import run_and_measure
from tokenizers import Tokenizer as HuggingFaceTokenizer

from deepseek_v3.data.tokens.tokenizer import Tokenizer

VOCAB_SIZE = 32_768
MEGABYTES = 20  # of English prose, to train on and to encode
_ENGLISH = tuple(
    "debian-policy debian-reference-en git-doc libreoffice-help-en-us linux-doc postgresql-doc python3.11-doc "
    "python-django-doc sqlite3-doc vim-doc".split()
)


def encoding_speed(corpus: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Median MB/s of UTF-8 text: by CPU time on one core, by wall-clock time for the command.

    Writes the tokenizer and the shards to `folder`, which must be empty.
    """
    texts = _prose(corpus)
    Tokenizer.train(texts, VOCAB_SIZE).save(folder / "tokenizer.json")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, _on_one_core) as pool:
        rates: dict[str, Any] = pool.apply(_rates, (folder / "tokenizer.json", texts, repeats))
    megabytes = sum(len(document.text.encode()) for document in read_corpus(corpus)) / 1e6
    for workers in (1, 2):
        seconds = []
        for number in range(repeats):
            command: list[str | Path] = [
                Path(sys.executable).with_name("dsv3"),
                "tokenize",
                "--input",
                corpus / DOCUMENTS,
            ]
            command += ["--tokenizer", folder / "tokenizer.json", "--output", folder / f"{workers}-{number}"]
            seconds.append(run_and_measure([*command, "--workers", str(workers)]).seconds)
        rates[f"tokenize_command_{workers}_workers"] = megabytes / median(seconds)
    return rates


def _prose(corpus: Path) -> list[str]:
    """English documents of a corpus, or the first ones where it names no package that is known here."""
    documents = list(read_corpus(corpus))
    english = [document for document in documents if document.source.startswith(_ENGLISH)]
    texts, size = [], 0
    for document in english or documents:
        texts.append(document.text)
        size += len(document.text.encode())
        if size >= MEGABYTES * 10**6:
            break
    return texts


def _on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["RAYON_NUM_THREADS"] = "1"


def _rates(path: Path, texts: list[str], repeats: int) -> dict[str, Any]:
    ours = Tokenizer.load(path)
    theirs = HuggingFaceTokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    start = time.perf_counter()
    ours.encode("Ready – ")
    ready = time.perf_counter() - start

    def encode_with_tokenizers() -> list[list[int]]:
        return [encoding.ids for encoding in theirs.encode_batch_fast(texts, add_special_tokens=False)]

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "megabytes": megabytes,
        "seconds_to_first_ids": ready,
        "ours_one_core": megabytes / _median_seconds(lambda: ours.encode_batch(texts), repeats),
        "tokenizers_one_core": megabytes / _median_seconds(encode_with_tokenizers, repeats),
        "equal_ids": ours.encode_batch(texts) == encode_with_tokenizers(),
    }


def _median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return median(seconds)
