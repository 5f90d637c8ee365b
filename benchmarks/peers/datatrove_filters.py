"""datatrove's heuristic filters, run by a Python that has datatrove 0.10.1 and spacy:

`python datatrove_filters.py DOCUMENTS OUTPUT`

Reads a JSONL file with `text`, and writes a JSON file: the CPU seconds of the chain of four filters with default
parameters, the reason and the text that each document ends with, the reasons of each filter asked alone, the words
of each chunk of text between white space, and the characters that make no word.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datatrove.data import Document  # type: ignore[import-not-found]
from datatrove.pipeline.filters import (  # type: ignore[import-not-found]
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import PUNCTUATION_SET, split_into_words  # type: ignore[import-not-found]

FILTERS = {
    "gopher_repetition": GopherRepetitionFilter(),
    "gopher_quality": GopherQualityFilter(),
    "c4": C4QualityFilter(),
    "fineweb": FineWebQualityFilter(),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("documents", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with arguments.documents.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    reason(list(FILTERS.values()), Document(text="A first text loads what is needed.", id=""))
    documents = [Document(text=text, id="") for text in texts]
    start = time.process_time()
    reasons = [reason(list(FILTERS.values()), document) for document in documents]
    result = {
        "seconds": time.process_time() - start,
        "chain": reasons,
        "texts": [document.text for document in documents],
        "alone": {
            name: [reason([single], Document(text=text, id="")) for text in texts]
            for name, single in FILTERS.items()
        },
        "words": {chunk: split_into_words(chunk) for chunk in {chunk for text in texts for chunk in text.split()}},
        "marks": "".join(sorted(PUNCTUATION_SET)),
    }
    arguments.output.write_text(json.dumps(result), encoding="utf-8")


def reason(filters: Sequence[Any], document: Any) -> str | None:
    """Why the first filter that drops a document does so, or None."""
    for single in filters:
        verdict = single.filter(document)
        if verdict is not True:
            return str(verdict[1])
    return None


if __name__ == "__main__":
    main()
