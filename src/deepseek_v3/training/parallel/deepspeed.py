"""Training by DeepSpeed: ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020) around the same objective."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.batches import Documents
from deepseek_v3.training.holdout import main_losses
from deepseek_v3.training.loss import Losses, Objective
from deepseek_v3.training.optimizer import PartitionedAdamW
from deepseek_v3.training.parallel.engine import Engine, combined
from deepseek_v3.training.parallel.plan import prepare
from deepseek_v3.training.parallel.ranks import Ranks
from deepseek_v3.training.schedule import Step
from deepseek_v3.utils.errors import ConfigError


class DeepSpeed(Engine):
    """Each rank has a part of the data; DeepSpeed shares out moments (stage 1), gradients (2) and weights (3).

    It takes steps and evaluates; it does not save or continue a run yet, so the training command does not offer it.
    `settings`: the contents of a DeepSpeed JSON file, its batch, clipping and precision fields filled in.
    """

    optimizer: PartitionedAdamW

    def __init__(
        self, config: RunConfig, ranks: Ranks, device: torch.device, documents: Documents, settings: dict[str, Any]
    ) -> None:
        self.objective = prepare(config, device, Ranks(config.parallel, ranks.rank), Objective)
        super().__init__(ranks, [self.objective.model])
        self._documents, self._balance_weight = documents, config.training.balance.sequence_loss_weight
        model = self.objective.model
        self.optimizer = PartitionedAdamW(dict(model.named_parameters()), config.training.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=self.objective, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if self._engine.zero_optimization_stage() == 3:
            # The losses use the head's weight outside the module that has it.
            deepspeed.zero.register_external_parameter(self.objective, model.head_weight_VD)

    def run_step(self, batches: Iterator[Tensor], step: Step) -> tuple[Losses, Tensor]:
        parts: list[Losses] = []
        self.optimizer.before_step(step.learning_rate)
        for _ in range(self._engine.gradient_accumulation_steps()):
            tokens_BX = next(batches)
            losses = self._engine(
                tokens_BX, step.prediction_weight, self._balance_weight, self._documents(tokens_BX)
            )
            self._engine.backward(losses.total)  # divides by the micro-batches, and the sum by the ranks
            self._engine.step()
            parts.append(losses._replace(total=losses.total.detach()))
        norm = self._engine.get_global_grad_norm()
        return combined(parts), torch.as_tensor(norm, dtype=torch.float32, device=parts[0].total.device)

    def state(self) -> dict[str, Any]:
        raise ConfigError(
            "a run by DeepSpeed cannot be saved yet; FSDP with parallel.zero_stage does the same and can"
        )

    def main_losses(self, batches: Iterable[Tensor]) -> Tensor:
        return main_losses(self.objective, self._documents, batches)
