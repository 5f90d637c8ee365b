"""torchtitan's own trainer on the shape of one of our runs, for a Python that has torchtitan 0.2.2:

`torchrun --nproc_per_node=2 torchtitan_training.py --shape 1b.yaml --data-shard 2 --batch 2 --output OUTPUT`

Model, FSDP and expert parallelism, compilation, clipping, fused AdamW on float32 weights and bias updates are all
torchtitan's and at its defaults; the tokens are random. YaRN and prediction layers of the shape are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_parameters


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

from torchtitan.config import JobConfig  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.models import deepseek_v3 as titan  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.models.moe import MoEArgs  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.protocols.train_spec import register_train_spec  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.tools.logging import init_logger  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.tools.utils import device_module  # type: ignore[import-not-found]  # noqa: E402
from torchtitan.train import Trainer  # type: ignore[import-not-found]  # noqa: E402


class TimedTrainer(Trainer):
    """torchtitan's trainer that keeps the loss of every step, and the seconds of every `interval` steps."""

    interval = 1

    def __init__(self, job: JobConfig) -> None:
        super().__init__(job)
        self.losses: list[torch.Tensor] = []
        self.ends = [time.perf_counter()]

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self.losses.append(torch.zeros((), device=self.device))
        super().train_step(data_iterator)
        if len(self.losses) % self.interval == 0:
            device_module.synchronize()
            self.ends.append(time.perf_counter())

    def forward_backward_step(self, **batch: Any) -> torch.Tensor:
        loss: torch.Tensor = super().forward_backward_step(**batch)
        self.losses[-1] += loss.detach()
        return loss

    def rates(self, tokens_per_step: int) -> list[float]:
        """Tokens per second in each interval but the first, which compiles and lets the allocator settle."""
        times = zip(self.ends[1:], self.ends[2:], strict=False)
        return [self.interval * tokens_per_step / (end - start) for start, end in times]


def model_args(config: RunConfig) -> titan.DeepSeekV3ModelArgs:
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


def job_config(config: RunConfig, arguments: argparse.Namespace, folder: str) -> JobConfig:
    """torchtitan's defaults but for the shape, the layout, and the compilation of model and loss."""
    job = JobConfig()
    job.job.dump_folder = folder
    job.model.name, job.model.flavor = "shape", "shape"
    job.compile.enable = True
    job.metrics.log_freq = arguments.steps + 1  # logs after the first step alone, and keeps the peak from then on
    job.optimizer.lr = config.training.optimizer.learning_rate
    job.lr_scheduler.warmup_steps = min(config.training.schedule.warmup_steps, arguments.steps)
    job.training.seq_len = config.training.sequence_length
    job.training.local_batch_size = arguments.micro_batch
    job.training.global_batch_size = arguments.batch
    job.training.steps = arguments.steps
    job.parallelism.data_parallel_shard_degree = arguments.data_shard
    job.parallelism.data_parallel_replicate_degree = arguments.data_replicate
    job.parallelism.expert_parallel_degree = arguments.expert
    job.activation_checkpoint.mode = arguments.recompute
    job.activation_checkpoint.selective_ac_option = "op"
    job.debug.seed = config.training.seed
    return job


def random_batches(
    vocab_size: int, rank: int, batch_size: int, length: int
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Batches in the form of torchtitan's loader, other ones for each rank."""
    generator = torch.Generator().manual_seed(rank)
    while True:
        tokens = torch.randint(vocab_size, (batch_size, length + 1), generator=generator)
        yield {"input": tokens[:, :-1]}, tokens[:, 1:]


def figures(trainer: TimedTrainer, world: int, tokens_per_step: int) -> dict[str, object]:
    """Tokens per second over all GPUs, the most memory on any of them from the second step on, and the loss."""
    rates = trainer.rates(tokens_per_step)
    losses = torch.stack(trainer.losses)  # each rank's part of the mean over the tokens of all
    peak = torch.tensor(device_module.max_memory_allocated(), device=trainer.device)
    dist.all_reduce(losses)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "device": f"{world} x {trainer.metrics_processor.device_memory_monitor.device_name}",
        "versions": {"torch": torch.__version__, "torchtitan": version("torchtitan")},
        "parameters": sum(weight.numel() for weight in trainer.model_parts[0].parameters()),
        "tokens_per_step": tokens_per_step,
        "timed_steps": len(rates) * trainer.interval,
        "tokens_per_second_median": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "memory_gib": peak.item() / 2**30,
        "loss_first_and_last": [losses[0].item(), losses[-1].item()],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--data-shard", type=int, default=1)
    parser.add_argument("--data-replicate", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step over all GPUs")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--interval", type=int, default=5, help="steps of one rate")
    parser.add_argument("--recompute", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.steps < 2 * arguments.interval:
        parser.error(f"--steps {arguments.steps}: the first {arguments.interval} are not counted, so give more")
    TimedTrainer.interval = arguments.interval
    config = load_config(arguments.shape)
    batch, length = arguments.micro_batch, config.training.sequence_length
    spec = replace(
        titan.get_train_spec(),
        model_args={"shape": model_args(config)},
        build_dataloader_fn=lambda dp_rank, **_: random_batches(config.model.vocab_size, dp_rank, batch, length),
        build_tokenizer_fn=None,
        state_dict_adapter=None,
    )
    register_train_spec("shape", spec)
    init_logger()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(job_config(config, arguments, folder))
        trainer.train()
        world = dist.get_world_size()
        found = figures(trainer, world, arguments.batch * length)
        if found["parameters"] != (expected := count_parameters(config.model).total):
            raise SystemExit(f"torchtitan built {found['parameters']} parameters; the shape has {expected}")
        if dist.get_rank() == 0:
            layout = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
            text = json.dumps({"arguments": layout, **found}, indent=2)
            arguments.output.write_text(text + "\n", encoding="utf-8")
            print(text)
        trainer.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
