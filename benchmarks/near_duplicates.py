"""Programs that remove near duplicates from JSONL shards, and the quality of their results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import yaml
from corpus import DOCUMENTS, read_corpus
from numpy.typing import NDArray
from scipy import sparse

Int64Array = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_PEERS = Path(__file__).parent / "peers"


class Decisions(NamedTuple):
    """Which cluster each document is in, int64 [documents], and whether it is kept, bool [documents]."""

    clusters: Int64Array
    kept: BoolArray


@dataclass(frozen=True)
class System:
    """A program: the command that runs it on a corpus, and a reader of its decisions from its output folder."""

    name: str
    command: Callable[[Path, Path], list[str | Path]]
    decisions: Callable[[Path, Path], Decisions]


def systems(peers: Path, workers: int) -> dict[str, System]:
    """All programs by name: ours, and those installed in the virtual environment `peers`."""
    python = peers / "bin" / "python"

    def datatrove(buckets: int) -> Callable[[Path, Path], list[str | Path]]:
        script = _PEERS / "datatrove_minhash.py"
        options = ["--buckets", str(buckets), "--workers", str(workers)]
        return lambda corpus, output: [python, script, corpus / DOCUMENTS, output, *options]

    def datasketch(corpus: Path, output: Path) -> list[str | Path]:
        return [python, _PEERS / "datasketch_minhash.py", corpus / DOCUMENTS, output, "--workers", str(workers)]

    found = [
        System("ours", lambda corpus, output: _ours(corpus, output, workers), _our_decisions),
        System("datatrove", datatrove(16), _datatrove_decisions),  # 16 buckets of 8: 128 hashes, as the others
        System("datatrove-default", datatrove(14), _datatrove_decisions),
        System("datasketch", datasketch, _datasketch_decisions),
    ]
    return {system.name: system for system in found}


def score(decisions: Decisions, pairs: Int64Array) -> dict[str, Any]:
    """How decisions compare with the true `pairs`, int64 [pairs, 2].

    `resolved`: the share of true pairs of which at most one document is kept. `justified`: the share of removed
    documents that are truly alike to another one in their cluster. `recall`: the share of true pairs that are in
    one cluster. `precision`: the share of pairs in one cluster that are true; a few large clusters decide it.
    `removable`: the share that is removed if one document of each connected set of true pairs is kept.
    """
    clusters, kept = decisions
    one, other = pairs.T
    same_cluster = clusters[one] == clusters[other]
    alike = np.zeros(len(clusters), np.bool_)
    alike[pairs[same_cluster]] = True
    sizes = np.unique(clusters, return_counts=True)[1]
    return {
        "resolved": 1 - float((kept[one] & kept[other]).sum()) / len(pairs),
        "justified": float(alike[~kept].mean()),
        "recall": float(same_cluster.mean()),
        "precision": float(same_cluster.sum() / (sizes * (sizes - 1) // 2).sum()),
        "removed": int((~kept).sum()),
        "removable": len(clusters) - len(np.unique(connected(len(clusters), pairs))),
    }


def connected(documents: int, pairs: Int64Array) -> Int64Array:
    """The number of each document's cluster, if such pairs are in one, int64 [documents]."""
    links = (np.ones(len(pairs), np.bool_), (pairs[:, 0], pairs[:, 1]))
    graph = sparse.coo_matrix(links, shape=(documents, documents))
    return sparse.csgraph.connected_components(graph, directed=False)[1].astype(np.int64)


def _ours(corpus: Path, output: Path, workers: int) -> list[str | Path]:
    config = {
        "input_path": str(corpus / DOCUMENTS),
        "output_dir": str(output / "run"),
        "pipeline": ["exact_deduplication", "deduplication"],
        "workers": workers,
        "output_format": "jsonl",
    }
    (output / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return [Path(sys.executable).with_name("dsv3"), "preprocess", "--config", output / "config.yaml"]


def _our_decisions(corpus: Path, output: Path) -> Decisions:
    """From the log of what was dropped, which names the document that each one is a copy of."""
    place = {document.id: number for number, document in enumerate(read_corpus(corpus))}
    lines = (line for path in (output / "run" / "dropped").iterdir() for line in path.read_bytes().splitlines())
    dropped = map(orjson.loads, lines)
    pairs = np.array([(place[entry["id"]], place[entry["figures"]["duplicate_of"]]) for entry in dropped], np.int64)
    kept = np.ones(len(place), np.bool_)
    kept[pairs[:, 0]] = False
    return Decisions(connected(len(place), pairs), kept)


def _datatrove_decisions(corpus: Path, output: Path) -> Decisions:
    """From its files `<shard>.clusters`, whose entries are a document's number in the shard and its cluster's.

    Documents that are like no other have no entry. `<shard>.remove` holds the numbers of those that are not kept.
    """
    shards = sorted((corpus / DOCUMENTS).iterdir())
    starts = np.cumsum([0, *(len(path.read_bytes().splitlines()) for path in shards)])
    clusters = np.arange(starts[-1]) + starts[-1]
    kept = np.ones(starts[-1], np.bool_)
    for number, start in enumerate(starts[:-1]):
        documents, found = np.fromfile(output / "remove" / f"{number:06d}.clusters", "<u4").reshape(-1, 2).T
        clusters[start + documents] = found
        kept[start + np.fromfile(output / "remove" / f"{number:06d}.remove", "<u4")] = False
    return Decisions(clusters, kept)


def _datasketch_decisions(_: Path, output: Path) -> Decisions:
    clusters = np.load(output / "clusters.npy")
    return Decisions(clusters, clusters == np.arange(len(clusters)))
