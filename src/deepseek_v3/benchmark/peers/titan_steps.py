"""What every version of torchtitan is given here: the settings of a run, its tokens, and a clock around its steps.

Axes: B sequences of a micro-batch, S sequence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.data.tokens.mixture import MixtureLoader
from deepseek_v3.training.data import open_tokens, open_tokens_on_all_ranks


@dataclass(frozen=True)
class TitanRun:
    """A run of torchtitan on the shape and the tokens of `config`.

    `batch` and `micro_batch` are sequences of a step over all GPUs and of a micro-batch on each. `weights` is the
    type of weights, gradients and moments.
    """

    config: RunConfig
    steps: int
    batch: int
    micro_batch: int
    data_shard: int = 1
    data_replicate: int = 1
    expert: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    weights: Literal["bfloat16", "float32"] = "float32"

    def batches(self, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields inputs and targets (B, S) int64 of each micro-batch of a rank, in the run's order."""
        config = self.config
        tokens = (
            open_tokens(config) if ranks == 1 else open_tokens_on_all_ranks(config, dist.new_group(backend="gloo"))
        )
        loader = MixtureLoader(tokens, sequence_length=config.training.sequence_length, seed=config.training.seed)
        first = rank * self.micro_batch
        while True:
            samples = torch.from_numpy(loader.batch(first, self.micro_batch))
            yield samples[:, :-1], samples[:, 1:]
            first += ranks * self.micro_batch


class TimedSteps:
    """Keeps the loss of every step of torchtitan's trainer, and the time after every `interval` steps.

    A base class to be named before the trainer. `losses` are this rank's parts of the mean over the tokens of all.
    """

    interval = 1
    device: torch.device
    losses: list[Tensor]
    ends: list[float]

    def start_clock(self) -> None:
        """Begins the first interval."""
        self.losses, self.ends, self.first_step_end = [], [time.time()], 0.0

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        self.losses.append(torch.zeros((), device=self.device))
        super().train_step(data_iterator)  # type: ignore[misc]
        if len(self.losses) == 1 or len(self.losses) % self.interval == 0:
            torch.get_device_module(self.device).synchronize()
            self.first_step_end = self.first_step_end or time.time()
            if len(self.losses) % self.interval == 0:
                self.ends.append(time.time())

    def forward_backward_step(self, **batch: Any) -> Tensor:
        loss: Tensor = super().forward_backward_step(**batch)  # type: ignore[misc]
        self.losses[-1] += loss.detach()
        return loss

    def rates(self, tokens_per_step: int) -> list[float]:
        """Tokens per second in each interval but the first, which compiles and lets the allocator settle."""
        return [self.interval * tokens_per_step / (end - start) for start, end in pairwise(self.ends[1:])]
