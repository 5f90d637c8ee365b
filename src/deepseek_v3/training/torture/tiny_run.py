"""The run that is tortured: five steps of a tiny model on generated text, and how it ends undisturbed."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from deepseek_v3.data.tokens.tokenize_corpus import tokenize_corpus
from deepseek_v3.training.torture.faults import Fault
from deepseek_v3.training.torture.strikes import PLACES_FILE
from deepseek_v3.training.torture.train_processes import CONFIG, train_in
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.errors import TrainingError
from deepseek_v3.utils.monitoring import read_metrics

STEPS, INTERVAL, KEEP = 5, 2, 2
_SEQUENCE, _BATCH, _VOCABULARY = 32, 4, 278
_MODEL = {
    "vocab_size": _VOCABULARY,
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
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Undisturbed:
    """A run without faults on a number of ranks.

    `fresh` holds config and tokens before the first step. `final` are the tensors and plain values of the last
    checkpoint, `losses` those of metrics.jsonl by step, and `counts` how often each rank reached each place.
    """

    ranks: int
    fresh: Path
    final: tuple[dict[str, Tensor], dict[str, Any]]
    losses: dict[int, float]
    counts: dict[int, Counter[str]]

    @cached_property
    def stopped(self) -> Path:
        """The folder of a run that was killed in its last step, which has two checkpoints."""
        folder = self.fresh.with_name(f"stopped-{self.ranks}")
        shutil.copytree(self.fresh, folder)
        train_in(folder, self.ranks, Fault("kill-step", 0, self.ranks, "kill", "step", STEPS))
        return folder


def run_undisturbed(folder: Path, ranks: int) -> Undisturbed:
    """Makes the tokens and trains to the end. Raises TrainingError if that fails."""
    fresh, whole = folder / f"fresh-{ranks}", folder / f"undisturbed-{ranks}"
    _prepare(fresh, ranks)
    shutil.copytree(fresh, whole)
    outcome = train_in(whole, ranks)
    if not outcome.succeeded:
        raise TrainingError(f"the run without faults on {ranks} ranks failed in {whole}: {outcome.last_line}")
    counts = {
        rank: Counter((whole / PLACES_FILE.format(rank=rank)).read_text(encoding="utf-8").split())
        for rank in range(ranks)
    }
    return Undisturbed(ranks, fresh, final_state(whole), losses_of(whole), counts)


def final_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and plain values of the checkpoint after the last step. Raises CheckpointError."""
    path = folder / "checkpoints" / f"checkpoint_step_{STEPS}"
    return flatten(load_checkpoint(path if path.is_dir() else path.with_name(f"{path.name}.pt")))


def losses_of(folder: Path) -> dict[int, float]:
    """The logged loss of every step. Raises DataError if metrics.jsonl cannot be read."""
    return {each["step"]: each["loss"] for each in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in each}


def _prepare(folder: Path, ranks: int) -> None:
    text = folder / "text"
    text.mkdir(parents=True)
    chooser = random.Random(0)  # noqa: S311 -- not for secrets
    for number in range(40):
        lines = [f"def {chooser.choice('abcdef')}(x): return x + {chooser.randrange(9)}\n" for _ in range(30)]
        (text / f"{number:03d}.py").write_text("".join(lines), encoding="utf-8")
    tokenize_corpus(
        source=str(text),
        output=folder / "tokens",
        tokenizer=None,
        vocab_size=_VOCABULARY,
        sequence_length=_SEQUENCE,
        holdout=0.2,
        fim_rate=0.0,
        seed=0,
        workers=1,
    )
    (folder / CONFIG).write_text(yaml.safe_dump(_fields(ranks)), encoding="utf-8")


def _fields(ranks: int) -> dict[str, Any]:
    """The config; its paths are relative, so that runs in different folders save the same bits."""
    return {
        "model": _MODEL,
        "training": {
            "total_tokens": STEPS * _SEQUENCE * _BATCH,
            "sequence_length": _SEQUENCE,
            "global_batch_size": _BATCH,
            "optimizer": {"learning_rate": 0.01, "ema_decay": 0.9},
            "schedule": {"warmup_steps": 2},
            "evaluation": {"interval_steps": 3, "tokens": 256},
        },
        "parallel": {"micro_batch_size": 2, "data_shard": ranks},
        "data": {"path": "tokens"},
        "checkpoint": {"directory": "checkpoints", "interval_steps": INTERVAL, "keep": KEEP},
        "logging": {"directory": "run", "interval_steps": 1, "tensorboard": False},
    }
