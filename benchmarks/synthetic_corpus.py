"""Corpora with any number of documents, which are made of the lines of real documents."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from corpus import DOCUMENTS, SHARDS, edit, read_corpus

LENGTH = 1200  # mean characters of a document
COPIES = 0.1  # share of documents that are near copies of the previous document, with 1 % of its words edited


def write_synthetic_corpus(corpus: Path, output: Path, documents: int, seed: int = 0) -> None:
    """Writes `documents` documents, each of lines drawn at random from all of a corpus, in eight shards."""
    chooser = Random(seed)
    lines = [line for document in read_corpus(corpus) for line in document.text.splitlines() if len(line) > 40]
    mean = sum(map(len, lines)) / len(lines)
    (output / DOCUMENTS).mkdir(parents=True)
    text = ""
    for shard in range(SHARDS):
        with (output / DOCUMENTS / f"{shard:05d}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(shard * documents // SHARDS, (shard + 1) * documents // SHARDS):
                if text and chooser.random() < COPIES:
                    text = edit(text, 0.01, chooser)
                else:
                    text = "\n".join(chooser.choices(lines, k=max(1, round(LENGTH / mean))))
                file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
