"""What carries out the steps of a run on the ranks of a layout. The training loop is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.balance import routers_of, update_biases
from deepseek_v3.moe.routing import Router
from deepseek_v3.training.loss import Losses, count_targets
from deepseek_v3.training.optimizer import MOMENTS, AdamW, is_finite_step
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.sharding import as_global, local_shards
from deepseek_v3.training.schedule import ScheduledStep


class StepResult(NamedTuple):
    """What a step found, the same on every rank: mean losses with summed loads, and the norm of all gradients.

    `finite`, 0-d bool, says whether loss and norm are numbers. Where they are not, the step was skipped: weights,
    moments and routing biases are as they were before it.
    """

    losses: Losses
    norm: Tensor
    finite: Tensor


class Engine(ABC):
    """Forward and backward passes and the update, of which each rank does its part.

    `models`: what this rank has of the model, in one piece or, of a pipeline, in several.
    """

    optimizer: AdamW

    def __init__(self, mesh: ParallelMesh, models: Sequence[DeepSeekV3]) -> None:
        self.mesh = mesh
        self.models = models
        self.config = models[0].config
        self._routers = [router for model in models for router in routers_of(model)]
        device = next(models[0].parameters()).device
        self._rows = torch.tensor([row for model in models for row in _router_rows(model)], device=device)

    def run_step(self, batches: Iterator[Tensor], step: ScheduledStep) -> StepResult:
        """One optimizer step on this rank's micro-batches, int64 (sequences, length + 1).

        Where the loss or the gradient of any rank is not finite, the step changes nothing on all ranks. That is
        decided on the devices, for which nothing waits here.
        """
        losses = self._combined(self._backward(batches, step))
        norm = self._update(step, losses.total)
        finite = is_finite_step(losses.total, norm)
        if self._routers:
            speed = torch.where(finite, step.bias_update_speed, 0.0)
            update_biases(self._routers, losses.counts_LE[self._rows], speed)
        return StepResult(losses, norm, finite)

    @abstractmethod
    def _backward(self, batches: Iterator[Tensor], step: ScheduledStep) -> Losses:
        """Leaves this rank's part of the gradient of a step with the parameters.

        Returns the means of this rank's losses, with the summed loads of its own routers. Parts of the model that
        other ranks have count as 0.
        """

    def _update(self, step: ScheduledStep, loss: Tensor) -> Tensor:
        """Spends the gradient on the update, unless it or the `loss` is not finite; returns its norm."""
        norm = self.optimizer.step(step.learning_rate, loss)
        self.optimizer.zero_grad()
        return norm

    @abstractmethod
    def main_losses(self, batches: Iterable[Tensor]) -> Tensor:
        """The main model's summed loss on each of these micro-batches over its positions: float32 [batches].

        No gradient is taken. All ranks take part, with equally many batches; where the head is on another rank the
        losses are 0.
        """

    def state(self) -> dict[str, Any]:
        """This rank's parts of weights, routing biases and moments, as nested dicts: what a checkpoint holds.

        Parts of what is shared out are DTensors of the whole.
        """
        model: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        for part in self.models:
            shards = local_shards(part, self.mesh)
            for name, tensor in part.state_dict().items():
                model.setdefault(name, as_global(tensor, shards.get(name), self.mesh))
            for name, parameter in part.named_parameters():
                for moment, values in self.optimizer.state[parameter].items():
                    moments[moment].setdefault(name, as_global(values, shards[name], self.mesh))
        return {"model": model, "optimizer": {"num_steps": self.optimizer.num_steps, **moments}}

    def state_to_load(self) -> dict[str, Any]:
        """Tensors like those of `state`, to be overwritten by a checkpoint; here the run's own tensors."""
        return self.state()

    def finish_loading(self, state: dict[str, Any], num_steps: int) -> None:  # noqa: ARG002
        """Applies the `state` of `state_to_load`, which a checkpoint of `num_steps` updates has filled."""
        self.optimizer.num_steps = num_steps

    def _targets_per_micro_batch(self, documents: Sequence[Tensor | None]) -> Tensor | None:
        """Targets of the main model that count, on average over all micro-batches of all ranks; None where all do.

        `documents` number the documents of this rank's micro-batches of a step.
        """
        numbered = [documents_BX for documents_BX in documents if documents_BX is not None]
        if not numbered:
            return None
        own = torch.stack([count_targets(documents_BX) for documents_BX in numbered]).sum().double()
        total = self.mesh.sum_over_ranks(own) / self.mesh.parallel.pipeline  # all stages see the same tokens
        return total.clamp(min=1) / (len(numbered) * self.mesh.parallel.data_ranks)

    def routing_biases(self) -> Tensor:
        """The routing biases of all layers, (layers, experts), on every rank."""
        found = self._spread([router.e_score_correction_bias for router in self._routers], torch.float32)
        return self.mesh.sum_over_ranks(found) / self.mesh.parallel.data_ranks

    def _combined(self, losses: Losses) -> Losses:
        """Means of the losses over all ranks with different data, and sums of the loads: one collective."""
        counts_LE = self._spread(list(losses.counts_LE), torch.float64)
        means = torch.stack([losses.total, losses.main, losses.mtp, losses.balance]).double()
        means = torch.cat([means, losses.terms_N.double()]) / self.mesh.parallel.data_ranks
        values = self.mesh.sum_over_ranks(torch.cat([means, counts_LE.flatten()]))
        (total, main, mtp, balance), counts = values[:4].float(), values[len(means) :]
        terms_N = values[4 : len(means)].float()
        return Losses(total, main, mtp, balance, terms_N, counts.view_as(counts_LE).round().long())

    def _spread(self, rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Rows of this rank's routers in a table of all routers, the others 0."""
        layers = self.config.num_moe_layers + self.config.num_nextn_predict_layers
        table = torch.zeros(layers, self.config.n_routed_experts, dtype=dtype, device=self._rows.device)
        if rows:
            table.index_copy_(0, self._rows, torch.stack(list(rows)).to(dtype))
        return table


def mean_losses(parts: Sequence[Losses]) -> Losses:
    """Means of the losses of equal micro-batches, and the sums of their expert loads."""
    total, main, mtp, balance, terms, counts = (torch.stack(values) for values in zip(*parts, strict=True))
    return Losses(total.mean(), main.mean(), mtp.mean(), balance.mean(), terms.mean(0), counts.sum(0))


def _router_rows(model: DeepSeekV3) -> list[int]:
    """The place of each of a model's routers among those of all layers."""
    return [
        number - model.config.first_k_dense_replace
        for number, layer in enumerate(model.model.layers)
        if any(isinstance(module, Router) for module in layer.modules())
    ]
