"""torchtitan's own trainer on the shape and the tokens of one of our runs, for versions 0.2 and 0.3:

`torchrun --nproc_per_node=2 -m deepseek_v3.benchmark.peers.torchtitan_training --shape 1b --data-shard 2 --batch 2
--output OUTPUT`

Beside torchtitan itself, 0.2 needs nothing here; 0.3 needs torchdata, torch_checkpointing, datasets, tyro, einops
and spmd_types 0.2.3.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from deepseek_v3.benchmark.own_training import TrainingFigures
from deepseek_v3.benchmark.peers.titan_steps import TitanRun
from deepseek_v3.benchmark.shape_files import INTERVAL, shape_file
from deepseek_v3.config.loading import load_config
from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.planning.counts import count_parameters
from deepseek_v3.utils.errors import BenchmarkError
from deepseek_v3.utils.optional import is_installed, missing_library


def train_alone(config: RunConfig, steps: int, device: str, started: float) -> TrainingFigures:
    """Trains the first steps of a run in this process alone, with bfloat16 weights, and as one micro-batch if ours
    is one.

    Raises BenchmarkError if torchtitan is missing, cannot run here or builds another model.
    """
    if device == "cpu" or not torch.cuda.is_available():
        raise BenchmarkError("torchtitan trains on GPUs only")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    run = TitanRun(
        config,
        steps,
        batch=config.training.global_batch_size,
        micro_batch=config.parallel.micro_batch_size,
        recompute=config.parallel.recomputation,
        weights="bfloat16",
    )
    trainer, peak = _train(run, INTERVAL)
    losses = dict(enumerate((loss.item() for loss in trainer.losses), start=1))
    reported = {step: loss for step, loss in losses.items() if step == 1 or step % INTERVAL == 0}
    return TrainingFigures(
        rates=tuple(trainer.rates(config.tokens_per_step)),
        memory_bytes=peak,
        first_step_seconds=trainer.first_step_end - started,
        losses=reported,
        norms={},
        notes=f"torchtitan {version('torchtitan')}, compiled, bfloat16 weights and moments",
    )


def _train(run: TitanRun, interval: int) -> tuple[Any, int]:
    """Trains a run in the process group that the environment names: the trainer, and this rank's peak of bytes."""
    trainer_of = _trainer_of_installed_version()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(run, folder)
        trainer.interval = interval
        trainer.start_clock()
        built = sum(weight.numel() for weight in trainer.model_parts[0].parameters())
        if built != (expected := count_parameters(run.config.model).total):
            raise BenchmarkError(f"torchtitan built {built} parameters; the shape has {expected}")
        trainer.train()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        trainer.close()
    return trainer, peak


def _trainer_of_installed_version() -> Any:
    """What builds the trainer of a run with the installed version."""
    if not is_installed("torchtitan"):
        raise BenchmarkError(missing_library("the peer torchtitan", "torchtitan"))
    found = version("torchtitan")
    if found.startswith("0.2."):
        from deepseek_v3.benchmark.peers import torchtitan_0_2

        return torchtitan_0_2.build_trainer
    if found.startswith("0.3."):
        from deepseek_v3.benchmark.peers import torchtitan_0_3

        return torchtitan_0_3.build_trainer
    raise BenchmarkError(f"torchtitan {found} is installed; expected 0.2 or 0.3, whose interfaces are known here")


def _figures(trainer: Any, peak_bytes: int, run: TitanRun) -> dict[str, object]:
    """Tokens per second over all GPUs, the most memory on any of them from the second step on, and the loss."""
    tokens = run.batch * run.config.training.sequence_length
    rates = trainer.rates(tokens)
    losses = torch.stack(trainer.losses)  # each rank's part of the mean over the tokens of all
    peak = torch.tensor(peak_bytes, device=trainer.device)
    dist.all_reduce(losses)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "device": f"{dist.get_world_size()} x {trainer.metrics_processor.device_memory_monitor.device_name}",
        "versions": {"torch": torch.__version__, "torchtitan": version("torchtitan")},
        "parameters": count_parameters(run.config.model).total,
        "tokens_per_step": tokens,
        "timed_steps": len(rates) * trainer.interval,
        "tokens_per_second_median": median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "memory_gib": peak.item() / 2**30,
        "loss_first_and_last": [losses[0].item(), losses[-1].item()],
    }


def main() -> None:
    """Trains with float32 weights on every process of a launcher; rank 0 writes the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", required=True, help="a shipped shape, or a run's YAML file")
    parser.add_argument("--data-shard", type=int, default=1)
    parser.add_argument("--data-replicate", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--batch", type=int, required=True, help="sequences of a step over all GPUs")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--interval", type=int, default=INTERVAL, help="steps of one rate")
    parser.add_argument("--recompute", choices=("none", "full", "selective"), default="none")
    parser.add_argument("--output", type=Path, required=True)
    words = parser.parse_args()
    if words.steps < 2 * words.interval:
        parser.error(f"--steps {words.steps}: the first {words.interval} are not counted, so give more")
    run = TitanRun(
        load_config(shape_file(words.shape)),
        words.steps,
        words.batch,
        words.micro_batch,
        words.data_shard,
        words.data_replicate,
        words.expert,
        words.recompute,
    )
    trainer, peak = _train(run, words.interval)
    found = _figures(trainer, peak, run)
    if dist.get_rank() == 0:
        layout = {name: str(value) for name, value in vars(words).items() if name != "output"}
        text = json.dumps({"arguments": layout, **found}, indent=2)
        words.output.write_text(text + "\n", encoding="utf-8")
        print(text)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
