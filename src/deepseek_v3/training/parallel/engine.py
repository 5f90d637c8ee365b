"""The interface of a training engine, which runs the steps of a run on the ranks of a layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.balance import routers_of, update_biases
from deepseek_v3.moe.routing import Router
from deepseek_v3.training.loss import Losses, count_targets
from deepseek_v3.training.optimizer import NO_LIMITS, AdamW, StepLimits, is_accepted_step
from deepseek_v3.training.parallel.fsdp import fsdp_modules
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.sharding import as_global, local_shards
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.validation import EvaluatedBatches


class StepResult(NamedTuple):
    """The result of a step, the same on every rank: mean losses, summed expert counts, and the gradient norm.

    `accepted`, 0-d bool: whether loss and norm are finite and within the limits of the step. If not, the step was
    skipped, and weights, moments and routing biases are unchanged.
    """

    losses: Losses
    norm: Tensor
    accepted: Tensor


class Engine(ABC):
    """Runs forward and backward passes and the update; every rank calls every method.

    `models`: this rank's part of the model, one per pipeline stage that it runs.
    """

    optimizer: AdamW

    def __init__(self, mesh: ParallelMesh, models: Sequence[DeepSeekV3]) -> None:
        self.mesh = mesh
        self.models = models
        self.config = models[0].config
        self._routers = [router for model in models for router in routers_of(model)]
        device = next(models[0].parameters()).device
        self._rows = torch.tensor([row for model in models for row in _router_rows(model)], device=device)

    def run_step(
        self, batches: Iterator[Tensor], step: ScheduledStep, limits: StepLimits = NO_LIMITS
    ) -> StepResult:
        """Runs one optimizer step on this rank's micro-batches, int64 (sequences, length + 1).

        If the loss or the gradient of any rank is not finite, or the step exceeds its `limits`, the step changes
        nothing on any rank. The devices decide that, so the host does not wait for them.
        """
        losses = self._combined(self._backward(batches, step))
        norm = self._update(step, losses.total, limits)
        accepted = is_accepted_step(losses.total, norm, limits)
        if self._routers:
            speed = torch.where(accepted, step.bias_update_speed, 0.0)
            update_biases(self._routers, losses.counts_LE[self._rows], speed)
        return StepResult(losses, norm, accepted)

    @abstractmethod
    def _backward(self, batches: Iterator[Tensor], step: ScheduledStep) -> Losses:
        """Computes the gradients of a step on this rank's parameters.

        Returns the mean losses of this rank's micro-batches and the summed counts of its own routers. Parts of the
        loss that other ranks compute are 0.
        """

    def _update(self, step: ScheduledStep, loss: Tensor, limits: StepLimits) -> Tensor:
        """Updates the parameters if `is_accepted_step` says so; returns the gradient norm."""
        norm = self.optimizer.step(step.learning_rate, loss, limits)
        self.optimizer.zero_grad()
        return norm

    @abstractmethod
    def evaluate(self, batches: Iterable[Tensor], with_drafts: bool = False) -> EvaluatedBatches:
        """Runs the main model on micro-batches, with its MTP layers if their drafts are to be counted.

        Computes no gradients and changes nothing. All ranks must pass the same number of micro-batches, of one
        shape; on ranks without the head all losses and counts are 0.
        """

    def state(self) -> dict[str, Any]:
        """This rank's weights, routing biases, moments and averages as nested dicts, as a checkpoint holds them.

        Sharded tensors are DTensors of their global shape.
        """
        model: dict[str, Tensor] = {}
        moments: dict[str, dict[str, Tensor]] = {}
        for part in self.models:
            shards = local_shards(part, self.mesh)
            for name, tensor in part.state_dict().items():
                model.setdefault(name, as_global(tensor, shards.get(name), self.mesh))
            for name, parameter in part.named_parameters():
                for moment, values in self.optimizer.state[parameter].items():
                    kept = moments.setdefault(moment, {})
                    kept.setdefault(name, as_global(values, shards[name], self.mesh))
        return {"model": model, "optimizer": {"num_steps": self.optimizer.num_steps, **moments}}

    def state_to_load(self) -> dict[str, Any]:
        """Tensors like those of `state`, to be overwritten by a checkpoint; here the run's own tensors."""
        return self.state()

    def finish_loading(self, state: dict[str, Any], num_steps: int) -> None:  # noqa: ARG002
        """Applies the `state` of `state_to_load`, which a checkpoint of `num_steps` updates has filled."""
        self._free_gathered()
        self.optimizer.num_steps = num_steps

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Lets the model compute with the averages of its weights; the end of the block restores the weights.

        Routing biases are not averaged. The optimizer must have averages.
        """
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        self._free_gathered()
        self.optimizer.swap_averages()

    def _free_gathered(self) -> None:
        """Lets FSDP gather weights anew, as it must when they have changed outside of a step.

        An evaluation without the MTP layers prefetches the first one's; only finished gathers can be freed.
        """
        for root in self._roots():
            for unit in fsdp_modules(root):
                unit.unshard()
                unit.reshard()

    def _roots(self) -> Sequence[nn.Module]:
        """The outermost modules of this rank, which FSDP wraps."""
        return self.models

    def _targets_per_micro_batch(self, documents: Sequence[Tensor | None]) -> Tensor | None:
        """The mean number of counted targets per micro-batch, over all ranks; None if every target counts.

        `documents`: the document ids of this rank's micro-batches of the step.
        """
        numbered = [documents_BX for documents_BX in documents if documents_BX is not None]
        if not numbered:
            return None
        own = torch.stack([count_targets(documents_BX) for documents_BX in numbered]).sum().double()
        total = self.mesh.sum_over_ranks(own) / self.mesh.parallel.pipeline  # all stages see the same tokens
        return total.clamp(min=1) / (len(numbered) * self.mesh.parallel.data_ranks)

    def routing_biases(self) -> Tensor:
        """The routing biases of all MoE layers, float32 (layers, experts), on every rank."""
        found = self._spread([router.e_score_correction_bias for router in self._routers], torch.float32)
        return self.mesh.sum_over_ranks(found) / self.mesh.parallel.data_ranks

    def _combined(self, losses: Losses) -> Losses:
        """Losses averaged and expert counts summed over the data-parallel ranks, in one collective."""
        counts_LE = self._spread(list(losses.counts_LE), torch.float64)
        means = torch.stack([losses.total, losses.main, losses.mtp, losses.balance]).double()
        means = torch.cat([means, losses.terms_N.double()]) / self.mesh.parallel.data_ranks
        values = self.mesh.sum_over_ranks(torch.cat([means, counts_LE.flatten()]))
        (total, main, mtp, balance), counts = values[:4].float(), values[len(means) :]
        terms_N = values[4 : len(means)].float()
        return Losses(total, main, mtp, balance, terms_N, counts.view_as(counts_LE).round().long())

    def _spread(self, rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """A table with a row for each router of the model: those of this rank are filled, the others are 0."""
        layers = self.config.num_moe_layers + self.config.num_nextn_predict_layers
        table = torch.zeros(layers, self.config.n_routed_experts, dtype=dtype, device=self._rows.device)
        if rows:
            table.index_copy_(0, self._rows, torch.stack(list(rows)).to(dtype))
        return table


def mean_losses(parts: Sequence[Losses]) -> Losses:
    """The mean losses of micro-batches of equal size, and the sums of their expert counts."""
    *values, _ = zip(*parts, strict=True)  # drafts are counted in evaluations only
    total, main, mtp, balance, terms, counts = map(torch.stack, values)
    return Losses(total.mean(), main.mean(), mtp.mean(), balance.mean(), terms.mean(0), counts.sum(0))


def _router_rows(model: DeepSeekV3) -> list[int]:
    """The index of each of this model's routers among the routers of the whole model."""
    return [
        number - model.config.first_k_dense_replace
        for number, layer in enumerate(model.model.layers)
        if any(isinstance(module, Router) for module in layer.modules())
    ]
