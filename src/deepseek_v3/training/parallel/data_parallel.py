"""The engine of data parallelism: every rank runs all layers on its own samples. A single process uses it too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.training.data import DocumentIds
from deepseek_v3.training.loss import Losses, Objective
from deepseek_v3.training.loss_terms import select_loss_terms
from deepseek_v3.training.optimizer import AdamW
from deepseek_v3.training.parallel.engine import Engine, mean_losses
from deepseek_v3.training.parallel.fsdp import all_reduce_replicated_gradients, set_gradient_sync
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.parallelize import build_model
from deepseek_v3.training.parallel.sharding import GlobalGradNorm, local_shards
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.validation import EvaluatedBatches, evaluate


class DataParallelEngine(Engine):
    """Runs micro-batches one after another; FSDP and the expert exchange run inside the model."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh, device: torch.device, documents: DocumentIds) -> None:
        terms = select_loss_terms(config.training.loss_terms)
        self.objective = build_model(config, device, mesh, partial(Objective, loss_terms=terms))
        super().__init__(mesh, [self.objective.model])
        self._parallel, self._documents = config.parallel, documents
        self._balance_weight = config.training.balance.sequence_loss_weight
        model = self.objective.model
        norm = None if mesh.is_alone else GlobalGradNorm(local_shards(model, mesh), mesh, device)
        self.optimizer = AdamW(dict(model.named_parameters()), config.training.optimizer, norm)

    def _backward(self, batches: Iterator[Tensor], step: ScheduledStep) -> Losses:
        parallel = self._parallel
        count = step.num_samples // (parallel.micro_batch_size * parallel.data_ranks)
        losses_of_micro_batches: list[Losses] = []
        tokens = list(islice(batches, count))
        documents = [self._documents(tokens_BX) for tokens_BX in tokens]
        num_targets = self._targets_per_micro_batch(documents)
        for number, (tokens_BX, documents_BX) in enumerate(zip(tokens, documents, strict=True), start=1):
            set_gradient_sync(self.objective, parallel.zero_stage, is_last=number == count)
            losses = self.objective(
                tokens_BX,
                step.mtp_weight,
                self._balance_weight,
                documents_BX,
                num_targets=num_targets,
            )
            (losses.total / (count * parallel.data_ranks)).backward()
            losses_of_micro_batches.append(losses._replace(total=losses.total.detach()))
        all_reduce_replicated_gradients(self.models, self.mesh)
        return mean_losses(losses_of_micro_batches)

    def _roots(self) -> Sequence[nn.Module]:
        return [self.objective]

    def evaluate(self, batches: Iterable[Tensor], with_drafts: bool = False) -> EvaluatedBatches:
        return evaluate(self.objective, self._documents, batches, with_drafts)
