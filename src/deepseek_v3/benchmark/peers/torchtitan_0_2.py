"""torchtitan 0.2's trainer on the shape of one of our runs.

Model, FSDP and expert parallelism, compilation, clipping, fused AdamW and bias updates are all torchtitan's and at
its defaults. YaRN and prediction layers of the shape are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from torch import Tensor

from deepseek_v3.benchmark.peers.titan_steps import TimedSteps, TitanRun
from deepseek_v3.config.train_config import RunConfig


class _Absent(ModuleType):
    """A module whose every name is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


# torchtitan imports these for data sets, its command line and TensorBoard. None is used here, and so datasets,
# torchdata, tyro and tensorboard need not be installed.
for _name in (
    "torchtitan.hf_datasets.text_datasets",
    "torchdata.stateful_dataloader",
    "torchtitan.config.manager",
    "torch.utils.tensorboard",
):
    sys.modules[_name] = _Absent(_name)

from torchtitan.config import JobConfig  # noqa: E402
from torchtitan.models import deepseek_v3 as titan  # noqa: E402
from torchtitan.models.moe import MoEArgs  # noqa: E402
from torchtitan.protocols.train_spec import register_train_spec  # noqa: E402
from torchtitan.train import Trainer  # noqa: E402


class TimedTrainer(TimedSteps, Trainer):
    """torchtitan's trainer with a clock."""


def build_trainer(run: TitanRun, folder: str) -> TimedTrainer:
    """The trainer of a run; torchtitan leaves its files in `folder`."""

    def batches(dp_rank: int, dp_world_size: int, **_: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs_BS, targets_BS in run.batches(dp_rank, dp_world_size):
            yield {"input": inputs_BS}, targets_BS

    spec = replace(
        titan.get_train_spec(),
        model_args={"shape": _model_args(run.config)},
        build_dataloader_fn=batches,
        build_tokenizer_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec("shape", spec)
    return TimedTrainer(_job_config(run, folder))


def _model_args(config: RunConfig) -> Any:
    """The shape in torchtitan's words."""
    model = config.model
    grouped = model.n_group > 1
    return titan.DeepSeekV3ModelArgs(
        vocab_size=model.vocab_size,
        dim=model.hidden_size,
        inter_dim=model.intermediate_size,
        moe_inter_dim=model.moe_intermediate_size,
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        n_heads=model.num_attention_heads,
        norm_eps=model.rms_norm_eps,
        moe_args=MoEArgs(
            num_experts=model.n_routed_experts,
            num_shared_experts=model.n_shared_experts,
            score_func=model.scoring_func,
            route_norm=model.norm_topk_prob,
            route_scale=model.routed_scaling_factor,
            score_before_experts=False,
            top_k=model.num_experts_per_tok,
            num_expert_groups=model.n_group if grouped else None,
            num_limited_groups=model.topk_group if grouped else None,
        ),
        q_lora_rank=model.q_lora_rank or 0,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        original_seq_len=config.training.sequence_length,  # no longer, so that YaRN stays out
        rope_theta=model.rope_theta,
    )


def _job_config(run: TitanRun, folder: str) -> JobConfig:
    """torchtitan's defaults but for the shape, the layout, and the compilation of model and loss."""
    job, training = JobConfig(), run.config.training
    job.job.dump_folder = folder
    job.model.name, job.model.flavor = "shape", "shape"
    job.compile.enable = True
    job.metrics.log_freq = run.steps + 1  # logs after the first step alone, and keeps the peak from then on
    job.optimizer.lr = training.optimizer.learning_rate
    job.lr_scheduler.warmup_steps = min(training.schedule.warmup_steps, run.steps)
    job.training.dtype = run.weights
    job.training.seq_len = training.sequence_length
    job.training.local_batch_size = run.micro_batch
    job.training.global_batch_size = run.batch
    job.training.steps = run.steps
    job.parallelism.data_parallel_shard_degree = run.data_shard
    job.parallelism.data_parallel_replicate_degree = run.data_replicate
    job.parallelism.expert_parallel_degree = run.expert
    job.activation_checkpoint.mode = run.recompute
    job.activation_checkpoint.selective_ac_option = "op"
    job.debug.seed = training.seed
    return job
