"""The data pipeline beside its peers, on one corpus and in one run: `python benchmarks/data_pipeline.py --help`.

Near-duplicate removal from JSONL to JSONL, time and memory from outside and quality against the exact truth; its
growth with the number of documents; heuristic filters; text to token ids. Peers run under a Python of their own:

`python -m venv .peers && .peers/bin/pip install 'datatrove[processing]==0.10.1' spacy datasketch==2.0.0 orjson`

Writes `benchmarks/results/data_pipeline_<machine>.json` and prints the required, targeted and measured figures.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from corpus import DOCUMENTS, read_corpus, write_shards
from encoding_speed import encoding_speed
from environment import RESULTS, cpu_name, environment
from exact_pairs import similar_pairs
from heuristics_agreement import compare, run_peer
from near_duplicates import Int64Array, System, score, systems
from process_stats import run_and_measure
from synthetic_corpus import write_synthetic_corpus

from deepseek_v3.utils.command_line import run_command
from deepseek_v3.utils.text import table

_PACKAGES = ("numpy", "pyarrow", "orjson", "tiktoken", "tokenizers")
_PEER_PACKAGES = ("datatrove", "datasketch", "spacy", "numpy")

Results = dict[str, Any]


class Figure(NamedTuple):
    """A figure that is required: at least `must`, better `aim`; at most where `must` is the larger of the two."""

    name: str
    path: tuple[str | int, ...]
    must: float
    aim: float


FIGURES = (
    Figure("near duplicates: times faster than datatrove, 128 hashes", ("ratios", "datatrove"), 50, 100),
    Figure("near duplicates: times faster than datasketch", ("ratios", "datasketch"), 5, 12),
    Figure("near duplicates: true pairs not both kept", ("near_duplicates", "ours", "resolved"), 0.975, 0.99),
    Figure("near duplicates: removed for a true pair", ("near_duplicates", "ours", "justified"), 0.95, 0.97),
    Figure("a million documents: peak memory, MB", ("growth", 1_000_000, "peak_megabytes"), 2000, 1200),
    Figure("growth: time per document, most over fewest documents", ("growth_ratio",), 1.3, 1.1),
    Figure("heuristics: times faster than datatrove on one core", ("ratios", "heuristics"), 10, 20),
    Figure("heuristics: same verdict as datatrove", ("heuristics", "agreement", "chain", "verdict"), 0.995, 0.999),
    Figure("text to ids: MB/s on one core", ("encoding", "ours_one_core"), 12, 18),
)


def main(
    corpus: Annotated[Path, typer.Option(help="What corpus.py wrote; the truth is computed where it is missing.")],
    peers: Annotated[
        list[str] | None, typer.Option(help="datatrove (16 x 8), datatrove-default (14 x 8), datasketch.")
    ] = None,
    peers_venv: Annotated[Path, typer.Option(help="The virtual environment that has them.")] = Path(".peers"),
    documents: Annotated[
        int | None, typer.Option(help="Only this many documents, the first of the corpus.")
    ] = None,
    growth: Annotated[list[int] | None, typer.Option(help="Numbers of documents to try ours on.")] = None,
    heuristics: Annotated[int, typer.Option(help="Documents to filter as datatrove does; 0 for none.")] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; medians are reported.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes of each system.")] = 2,
    machine: Annotated[
        str | None, typer.Option(help="Name in the result's file; the processor's if left out.")
    ] = None,
) -> None:
    """Measure the data pipeline, and its peers on the same corpus."""
    known = systems(peers_venv, workers)
    chosen = [known[name] for name in ["ours", *(peers or [])]]
    with tempfile.TemporaryDirectory() as folder, _part_of(corpus, documents) as part:
        results: Results = {
            "corpus": json.loads((corpus / "corpus.json").read_text()) | {"documents_used": documents},
            "workers": workers,
            "repeats": repeats,
            "near_duplicates": near_duplicates(chosen, part, Path(folder), repeats),
            "growth": {count: grown(known["ours"], corpus, Path(folder), count) for count in sorted(growth or [])},
            "heuristics": filtered(part, peers_venv, heuristics),
            "encoding": encoding_speed(part, Path(folder), repeats),
        }
    results |= ratios(results)
    head = environment(*_PACKAGES) | ({"peers": _versions(peers_venv)} if peers or heuristics else {})
    name = machine or "_".join(cpu_name().lower().replace(",", "").split())
    text = json.dumps({**head, "results": results}, indent=2)
    (RESULTS / f"data_pipeline_{name}.json").write_text(text + "\n", encoding="utf-8")
    show(results)


def near_duplicates(chosen: Sequence[System], corpus: Path, folder: Path, repeats: int) -> Results:
    """Each system's median time, highest memory and quality; the systems take turns."""
    pairs = np.load(corpus / "pairs.npy")
    rows: dict[str, Results] = {system.name: {"runs": []} for system in chosen}
    megabytes = sum(path.stat().st_size for path in (corpus / DOCUMENTS).iterdir()) / 1e6
    for repeat in range(repeats):
        for system in chosen:
            output = folder / f"{system.name}-{repeat}"
            output.mkdir()
            run = run_and_measure(system.command(corpus, output))
            rows[system.name]["runs"].append(run._asdict())
            if repeat == 0:
                rows[system.name] |= score(system.decisions(corpus, output), pairs) | _stages(output)
            shutil.rmtree(output)
    for row in rows.values():
        row["seconds"] = median(run["seconds"] for run in row["runs"])
        row["megabytes_per_second"] = megabytes / row["seconds"]
        row["peak_megabytes"] = max(run["peak_megabytes"] for run in row["runs"])
    return rows


def grown(system: System, corpus: Path, folder: Path, documents: int) -> Results:
    """Time and memory of a system on a corpus of that many documents."""
    write_synthetic_corpus(corpus, folder / "grown", documents)
    output = folder / "grown-output"
    output.mkdir()
    run = run_and_measure(system.command(folder / "grown", output))
    size = sum(path.stat().st_size for path in (folder / "grown" / DOCUMENTS).iterdir())
    shutil.rmtree(folder / "grown")
    shutil.rmtree(output)
    return run._asdict() | {
        "megabytes": size / 1e6,
        "megabytes_per_second": size / 1e6 / run.seconds,
        "microseconds_per_document": 1e6 * run.seconds / documents,
    }


def filtered(corpus: Path, peers: Path, documents: int) -> Results:
    """Speed of the heuristic filters on one core, and how often their verdicts are datatrove's."""
    texts = [document.text for document in islice(read_corpus(corpus), documents)]
    return compare(texts, run_peer(peers / "bin" / "python", texts)) if texts else {}


def ratios(results: Results) -> Results:
    """How many times as long as ours each peer takes, and how much more a document costs in the largest corpus."""
    rows = results["near_duplicates"]
    peers = {name: row["seconds"] / rows["ours"]["seconds"] for name, row in rows.items() if name != "ours"}
    if speeds := results["heuristics"].get("megabytes_per_second"):
        peers["heuristics"] = speeds["ours"] / speeds["datatrove"]
    costs = [row["microseconds_per_document"] for row in results["growth"].values()]
    return {"ratios": peers} | ({"growth_ratio": costs[-1] / costs[0]} if len(costs) > 1 else {})


def show(results: Results) -> None:
    """Prints the systems side by side, then the required, targeted and measured figures."""
    rows = []
    for name, row in results["near_duplicates"].items():
        figures = [f"{row[key]:,.1f}" for key in ("seconds", "megabytes_per_second", "peak_megabytes")]
        quality = [f"{row[key]:.3f}" for key in ("resolved", "justified", "recall", "precision")]
        rows.append([name, *figures, *quality, f"{row['removed']:,} of {row['removable']:,}"])
    header = ["system", "s", "MB/s", "peak MB", "resolved", "justified", "recall", "precision", "removed"]
    print(*table(header, rows), "", sep="\n")
    rows = []
    for figure in FIGURES:
        seen = _seen(results, figure.path)
        shown = ["not measured", ""] if seen is None else [f"{seen:.4g}", _verdict(seen, figure)]
        rows.append([figure.name, f"{figure.must:g}", f"{figure.aim:g}", *shown])
    print(*table(["figure", "must", "aim", "seen", "verdict"], rows, ["verdict"]), sep="\n")


def _verdict(seen: float, figure: Figure) -> str:
    sign = 1 if figure.aim > figure.must else -1
    if sign * seen < sign * figure.must:
        return "MISSED"
    return "aim reached" if sign * seen >= sign * figure.aim else "enough"


def _seen(results: Results, path: Sequence[str | int]) -> float | None:
    found: Any = results
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _stages(output: Path) -> Results:
    path = output / "stages.json"
    return {"stages": json.loads(path.read_text())} if path.exists() else {}


def _versions(peers: Path) -> dict[str, str]:
    program = (
        f"import json, importlib.metadata as m; print(json.dumps({{p: m.version(p) for p in {_PEER_PACKAGES}}}))"
    )
    run = subprocess.run([peers / "bin/python", "-c", program], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(run.stdout)
    return versions


@contextmanager
def _part_of(corpus: Path, documents: int | None) -> Iterator[Path]:
    """The corpus with its true pairs, or a folder with its first documents and theirs."""
    pairs = _pairs(corpus)
    if documents is None:
        yield corpus
        return
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder)
        (part / DOCUMENTS).mkdir()
        write_shards(list(islice(read_corpus(corpus), documents)), part / DOCUMENTS)
        np.save(part / "pairs.npy", pairs[(pairs < documents).all(axis=1)])
        yield part


def _pairs(corpus: Path) -> Int64Array:
    path = corpus / "pairs.npy"
    if not path.exists():
        np.save(path, similar_pairs(document.text for document in read_corpus(corpus))[0])
    pairs: Int64Array = np.load(path)
    return pairs


if __name__ == "__main__":
    run_command(main)
