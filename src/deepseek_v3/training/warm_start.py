"""Starts a run from the weights of another one, with a fresh optimizer, schedule and data order: `--init`.

The weights come from a checkpoint of this project or from a Hugging Face directory. The new run may have another
corpus, sequence length, context and number of MTP layers: annealing, context extension, continued training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface.pretrained_folder import open_pretrained
from deepseek_v3.interop.load_model import is_released, read_tokenizer
from deepseek_v3.model.pretrained import ModelEntries, check_entries, checkpoint_config, checkpoint_tokenizer
from deepseek_v3.training.parallel.engine import Engine
from deepseek_v3.training.resume_rules import Rule, changes_of, fields_of
from deepseek_v3.utils.checkpointing.checks import non_finite, non_finite_summary
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory, is_checkpoint
from deepseek_v3.utils.checkpointing.reader import open_checkpoint
from deepseek_v3.utils.checkpointing.sharded import newest_checkpoint, verify_checkpoint
from deepseek_v3.utils.distributed.collectives import rank_and_size, run_on_all_ranks
from deepseek_v3.utils.errors import CheckpointError, DataError
from deepseek_v3.utils.logging import get_logger
from deepseek_v3.utils.text import format_value

# What the weights do not depend on: a run may set these fields anew. Any other field of the model must be the same.
_FREE = (
    "initializer_range",
    "max_position_embeddings",
    "n_group",
    "norm_topk_prob",
    "num_experts_per_tok",
    "num_nextn_predict_layers",
    "rms_norm_eps",
    "rope_scaling.",
    "rope_theta",
    "routed_scaling_factor",
    "topk_group",
    "use_fp8_kv",
)
_SAME_MEANING = ("num_key_value_heads",)  # left out, or the number of attention heads

_log = get_logger("Trainer")


class _Weights(Protocol):
    """Weights by parameter name, read block by block."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read_into(self, target: Tensor, name: str, starts: Sequence[int] | None = None) -> None: ...


class _CheckpointWeights:
    """The weights and the tokenizer of a verified checkpoint."""

    def __init__(self, path: Path) -> None:
        self._reader = open_checkpoint(path)
        self.run = checkpoint_config(self._reader.plain, path)
        self.config = self.run.model
        known = {name: self._reader.plain.get(name) for name in ModelEntries.model_fields}
        check_entries(ModelEntries, {name: value for name, value in known.items() if value is not None}, path)
        self.tokenizer = checkpoint_tokenizer(self._reader.plain, path)
        prefix = "model."
        self.shapes = {
            name.removeprefix(prefix): info.shape
            for name, info in self._reader.tensors.items()
            if name.startswith(prefix)
        }

    def read_into(self, target: Tensor, name: str, starts: Sequence[int] | None = None) -> None:
        """Fills `target` with the block of a parameter that begins at `starts`."""
        self._reader.read_into(target, f"model.{name}", starts)


class WarmStart:
    """The weights and routing biases that a run without any step of its own starts from.

    `path` is a checkpoint, a folder of checkpoints (its newest undamaged one) or a Hugging Face directory. Opening
    checks that they fit the model of `config`, whose weights need no memory for that, and logs how the two configs
    differ: of a release, the models alone. All ranks of `group` open and load; None is a single process.

    Raises CheckpointError, on all ranks, if the weights cannot be read or belong to a model of other shapes.
    """

    def __init__(self, path: Path, config: RunConfig, group: ProcessGroup | None) -> None:
        self._path, self._group = path, group
        self._weights, self._tokenizer = _open(path, group)
        _check_model(path, self._weights.config, config.model)
        if isinstance(self._weights, _CheckpointWeights):
            changes = changes_of(self._weights.run, config, Rule.DATA, Rule.LOGGED)
            if changes:
                _log.warning("the run differs from that of %s: %s", path, changes)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises DataError if the weights belong to another tokenizer than that of the run's tokens."""
        own = self._tokenizer
        if own is None:
            _log.warning("%s has no tokenizer.json to compare with that of the run's tokens", self._path)
        elif not tokenizer.has_the_ids_of(own):
            raise DataError(
                f"{self._path}: its tokenizer, of {own.vocab_size:,} ids, is another one than that of the run's "
                f"tokens, of {tokenizer.vocab_size:,} ids, which mean other text; tokenize the corpus with `dsv3 "
                "tokenize --tokenizer` and the tokenizer.json of these weights"
            )

    def load(self, engine: Engine) -> None:
        """Replaces the weights and routing biases of `engine`; each rank reads only the blocks that it holds.

        MTP layers that these weights lack stay as they were initialised. Raises CheckpointError, on all ranks, if
        the weights cannot be read or are not finite.
        """
        state = engine.state()
        model = state["model"]
        fresh = [name for name in model if name not in self._weights.shapes]
        run_on_all_ranks(self._group, lambda: _fill(model, self._weights))
        if bad := non_finite(model, self._group):
            raise CheckpointError(f"{self._path}: {non_finite_summary(bad)}; start from another checkpoint")
        engine.finish_loading(state, 0)
        engine.optimizer.restart_averages()
        _log.info(
            f"Starting from the weights of {self._path}"
            + (f"; initialised anew: {_layers(fresh)}" if fresh else "")
        )


def _open(path: Path, group: ProcessGroup | None) -> tuple[_Weights, Tokenizer | None]:
    """Opens the weights at `path` and their tokenizer, if they have one."""
    if run_on_all_ranks(group, lambda: is_released(path)):
        is_first = rank_and_size(group)[0] == 0
        weights = run_on_all_ranks(group, lambda: open_pretrained(path, compare_copies=is_first))
        has_tokenizer = (path / "tokenizer.json").exists()
        return weights, read_tokenizer(path, weights.config) if has_tokenizer else None
    if run_on_all_ranks(group, lambda: is_checkpoint(path)):
        verify_checkpoint(path, group)
    else:
        path = newest_checkpoint(CheckpointDirectory(path, keep=1), group)
    checkpoint = run_on_all_ranks(group, lambda: _CheckpointWeights(path))
    return checkpoint, checkpoint.tokenizer


def _check_model(path: Path, found: ModelConfig, wanted: ModelConfig) -> None:
    """Logs how two models differ. Raises CheckpointError if the weights of one do not fit the other."""
    pairs = zip(fields_of(ModelConfig, found), fields_of(ModelConfig, wanted), strict=True)
    changes = {
        field: f"model.{field}: {format_value(before)} -> {format_value(after)}"
        for (field, before), (_, after) in pairs
        if before != after and field not in _SAME_MEANING
    }
    refused = [change for field, change in changes.items() if not field.startswith(_FREE)]
    if refused:
        raise CheckpointError(
            f"{path}: its weights do not fit this model: {'; '.join(refused)}; set these fields to the values "
            "before ->"
        )
    if changes:
        _log.warning("the model differs from that of %s: %s", path, "; ".join(changes.values()))


@torch.no_grad()
def _fill(model: Mapping[str, Tensor], weights: _Weights) -> None:
    """Overwrites this rank's block of every tensor that `weights` has."""
    for name, tensor in model.items():
        if name not in weights.shapes:
            continue
        if not isinstance(tensor, DTensor):
            weights.read_into(tensor, name)
            continue
        for block in tensor.__create_chunk_list__():
            if tensor.to_local().numel():
                weights.read_into(tensor.to_local(), name, tuple(block.offsets))


def _layers(names: Sequence[str]) -> str:
    """The layers of some parameters: `model.layers.3, model.layers.4`."""
    return ", ".join(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
