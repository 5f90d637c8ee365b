"""torchtitan 0.3's trainer on the shape of one of our runs.

Model, FSDP and expert parallelism, compilation, chunked loss, clipping, fused AdamW and bias updates are all
torchtitan's and as in its configurations of DeepSeek-V3, which leave CUDA graphs off; here the model is compiled,
too. YaRN and prediction layers of the shape are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import CompileConfig, Configurable, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models import deepseek_v3 as titan
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.trainer import Trainer

from deepseek_v3.benchmark.peers.titan_steps import TimedSteps, TitanRun
from deepseek_v3.config.train_config import RunConfig


class TimedTrainer(TimedSteps, Trainer):
    """torchtitan's trainer with a clock."""


class RunTokens(BaseDataLoader):
    """The tokens of our run in the form of torchtitan's loaders."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The run whose tokens are read."""

        run: TitanRun

    def __init__(self, config: Config, *, dp_rank: int, dp_world_size: int, **_: Any) -> None:
        self._run, self._rank, self._ranks = config.run, dp_rank, dp_world_size

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs_BS, targets_BS in self._run.batches(self._rank, self._ranks):
            positions_BS = torch.arange(inputs_BS.shape[1]).expand_as(inputs_BS)
            yield {"input": inputs_BS, "positions": positions_BS}, targets_BS

    def state_dict(self) -> dict[str, Any]:
        """Nothing: no checkpoint is written."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""


class NoTokenizer(Configurable):
    """In place of a tokenizer: the tokens are numbers already."""

    @dataclass(kw_only=True, slots=True)
    class Config(Configurable.Config):
        """Has no fields."""

    def __init__(self, config: Config, *, tokenizer_path: str) -> None:
        del config, tokenizer_path


def build_trainer(run: TitanRun, folder: str) -> TimedTrainer:
    """The trainer of a run; torchtitan leaves its files in `folder`."""
    training, model = run.config.training, run.config.model
    recompute = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
    return TimedTrainer(
        Trainer.Config(
            model_spec=replace(titan.model_registry("671B"), flavor="shape", model=_model_config(run.config)),
            dump_folder=folder,
            loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=model.vocab_size)),
            metrics=MetricsProcessor.Config(log_freq=run.steps + 1),  # keeps the peak from the second step on
            tokenizer=NoTokenizer.Config(),
            dataloader=RunTokens.Config(run=run),
            optimizer=default_adamw(lr=training.optimizer.learning_rate),
            lr_scheduler=LRSchedulersContainer.Config(warmup_steps=min(training.schedule.warmup_steps, run.steps)),
            training=TrainingConfig(
                dtype=run.weights,
                seq_len=training.sequence_length,
                local_batch_size=run.micro_batch,
                global_batch_size=run.batch,
                steps=run.steps,
                disable_cuda_graphs=True,
            ),
            parallelism=ParallelismConfig(
                data_parallel_shard_degree=run.data_shard,
                data_parallel_replicate_degree=run.data_replicate,
                expert_parallel_degree=run.expert,
            ),
            checkpoint=CheckpointManager.Config(enable=False),
            activation_checkpoint=recompute[run.recompute],
            compile=CompileConfig(enable=True),
            debug=DebugConfig(seed=training.seed),
        )
    )


def _model_config(config: RunConfig) -> titan.DeepSeekV3Model.Config:
    """The shape in torchtitan's words, with its own initial weights."""
    model = config.model
    grouped = model.n_group > 1
    layers = titan._build_dsv3_layers(
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank or 0,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=model.intermediate_size,
        moe_hidden_dim=model.moe_intermediate_size,
        num_experts=model.n_routed_experts,
        num_shared_experts=model.n_shared_experts,
        router_top_k=model.num_experts_per_tok,
        router_score_func=model.scoring_func,
        router_num_expert_groups=model.n_group if grouped else None,
        router_num_limited_groups=model.topk_group if grouped else None,
        router_route_scale=model.routed_scaling_factor,
        router_route_norm=model.norm_topk_prob,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(
            dim=model.qk_rope_head_dim, max_seq_len=config.training.sequence_length, theta=model.rope_theta
        ),
    )
    width, vocabulary = model.hidden_size, model.vocab_size
    embedding, norm, head = titan._EMBEDDING_INIT, titan._NORM_INIT, titan._output_linear_init(width)
    return titan.DeepSeekV3Model.Config(
        vocab_size=vocabulary,
        dim=width,
        tok_embeddings=Embedding.Config(num_embeddings=vocabulary, embedding_dim=width, param_init=embedding),
        norm=RMSNorm.Config(normalized_shape=width, param_init=norm),
        lm_head=Linear.Config(in_features=width, out_features=vocabulary, param_init=head),
        layers=layers,
    )
