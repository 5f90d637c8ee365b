"""datatrove's MinHash deduplication, run by a Python that has datatrove 0.10.1, spacy and orjson:

`python datatrove_minhash.py INPUT OUTPUT --buckets 16`

Reads a folder of JSONL shards, writes the survivors to `OUTPUT/survivors/`, the clusters to `OUTPUT/remove/` and
the seconds of each stage to `OUTPUT/stages.json`. 5-grams and 8 hashes for each bucket; all else is at its default.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found]
from datatrove.pipeline.dedup import (  # type: ignore[import-not-found]
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig  # type: ignore[import-not-found]
from datatrove.pipeline.readers import JsonlReader  # type: ignore[import-not-found]
from datatrove.pipeline.writers import JsonlWriter  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--buckets", type=int, default=14)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    output: Path = arguments.output
    shards = len(list(arguments.input.glob("*.jsonl")))
    config = MinhashConfig(n_grams=5, num_buckets=arguments.buckets, hashes_per_bucket=8)
    signatures, buckets, remove = (str(output / name) for name in ("signatures", "buckets", "remove"))
    stages = {
        "signatures": (shards, [JsonlReader(str(arguments.input)), MinhashDedupSignature(signatures, config)]),
        "buckets": (arguments.buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        "clusters": (1, [MinhashDedupCluster(buckets, remove, config, save_cluster_id=True)]),
        "filter": (
            shards,
            [
                JsonlReader(str(arguments.input)),
                MinhashDedupFilter(remove),
                JsonlWriter(str(output / "survivors"), compression=None),
            ],
        ),
    }
    seconds = {}
    for name, (tasks, steps) in stages.items():
        start = time.perf_counter()
        logs = str(output / "logs" / name)
        LocalPipelineExecutor(steps, tasks=tasks, workers=arguments.workers, logging_dir=logs).run()
        seconds[name] = time.perf_counter() - start
    (output / "stages.json").write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
