"""Tasks of lm-evaluation-harness in a folder: YAML files and their documents as JSON lines, without network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

TASKS = ("choices", "rolling", "answers")
# A token of the tokenizer may span the boundary of context and continuation, contexts may be empty, end in spaces,
# or be longer than the model's context.
CHOICES: list[dict[str, Any]] = [
    {"query": "def a(x): retu", "choices": ["rn x + 1", "rn", " x", "return"], "gold": 0},
    {"query": "def b(x):  ", "choices": ["return x", " x + 2\n", "é 日本"], "gold": 1},
    {"query": "", "choices": ["def", "x", "return x + 7\ndef"], "gold": 2},
    {"query": "def c(x): return x + 3\n" * 12, "choices": ["def", " x", "def d(x): return"], "gold": 0},
]
ROLLING = ["def a(x): return x + 1\n" * 14, "x", "def b", "naïve 日本 🙂\n" * 9]
ANSWERS = ["def a(x)", "def b(x): return", "def c(x): return x + 3\n" * 12, "é", "x", "def d(x): return x + 1\ndef"]


def write_tasks(folder: Path) -> Path:
    """Writes one task of each kind of request; returns the folder."""
    folder.mkdir()
    _write(folder, "choices", CHOICES, _multiple_choice())
    rolling = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    documents = [{"text": text} for text in ROLLING]
    _write(folder, "rolling", documents, _task("loglikelihood_rolling", "", "{{text}}", rolling))
    answers = [{"query": text, "target": "(x)"} for text in ANSWERS]
    _write(folder, "answers", answers, _answers(until=["\n", "+ 5", "<|endoftext|>"], max_gen_toks=24))
    return folder


def _multiple_choice() -> dict[str, Any]:
    fields = _task("multiple_choice", "{{query}}", "{{gold}}", ("acc", "acc_norm"))
    return {**fields, "doc_to_choice": "choices", "target_delimiter": ""}


def _answers(**generation: object) -> dict[str, Any]:
    fields = _task("generate_until", "{{query}}", "{{target}}", ("exact_match",))
    return {**fields, "generation_kwargs": generation}


def _task(output_type: str, text: str, target: str, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "output_type": output_type,
        "doc_to_text": text,
        "doc_to_target": target,
        "metric_list": [{"metric": metric} for metric in metrics],
    }


def _write(folder: Path, name: str, documents: Sequence[object], fields: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    read = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    source = {"dataset_path": "json", "dataset_kwargs": read, "test_split": "test", "fewshot_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **fields}), encoding="utf-8")
