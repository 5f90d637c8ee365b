"""The engine of pipeline parallelism: each rank runs some stages of the model, on one micro-batch after another.

The schedules are those of torch.distributed.pipelining. Every stage gets the tokens of a micro-batch directly, so
only hidden states are sent between stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.transformer import DeepSeekV3, HiddenStates
from deepseek_v3.planning.pipeline_split import stage_layers, stages_of_rank
from deepseek_v3.training.data import DocumentIds
from deepseek_v3.training.loss import Losses, compute_losses, stack_expert_counts, sum_balance_losses
from deepseek_v3.training.loss_terms import LossTerm, select_loss_terms
from deepseek_v3.training.optimizer import AdamW, local
from deepseek_v3.training.parallel.engine import Engine, mean_losses
from deepseek_v3.training.parallel.fp8_layers import has_fp8
from deepseek_v3.training.parallel.fsdp import all_reduce_replicated_gradients
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.parallelize import build_model
from deepseek_v3.training.parallel.sharding import GlobalGradNorm, local_shards
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.validation import EvaluatedBatches

_SCHEDULES = {
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleZBVZeroBubble,
    "dualpipe_v": ScheduleDualPipeV,
}


class ModelStage(nn.Module):
    """A pipeline stage: some layers of a model, with the embedding in the first, and head and losses in the last.

    `mtp_weight`, `balance_weight`, `share` (the factor of a micro-batch's loss) and `num_targets` (as in
    `compute_losses`) are set before each step. `found` collects the losses of each micro-batch; the parts of a loss
    that other stages compute are 0 here.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        layers: range,
        is_first: bool,
        is_last: bool,
        documents: DocumentIds,
        loss_terms: Sequence[LossTerm] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.layers, self.is_first, self.is_last = layers, is_first, is_last
        self.documents, self.loss_terms = documents, tuple(loss_terms)
        self.mtp_weight = self.balance_weight = 0.0
        self.share = 1.0
        self.num_targets: Tensor | int | None = None
        self.main_only = self.with_drafts = False
        self.found: list[Losses] = []

    def forward(self, x: Tensor, *, tokens_BX: Tensor) -> Tensor:
        """Maps hidden states (B, S, D), in the first stage tokens, to hidden states, in the last to a loss (1,)."""
        inputs_BS = tokens_BX[:, :-1]
        documents_BX = self.documents(tokens_BX)
        documents_BS = None if documents_BX is None else documents_BX[:, :-1]
        metadata = self.model.attention_metadata(inputs_BS, documents_BS)
        x_BSD = self.model.embed(inputs_BS) if self.is_first else x
        x_BSD, routing = self.model.run_layers(x_BSD, metadata, self.layers)
        if not self.is_last:
            zero = torch.zeros((), device=x_BSD.device)
            balance, counts = (
                sum_balance_losses(routing, zero),
                stack_expert_counts(routing, self._experts, x_BSD.device),
            )
            total = self.balance_weight * balance
            terms_N = zero.new_zeros(len(self.loss_terms))
            self.found.append(Losses(total.detach(), zero, zero, balance.detach(), terms_N, counts))
            return _AddLossGradient.apply(x_BSD, self.share * total) if total.requires_grad else x_BSD
        states = HiddenStates(self.model.model.norm(x_BSD), [], routing)
        if (self.with_drafts or not self.main_only) and self.model.config.num_nextn_predict_layers:
            mtp, more = self.model.run_mtp(states.main_BSD, self.model.embed(inputs_BS), metadata)
            states = HiddenStates(states.main_BSD, mtp, routing + more)
        losses = compute_losses(
            self.model,
            states,
            tokens_BX,
            self.mtp_weight,
            self.balance_weight,
            documents_BX,
            self.num_targets,
            self.loss_terms,
            main_only=self.main_only,
            with_drafts=self.with_drafts,
        )
        self.found.append(losses._replace(total=losses.total.detach()))
        return self.share * losses.total.view(1)

    @property
    def _experts(self) -> int:
        return self.model.config.n_routed_experts


class _AddLossGradient(torch.autograd.Function):
    """Returns the states unchanged, and in the backward pass adds the gradient of this stage's own loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()  # schedules detach what a stage returns, which a view does not allow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad_x, torch.ones_like(loss)


class PipelineEngine(Engine):
    """Runs this rank's stages by a pipeline schedule."""

    def __init__(self, config: RunConfig, mesh: ParallelMesh, device: torch.device, documents: DocumentIds) -> None:
        parallel = config.parallel
        self._numbers = stages_of_rank(parallel, mesh.pipeline_rank)
        self._total = parallel.pipeline * parallel.stages_per_rank
        cut = stage_layers(config.model, self._total, config.training.sequence_length)
        self._stages = []
        terms = select_loss_terms(config.training.loss_terms)
        for number in self._numbers:
            ends = (number == 0, number == self._total - 1)
            wrap = partial(
                ModelStage,
                layers=cut[number],
                is_first=ends[0],
                is_last=ends[1],
                documents=documents,
                loss_terms=terms,
            )
            keep = partial(_keep_only, layers=cut[number], is_first=ends[0], is_last=ends[1])
            self._stages.append(build_model(config, device, mesh, wrap, keep))
        super().__init__(mesh, [stage.model for stage in self._stages])
        self._training, self._device, self._documents = config.training, device, documents
        self._schedules: dict[int, Any] = {}
        self._embeddings = SharedEmbeddings(self._stages, mesh)
        parameters, shards = {}, {}
        for number, model in zip(self._numbers, self.models, strict=True):
            for name, shard in local_shards(model, mesh).items():
                key = name if name not in parameters else f"{name} of stage {number}"
                parameters[key] = model.get_parameter(name)
                shards[key] = replace(shard, copies=shard.copies * self._embeddings.copies_of(name))
        self.optimizer = AdamW(parameters, config.training.optimizer, GlobalGradNorm(shards, mesh, device))

    def finish_loading(self, state: dict[str, Any], num_steps: int) -> None:
        super().finish_loading(state, num_steps)
        self._embeddings.copy_first(self.optimizer)

    def _roots(self) -> Sequence[nn.Module]:
        return self._stages

    def _backward(self, batches: Iterator[Tensor], step: ScheduledStep) -> Losses:
        parallel = self.mesh.parallel
        count = step.num_samples // (parallel.micro_batch_size * parallel.data_ranks)
        micro_batches = list(islice(batches, count))
        num_targets = self._targets_per_micro_batch([self._documents(tokens_BX) for tokens_BX in micro_batches])
        for stage in self._stages:
            stage.num_targets = num_targets
            stage.mtp_weight = step.mtp_weight
            stage.balance_weight = self._training.balance.sequence_loss_weight
            stage.share = 1 / (count * parallel.data_ranks)
        found = self._run(micro_batches)
        all_reduce_replicated_gradients(self.models, self.mesh)
        self._embeddings.sum_gradients()
        return _join_stages([mean_losses(losses) for losses in found])

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Tensor], with_drafts: bool = False) -> EvaluatedBatches:
        return EvaluatedBatches.of([self._evaluate(tokens_BX, with_drafts) for tokens_BX in batches])

    def _evaluate(self, tokens_BX: Tensor, with_drafts: bool) -> tuple[Tensor, Tensor]:
        """Runs one micro-batch forward through all stages, without a schedule: V schedules need a backward pass."""
        states = tokens_BX
        for number, stage in zip(self._numbers, self._stages, strict=True):
            stage.main_only, stage.with_drafts, stage.num_targets = True, with_drafts, tokens_BX[:, 1:].numel()
            if number > 0 and number - 1 not in self._numbers:
                shape = (*tokens_BX[:, 1:].shape, self.config.hidden_size)
                states = torch.empty(shape, dtype=stage.model.compute_dtype, device=self._device)
                dist.recv(states, self._rank_of(number - 1))
            states = stage(states, tokens_BX=tokens_BX)
            if number + 1 < self._total and number + 1 not in self._numbers:
                dist.send(states, self._rank_of(number + 1))
        losses = self._stages[-1].found.pop()
        depths = self.config.num_nextn_predict_layers if with_drafts else 0
        zeros_BK2 = tokens_BX.new_zeros(len(tokens_BX), depths, 2)
        return losses.main, zeros_BK2 if losses.drafts_BK2 is None else losses.drafts_BK2

    def _rank_of(self, number: int) -> int:
        """The rank of this pipeline that runs stage `number`."""
        parallel = self.mesh.parallel
        pipeline_rank = next(rank for rank in range(parallel.pipeline) if number in stages_of_rank(parallel, rank))
        return pipeline_rank * parallel.data_ranks + self.mesh.data_rank

    def _run(self, batches: Sequence[Tensor]) -> list[list[Losses]]:
        """Runs forward and backward passes; returns for each stage of this rank the losses of each micro-batch."""
        for stage in self._stages:
            stage.main_only = stage.with_drafts = False
            stage.found.clear()
        tokens = torch.cat(list(batches))
        first = [tokens] if self._stages[0].is_first else []
        self._schedule(len(batches)).step(*first, target=tokens, tokens_BX=tokens)
        return [list(stage.found) for stage in self._stages]

    def _schedule(self, count: int) -> Any:
        """The schedule for `count` micro-batches; the most recent one is kept, with its buffers."""
        if count not in self._schedules:
            stages = [self._pipeline_stage(*each) for each in zip(self._numbers, self._stages, strict=True)]
            kind = self.mesh.parallel.pipeline_schedule
            passed = stages[0] if kind == "1f1b" else stages
            made = _SCHEDULES[kind](passed, count, loss_fn=_given_loss, scale_grads=False)
            self._schedules = {count: made}
        return self._schedules[count]

    def _pipeline_stage(self, number: int, stage: ModelStage) -> PipelineStage:
        """The stage for torch's schedules, with all shapes given, so that torch does not infer them by a run."""
        size, length = self.mesh.parallel.micro_batch_size, self._training.sequence_length
        tokens = torch.empty(size, length + 1, dtype=torch.int64, device="meta")
        states = torch.empty(
            size,
            length,
            self.config.hidden_size,
            dtype=stage.model.compute_dtype,
            device="meta",
            requires_grad=True,
        )
        loss = torch.empty(1, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            number,
            self._total,
            self._device,
            input_args=tokens if stage.is_first else states,
            output_args=loss if stage.is_last else states,
            group=self.mesh.group("pipeline"),
            dw_builder=_no_gradients_left if self._has_one_backward(stage) else None,
        )

    def _has_one_backward(self, stage: ModelStage) -> bool:
        """Whether zero-bubble schedules run one backward pass here, instead of one for states and one for weights.

        The pass for weights runs a backward pass for every weight, from the operations that use it. It fails
        if an MTP layer or a tied head uses a weight in several operations, it runs a recomputed layer again for
        every weight, and layers that are compiled or compute in FP8 compute all their gradients in both passes.
        """
        depth = self.config.num_nextn_predict_layers if stage.is_last else 0
        uses_weights_again = depth > 1 or (depth > 0 and self.config.tie_word_embeddings)
        is_compiled = any(module._compiled_call_impl is not None for module in stage.modules())
        return uses_weights_again or is_compiled or has_fp8(stage) or self.mesh.parallel.recomputation != "none"


class SharedEmbeddings:
    """Keeps the copies of the embedding on the first and the last stage equal, by summing their gradients."""

    def __init__(self, stages: Sequence[ModelStage], mesh: ParallelMesh) -> None:
        config = stages[0].model.config
        self._shared = config.tie_word_embeddings or config.num_nextn_predict_layers > 0
        held = [stage for stage in stages if stage.is_first or stage.is_last]
        self._weights = [stage.model.model.embed_tokens.weight for stage in held] if self._shared else []
        self._group: dist.ProcessGroup | None = None
        if self._shared and mesh.parallel.pipeline_schedule in ("1f1b", "interleaved"):
            last = mesh.size - mesh.parallel.data_ranks
            pairs = [[rank, last + rank] for rank in range(mesh.parallel.data_ranks)]
            self._group, _ = dist.new_subgroups_by_enumeration(pairs)

    def copies_of(self, name: str) -> int:
        """The number of stages that hold a parameter."""
        return 2 if self._shared and name == "model.embed_tokens.weight" else 1

    @torch.no_grad()
    def copy_first(self, optimizer: AdamW) -> None:
        """Copies weight and optimizer state to a rank's second copy from the first, the one in checkpoints."""
        if len(self._weights) == 2:
            first, second = self._weights
            local(second).copy_(local(first))
            for name, values in optimizer.state[first].items():
                local(optimizer.state[second][name]).copy_(local(values))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Replaces the gradient of each copy by the sum of both."""
        gradients = [local(weight.grad) for weight in self._weights if weight.grad is not None]
        if len(gradients) == 2:  # both ends of a V are on one rank
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])
        elif gradients:
            dist.all_reduce(gradients[0], group=self._group)


def _keep_only(model: DeepSeekV3, layers: range, is_first: bool, is_last: bool) -> list[int]:
    """Removes the layers of other stages; returns the numbers of the remaining ones, MTP layers included."""
    config, parts = model.config, model.model
    predictions = range(config.num_hidden_layers, len(parts.layers)) if is_last else range(0)
    kept = [*layers, *predictions]
    for number in range(len(parts.layers)):
        if number not in kept:
            parts.layers[number] = nn.Identity()
    embeds_again = is_last and (config.tie_word_embeddings or config.num_nextn_predict_layers > 0)
    if not (is_first or embeds_again):
        parts.set_submodule("embed_tokens", nn.Identity())
    if not is_last:
        parts.set_submodule("norm", nn.Identity())
        if not config.tie_word_embeddings:
            model.set_submodule("lm_head", nn.Identity())
    return kept


def _no_gradients_left() -> Callable[[], None]:
    """The weights' pass of a stage whose only backward pass has computed all gradients: it does nothing."""
    return lambda: None


def _given_loss(output: Tensor, target: Tensor) -> Tensor:  # noqa: ARG001 -- the stage has used the targets already
    return output.sum()


def _join_stages(losses: Sequence[Losses]) -> Losses:
    """Adds the losses of the stages of one rank, and concatenates their expert counts."""
    total, main, mtp, balance, terms, counts, _ = zip(*losses, strict=True)
    return Losses(
        total=torch.stack(total).sum(),
        main=torch.stack(main).sum(),
        mtp=torch.stack(mtp).sum(),
        balance=torch.stack(balance).sum(),
        terms_N=torch.stack(terms).sum(0),
        counts_LE=torch.cat(counts),
    )
