"""A training run small enough for a test: a generated corpus, a tiny model, a YAML file on disk."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typer.testing import CliRunner, Result

from deepseek_v3.cli import app
from deepseek_v3.utils.errors import UserError

SEQUENCE_LENGTH = 32
BATCH_SIZE = 4
TOKENS_PER_STEP = SEQUENCE_LENGTH * BATCH_SIZE

# Overrides of a run whose activations need more memory than anything else.
WIDE_LAYERS = [
    "model.hidden_size=1024",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=8",
    "model.kv_lora_rank=512",
    "model.qk_nope_head_dim=128",
    "model.qk_rope_head_dim=64",
    "model.v_head_dim=128",
    "model.intermediate_size=2816",
    "model.n_routed_experts=16",
    "model.num_experts_per_tok=6",
    "model.moe_intermediate_size=512",
    "model.num_nextn_predict_layers=0",
    "model.max_position_embeddings=1024",
    "training.sequence_length=1024",
    "training.global_batch_size=16",
    "training.total_tokens=65536",
    "parallel.micro_batch_size=16",
]


class WideRun(NamedTuple):
    """A run of WIDE_LAYERS with more overrides.

    `measured_bytes`: the most that torch had allocated in its first two steps on an NVIDIA H200, measured by
    `tests/integration/test_gpu_training.py`; None if that was not recorded.
    """

    name: str
    overrides: list[str]
    measured_bytes: int | None


WIDE_RUNS = [
    WideRun("none", ["parallel.recomputation=none"], 4_775_792_128),
    WideRun("selective", ["parallel.recomputation=selective"], 4_001_901_568),
    WideRun("full", ["parallel.recomputation=full"], 2_786_631_680),
    WideRun("none-dense", ["parallel.recomputation=none", "model.first_k_dense_replace=6"], 3_606_302_208),
    WideRun(
        "selective-prediction",
        ["parallel.recomputation=selective", "model.num_nextn_predict_layers=1"],
        5_003_585_536,
    ),
    WideRun(
        "full-wide-experts",
        [
            "parallel.recomputation=full",
            "model.moe_intermediate_size=1024",
            "model.n_routed_experts=8",
            "model.num_experts_per_tok=2",
        ],
        None,
    ),
]


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Writes text files with a grammar that a small model can learn; every call writes the same text."""
    folder.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(0)
    for number in range(documents):
        lines = [f"def {chooser.choice('abcdef')}(x): return x + {chooser.randrange(9)}\n" for _ in range(30)]
        (folder / f"{number:03d}.py").write_text("".join(lines), encoding="utf-8")
    return folder


def run_fields(folder: Path, steps: int = 6) -> dict[str, Any]:
    """The content of a run's YAML file; all its inputs and outputs are in `folder`."""
    return {
        "model": {
            "vocab_size": 300,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "num_nextn_predict_layers": 1,
            "initializer_range": 0.05,
            "max_position_embeddings": 64,
        },
        "training": {
            "total_tokens": steps * TOKENS_PER_STEP,
            "sequence_length": SEQUENCE_LENGTH,
            "global_batch_size": BATCH_SIZE,
            "optimizer": {"learning_rate": 0.01},
            "schedule": {"warmup_steps": 2},
            "evaluation": {"interval_steps": 3, "tokens": 256},
        },
        "parallel": {"micro_batch_size": 2},
        "data": {
            "path": str(folder / "tokens"),
            "corpus": {"source": str(folder / "text"), "vocab_size": 300, "holdout": 0.2},
        },
        "checkpoint": {"directory": str(folder / "checkpoints"), "interval_steps": 2, "keep": 10},
        "logging": {"directory": str(folder / "run"), "interval_steps": 1, "tensorboard": False},
    }


def write_run(folder: Path, steps: int = 6) -> Path:
    """Writes corpus and config of a run to `folder`; returns the config's path."""
    write_corpus(folder / "text")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run_fields(folder, steps)), encoding="utf-8")
    return path


def dsv3(*words: object) -> Result:
    """Runs a `dsv3` command in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def message_of(result: Result) -> str:
    """The one-line message of the UserError that a command has raised."""
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)
