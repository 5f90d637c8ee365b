"""Our heuristic filters and datatrove's on the same documents: verdicts, causes of differences, MB/s per core.

`python benchmarks/heuristics_agreement.py DOCUMENTS.jsonl --peer-python PEERS/bin/python --output RESULT.json`

`DOCUMENTS.jsonl` has a `text` on each line; the Python of the peers has datatrove 0.10.1 and spacy. Both run the
repetition and quality rules of Gopher, then those of C4, then FineWeb's, with default parameters.

A difference has the cause whose change alone turns our verdict, as the plain reference finds it, into datatrove's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import orjson
import pyarrow as pa
from environment import environment

from deepseek_v3.config.filter_config import RULE_GROUPS, HeuristicsConfig
from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.heuristics import HeuristicFilter, reference
from deepseek_v3.utils.text import table

_AS_PUBLISHED: dict[str, Any] = {"join_wrapped_lines": False, "require_final_punctuation": True}
PEER = Path(__file__).parent / "peers" / "datatrove_filters.py"
BATCH_CHARACTERS = 2**22  # as the pipeline reads them
REASONS = {
    **{f"top_{n}_gram": f"gopher_top_{n}gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"gopher_duplicate_{n}grams" for n in range(5, 11)},
    "dup_para_frac": "gopher_duplicate_paragraphs",
    "dup_para_char_frac": "gopher_duplicate_paragraph_characters",
    "dup_line_frac": "gopher_duplicate_lines",
    "dup_line_char_frac": "gopher_duplicate_line_characters",
    "gopher_short_doc": "gopher_too_few_words",
    "gopher_long_doc": "gopher_too_many_words",
    "gopher_below_avg_threshold": "gopher_short_words",
    "gopher_above_avg_threshold": "gopher_long_words",
    "gopher_too_many_hashes": "gopher_hashes",
    "gopher_too_many_ellipsis": "gopher_ellipses",
    "gopher_too_many_bullets": "gopher_bullet_lines",
    "gopher_too_many_end_ellipsis": "gopher_ellipsis_lines",
    "gopher_below_alpha_threshold": "gopher_few_alphabetic_words",
    "gopher_enough_stop_words": "gopher_few_stop_words",
    "lorem_ipsum": "c4_lorem_ipsum",
    "curly_bracket": "c4_curly_bracket",
    "too_few_sentences": "c4_too_few_sentences",
    "line_punct_ratio": "fineweb_unpunctuated_lines",
    "short_line_ratio": "fineweb_short_lines",
    "char_dup_ratio": "fineweb_repeated_lines",
    "list_ratio": "fineweb_newlines",
}

Reasons = Sequence[str | None]
Change = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path)
    parser.add_argument("--peer-python", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=10_000, help="documents to read")
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    with arguments.documents.open("rb") as lines:
        texts = [orjson.loads(line)["text"] for line, _ in zip(lines, range(arguments.limit), strict=False)]
    theirs = run_peer(arguments.peer_python, texts)
    result = compare(texts, theirs)
    show(result)
    text = json.dumps({**environment("numpy", "pyarrow"), "peer": "datatrove 0.10.1", **result}, indent=2)
    arguments.output.write_text(text + "\n", encoding="utf-8")


def run_peer(python: Path, texts: Sequence[str]) -> dict[str, Any]:
    """The results of datatrove's filters on the texts."""
    with tempfile.TemporaryDirectory() as folder:
        documents, output = Path(folder, "documents.jsonl"), Path(folder, "result.json")
        documents.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
        subprocess.run([python, PEER, documents, output], check=True)
        return orjson.loads(output.read_bytes())


def compare(texts: Sequence[str], theirs: dict[str, Any]) -> dict[str, Any]:
    """Speed of both, agreement of the chain and of each group of rules alone, and the causes of differences."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    reasons, kept, seconds = apply_filters(texts)
    groups = {"chain": agreement(reasons, theirs["chain"])}
    for group in RULE_GROUPS:
        groups[group] = agreement(apply_filters(texts, group)[0], theirs["alone"][group])
    both = [row for row, reason in enumerate(reasons) if reason is None and theirs["chain"][row] is None]
    return {
        "documents": len(texts),
        "megabytes": megabytes,
        "megabytes_per_second": {"ours": megabytes / seconds, "datatrove": megabytes / theirs["seconds"]},
        "agreement": groups,
        "kept_by_both": len(both),
        "kept_with_the_same_text": sum(kept[row] == theirs["texts"][row] for row in both),
        "differences": dict(causes(texts, reasons, theirs)),
    }


def apply_filters(texts: Sequence[str], *rules: str) -> tuple[Reasons, dict[int, str], float]:
    """Our reason for each document, the texts of those kept, and the CPU seconds this took."""
    stage = HeuristicFilter(**_AS_PUBLISHED, **({"rules": list(rules)} if rules else {}))
    batches = list(batched(texts))
    start = time.process_time()
    outcomes = [stage.apply(batch) for batch in batches]
    seconds = time.process_time() - start
    reasons: dict[int, str | None] = {}
    kept: dict[int, str] = {}
    for outcome in outcomes:
        reasons |= zip(
            map(int, outcome.dropped["id"].to_pylist()), outcome.dropped["reason"].to_pylist(), strict=True
        )
        kept |= zip(map(int, outcome.kept["id"].to_pylist()), outcome.kept["text"].to_pylist(), strict=True)
    return [reasons.get(row) for row in range(len(texts))], kept, seconds


def batched(texts: Sequence[str]) -> list[pa.RecordBatch]:
    """Batches of about `BATCH_CHARACTERS`, with positions as ids."""
    batches, rows, characters = [], list[int](), 0
    for row, text in enumerate(texts):
        rows.append(row)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or row + 1 == len(texts):
            ids, none = [str(row) for row in rows], [None] * len(rows)
            batches.append(record_batch(ids, [texts[row] for row in rows], [""] * len(rows), rows, none))
            rows, characters = [], 0
    return batches


def agreement(ours: Reasons, theirs: Reasons) -> dict[str, float]:
    """Shares of documents with the same verdict, and with the same reason."""
    pairs = [(our, REASONS.get(their, their) if their else None) for our, their in zip(ours, theirs, strict=True)]
    return {
        "verdict": sum((our is None) == (their is None) for our, their in pairs) / len(pairs),
        "reason": sum(our == their for our, their in pairs) / len(pairs),
        "kept_by_us": sum(our is None for our, _ in pairs),
        "kept_by_datatrove": sum(their is None for _, their in pairs),
    }


def causes(texts: Sequence[str], ours: Reasons, theirs: dict[str, Any]) -> Counter[str]:
    """How many verdicts of the chain differ, by cause."""
    changes = differences_of_definition(theirs)
    found: Counter[str] = Counter()
    for text, our, their in zip(texts, ours, theirs["chain"], strict=True):
        if (our is None) != (their is None):
            fitting = [cause for cause, change in changes.items() if keeps(text, change) == (their is None)]
            found[fitting[0] if fitting else "unexplained"] += 1
    return found


def keeps(text: str, change: Change) -> bool:
    """Whether the reference keeps a text when some of its definitions are changed."""
    with patch.multiple(reference, **change):
        return not reference.apply_rules(text, HeuristicsConfig(**_AS_PUBLISHED))[0]


def differences_of_definition(theirs: dict[str, Any]) -> dict[str, Change]:
    """By what we do differently on purpose, datatrove's way of doing it."""
    marks = set(theirs["marks"])
    words: Change = {"split_chunk": lambda chunk: theirs["words"].get(chunk, [chunk])}
    ngrams: Change = {"duplicate_ngrams": duplicates_among_those_visited}
    lines: Change = {
        "paragraphs": lambda text: re.split(r"\n{2,}", text.strip()),
        "filled_lines": lambda text: re.split(r"\n+", text),
    }
    symbols: Change = {"is_symbol": marks.issuperset}
    return {
        "words are split differently (smileys, rare units and marks)": words,
        "n-grams inside a repeat count as seen": ngrams,
        "lines and paragraphs of white space alone do not count": lines,
        "signs such as • and → are no words": symbols,
        "several of these": words | ngrams | lines | symbols,
    }


def duplicates_among_those_visited(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """As datatrove has it: after a repeat, the n - 1 n-grams that begin inside it are not remembered."""
    found: list[tuple[str, ...]] = []
    seen: set[str] = set()
    position = 0
    while position + n <= len(words):
        ngram = tuple(words[position : position + n])
        if "".join(ngram) in seen:
            found.append(ngram)
            position += n
        else:
            seen.add("".join(ngram))
            position += 1
    return found


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{row['verdict']:.2%}",
            f"{row['reason']:.2%}",
            str(row["kept_by_us"]),
            str(row["kept_by_datatrove"]),
        ]
        for name, row in result["agreement"].items()
    ]
    print(f"{result['documents']:,} documents, {result['megabytes']:.1f} MB\n")
    print(*table(["rules", "same verdict", "same reason", "kept by us", "kept by datatrove"], rows), sep="\n")
    print(f"\nsame text: {result['kept_with_the_same_text']:,} of {result['kept_by_both']:,} kept by both\n")
    print(
        *table(["cause of another verdict", "documents"], [[k, str(v)] for k, v in result["differences"].items()]),
        sep="\n",
    )
    ours, theirs = result["megabytes_per_second"].values()
    print(f"\none core: {ours:.2f} MB/s, datatrove {theirs:.3f} MB/s: {ours / theirs:.1f} times as fast")


if __name__ == "__main__":
    main()
