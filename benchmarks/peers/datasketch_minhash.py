"""datasketch's MinHash and LSH as a deduplication, run by a Python that has datasketch 2.0.0 and orjson:

`python datasketch_minhash.py INPUT OUTPUT`

Reads a folder of JSONL shards, writes the survivors to `OUTPUT/survivors/`, for each document the number of the
first of its cluster to `OUTPUT/clusters.npy`, and the seconds of each stage to `OUTPUT/stages.json`. 128
permutations, threshold 0.8, sets of five consecutive words; all else is at its default.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from datasketch import LeanMinHash, MinHash, MinHashLSH  # type: ignore[import-not-found]

sys.path.insert(0, str(Path(__file__).parents[1]))
from words import words_of

PERMUTATIONS, THRESHOLD, SHINGLE = 128, 0.8, 5
CHUNKS = 8  # of a shard, so that both processes are busy to the end


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    shards = sorted(arguments.input.glob("*.jsonl"))
    survivors: Path = arguments.output / "survivors"
    survivors.mkdir(parents=True)
    seconds = {}
    with ProcessPoolExecutor(arguments.workers) as pool:
        start = time.perf_counter()
        chunks = [(shard, part) for shard in shards for part in range(CHUNKS)]
        sketches = list(pool.map(sketch, chunks))
        seconds["sketch"] = time.perf_counter() - start
        start = time.perf_counter()
        clusters = cluster(np.concatenate(sketches))
        seconds["cluster"] = time.perf_counter() - start
        start = time.perf_counter()
        sizes = [sum(map(len, sketches[first : first + CHUNKS])) for first in range(0, len(sketches), CHUNKS)]
        firsts = np.cumsum([0, *sizes]).tolist()
        kept = clusters == np.arange(len(clusters))
        parts = [kept[first:last] for first, last in pairwise(firsts)]
        list(pool.map(write, shards, parts, repeat(survivors)))
        seconds["write"] = time.perf_counter() - start
    np.save(arguments.output / "clusters.npy", clusters)
    (arguments.output / "stages.json").write_text(json.dumps(seconds), encoding="utf-8")


def sketch(chunk: tuple[Path, int]) -> Any:
    """The signatures of a part of a shard's documents, uint32 [documents, 128]."""
    shard, part = chunk
    lines = shard.read_bytes().splitlines()
    length = -(-len(lines) // CHUNKS)
    texts = [orjson.loads(line)["text"] for line in lines[part * length : (part + 1) * length]]
    sketches = MinHash.generator(map(shingles, texts), num_perm=PERMUTATIONS)
    return np.array([sketch.hashvalues for sketch in sketches]).reshape(-1, PERMUTATIONS)


def shingles(text: str) -> set[bytes]:
    words = words_of(text)
    last = max(len(words) - SHINGLE + 1, 1) if words else 0
    return {" ".join(words[start : start + SHINGLE]).encode() for start in range(last)}


def cluster(signatures: Any) -> Any:
    """For each document the first one of its cluster."""
    of = partial(LeanMinHash, seed=1, scheme="affine32")
    minhashes = [of(hashvalues=values) for values in signatures]
    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    firsts = list(range(len(minhashes)))

    def first(document: int) -> int:
        while firsts[document] != document:
            firsts[document] = firsts[firsts[document]]
            document = firsts[document]
        return document

    for document, minhash in enumerate(minhashes):
        for other in chain([document], lsh.query(minhash)):
            one, two = sorted((first(document), first(other)))
            firsts[two] = one
        lsh.insert(document, minhash)
    return np.array([first(document) for document in range(len(minhashes))])


def write(shard: Path, kept: Any, survivors: Path) -> None:
    lines = shard.read_bytes().splitlines(keepends=True)
    (survivors / shard.name).write_bytes(b"".join(line for line, keep in zip(lines, kept, strict=True) if keep))


if __name__ == "__main__":
    main()
