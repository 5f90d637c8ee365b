"""How fast text becomes tokens and tokens become batches: `python benchmarks/loader.py`.

Reads from a warm page cache, on one thread where it says so. Writes `benchmarks/results/loader.json`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
from environment import RESULTS, environment
from rich.console import Console
from rich.table import Table

from deepseek_v3.data.sample_corpora import stdlib_documents
from deepseek_v3.data.tokens.index import CorpusOptions
from deepseek_v3.data.tokens.loader import TokenLoader
from deepseek_v3.data.tokens.shards import ShardWriter, TokenShards
from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.data.tokens.tokenizer import Tokenizer

VOCAB_SIZE = 8192
SYNTHETIC_DOCUMENTS, SYNTHETIC_LENGTH = 2048, 2**16  # 134 million tokens, 268 MB
SHAPES = ((256, 32), (4096, 8))  # sequence length, batch size
SECONDS = 3.0  # for each measurement

Row = dict[str, str | int | float]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        stdlib, synthetic = Path(folder, "stdlib"), Path(folder, "synthetic")
        tokenize_corpus(
            "python-stdlib", stdlib, vocab_size=VOCAB_SIZE, tokenizer=None, holdout=0.02, fim_rate=0.0, seed=0
        )
        write_synthetic(synthetic)
        rows = list(measure_tokenizer(TokenShards.open(stdlib).load_tokenizer()))
        for name, directory in (("python-stdlib", stdlib), ("synthetic", synthetic)):
            rows += measure_loader(name, TokenShards.open(directory))
    show(rows)
    text = json.dumps({**environment("numpy", "tokenizers"), "results": rows}, indent=2)
    (RESULTS / "loader.json").write_text(text + "\n", encoding="utf-8")


def write_synthetic(directory: Path) -> None:
    """One large shard of random tokens."""
    random = np.random.default_rng(0)
    options = CorpusOptions(source="synthetic", text_field="text", holdout=0.1, fim_rate=0.0, seed=0)
    with ShardWriter(directory, Tokenizer.train([], 260), SYNTHETIC_DOCUMENTS * (SYNTHETIC_LENGTH + 1)) as writer:
        for _ in range(SYNTHETIC_DOCUMENTS):
            writer.add("train", random.integers(4, 260, SYNTHETIC_LENGTH).tolist(), SYNTHETIC_LENGTH)
        writer.add("holdout", [4], 1)
        writer.finish(options)


def measure_tokenizer(tokenizer: Tokenizer) -> Iterator[Row]:
    """Encoding on all cores, and training from the start."""
    texts = [document.text for document in stdlib_documents()]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for what, run in (
        ("encode_batch", lambda: tokenizer.encode_batch(texts)),
        (f"train, {VOCAB_SIZE} ids", lambda: Tokenizer.train(texts, VOCAB_SIZE)),
    ):
        yield {"what": what, "corpus": "python-stdlib", "rate": megabytes * calls_per_second(run), "unit": "MB/s"}


def measure_loader(corpus: str, shards: TokenShards) -> Iterator[Row]:
    """`TokenLoader.batch` on one thread, batch after batch as training calls it."""
    for sequence_length, batch_size in SHAPES:
        batches = batches_per_second(TokenLoader(shards, sequence_length=sequence_length), batch_size)
        what = f"batch of {batch_size} x {sequence_length}"
        rate = batches * batch_size * sequence_length / 1e6
        yield {"what": what, "corpus": corpus, "rate": rate, "unit": "million tokens/s"}


def batches_per_second(loader: TokenLoader, batch_size: int) -> float:
    firsts = count(step=batch_size)
    return calls_per_second(lambda: loader.batch(next(firsts), batch_size))


def calls_per_second(run: Callable[[], object]) -> float:
    """The best of three measurements, each after a call that warms up."""
    best = 0.0
    for _ in range(3):
        run()
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS / 3 or calls == 0:
            run()
            calls += 1
        best = max(best, calls / elapsed)
    return best


def show(rows: list[Row]) -> None:
    table = Table("What", "Corpus", "Rate", "Unit")
    for row in rows:
        table.add_row(str(row["what"]), str(row["corpus"]), f"{row['rate']:,.1f}", str(row["unit"]))
    Console().print(table)


if __name__ == "__main__":
    main()
