"""The engine of DeepSpeed: ZeRO stages 1, 2 and 3 (Rajbhandari et al. 2020), with the same model and losses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from deepseek_v3.config.train_config import RunConfig
from deepseek_v3.model.init import initial_values, reset_buffers
from deepseek_v3.training.data import DocumentIds
from deepseek_v3.training.loss import Losses, Objective
from deepseek_v3.training.loss_terms import select_loss_terms
from deepseek_v3.training.optimizer import MOMENTS, PartitionedAdamW, StepLimits, is_accepted_step, local
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.engine import Engine, mean_losses
from deepseek_v3.training.parallel.fsdp import float32_parameters
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.training.parallel.parallelize import build_on_meta
from deepseek_v3.training.parallel.sharding import as_dtensor
from deepseek_v3.training.schedule import ScheduledStep
from deepseek_v3.training.validation import EvaluatedBatches, evaluate
from deepseek_v3.utils.errors import ConfigError
from deepseek_v3.utils.logging import get_logger


class DeepSpeedEngine(Engine):
    """Each rank runs its own samples; DeepSpeed shards moments (stage 1), gradients (2) and weights (3).

    `config` must come from `file.resolve_layout`. In bfloat16 the model computes with rounded copies of float32
    weights, which are sharded at every stage. Routers and norms compute in float32 at stages 1 and 2; stage 3 holds
    all weights in one bfloat16 buffer. torch.distributed must be initialised, even for a single rank.
    """

    optimizer: PartitionedAdamW

    def __init__(
        self,
        config: RunConfig,
        mesh: ParallelMesh,
        device: torch.device,
        documents: DocumentIds,
        file: DeepSpeedFile,
    ) -> None:
        _init_deepspeed()
        terms = select_loss_terms(config.training.loss_terms)
        wrap = partial(Objective, loss_terms=terms)
        self.objective, model = build_on_meta(config, device, ParallelMesh(config.parallel, mesh.rank), wrap)
        is_bfloat16 = model.compute_dtype == torch.bfloat16
        settings = _checked_settings(file, config, is_bfloat16)
        self._run, self._stage = config, file.stage
        self._materialize(model, device, settings if file.stage == 3 else None)
        super().__init__(mesh, [model])
        self._documents, self._balance_weight = documents, config.training.balance.sequence_loss_weight
        self._parameters = dict(model.named_parameters())
        self.optimizer = PartitionedAdamW(self._parameters, config.training.optimizer)
        self.objective.train()
        wide = float32_parameters(model) if is_bfloat16 and file.stage < 3 else []
        if is_bfloat16 and not wide:
            get_logger("Plan").warning(
                "DeepSpeed's stage 3 rounds the weights of routers and norms to bfloat16, which sends a few tokens "
                "to other experts; stages 1 and 2, and runs without --deepspeed, keep them in float32"
            )
        self._engine, *_ = deepspeed.initialize(
            model=self.objective,
            optimizer=lambda _: self._optimizer_of(wide),
            config=settings,
            dist_init_required=False,
        )
        self._link_moments()
        if file.stage == 3:
            # The loss uses the head's weight outside the module that owns it.
            deepspeed.zero.register_external_parameter(self.objective, model.head_weight_VD)
        if is_bfloat16:  # DeepSpeed has made the float32 weights from rounded ones
            for name, parameter in self._parameters.items():
                values = self._initial_values(name, _shape(parameter), device)
                safe_set_full_fp32_param(parameter, values)
                if parameter.dtype == torch.float32:
                    parameter.data.copy_(values)

    def _backward(self, batches: Iterator[Tensor], step: ScheduledStep) -> Losses:
        parts: list[Losses] = []
        self._engine.set_train_batch_size(step.num_samples)
        count = self._engine.gradient_accumulation_steps()
        tokens = list(islice(batches, count))
        documents = [self._documents(tokens_BX) for tokens_BX in tokens]
        num_targets = self._targets_per_micro_batch(documents)
        for number, (tokens_BX, documents_BX) in enumerate(zip(tokens, documents, strict=True), start=1):
            self._engine.set_gradient_accumulation_boundary(number == count)
            losses = self._engine(
                tokens_BX,
                step.mtp_weight,
                self._balance_weight,
                documents_BX,
                num_targets=num_targets,
            )
            self._engine.backward(losses.total)  # DeepSpeed divides by the number of micro-batches, and of ranks
            parts.append(losses._replace(total=losses.total.detach()))
            if number < count:
                self._engine.step()
        return mean_losses(parts)

    def _update(self, step: ScheduledStep, loss: Tensor, limits: StepLimits) -> Tensor:
        def norm() -> Tensor:
            found = self._engine.optimizer._global_grad_norm  # known before the optimizer is called
            return torch.as_tensor(found, dtype=torch.float32, device=loss.device)

        # DeepSpeed itself skips the update if the gradient is not finite, unless its settings forbid that.
        self.optimizer.before_step(step.learning_rate, lambda: is_accepted_step(loss, norm(), limits))
        self._engine.step()
        self.optimizer.after_step()
        return norm()

    def evaluate(self, batches: Iterable[Tensor], with_drafts: bool = False) -> EvaluatedBatches:
        return evaluate(self.objective, self._documents, batches, with_drafts)

    def state(self) -> dict[str, Any]:
        """Returns copies in CPU memory, sharded by rows; all ranks gather one parameter at a time."""

        def weight(name: str) -> Tensor:
            return self._own_rows(safe_get_full_fp32_param(self._parameters[name]))

        def moment(name: str, kind: str) -> Tensor:
            values = safe_get_full_optimizer_state(self._parameters[name], kind)
            return self._own_rows(values.to(self.optimizer.moment_dtype))

        return self._entries(weight, moment)

    def state_to_load(self) -> dict[str, Any]:
        def empty(name: str, dtype: torch.dtype) -> Tensor:
            shape = _shape(self._parameters[name])
            first, last = self._rows_of(shape)
            return self._as_sharded(torch.zeros(last - first, *shape[1:], dtype=dtype), shape)

        return self._entries(
            lambda name: empty(name, torch.float32), lambda name, _: empty(name, self.optimizer.moment_dtype)
        )

    def finish_loading(self, state: dict[str, Any], num_steps: int) -> None:
        super().finish_loading(state, num_steps)
        for name, parameter in self._parameters.items():
            self._set_weight(parameter, self._gathered(state["model"][name], parameter.device))
            for kind in MOMENTS:
                values = self._gathered(state["optimizer"][kind][name], parameter.device)
                safe_set_full_optimizer_state(parameter, values, kind)

    def _materialize(self, model: nn.Module, device: torch.device, stage3: dict[str, Any] | None) -> None:
        """Allocates and initialises the parameters; with the settings of stage 3, shards each module right away."""
        for prefix, module in reversed(list(model.named_modules())):  # modules before those that contain them
            module.to_empty(device=device, recurse=False)
            own = dict(module.named_parameters(prefix, recurse=False))
            for name, parameter in own.items():
                parameter.data.copy_(self._initial_values(name, parameter.shape, device))
            if stage3 and own:
                for parameter in own.values():
                    parameter.data = parameter.data.to(
                        torch.bfloat16 if stage3["bf16"]["enabled"] else torch.float32
                    )
                deepspeed.zero.Init(module=module, config_dict_or_path=stage3)
        reset_buffers(model)

    def _initial_values(self, name: str, shape: Sequence[int], device: torch.device) -> Tensor:
        std, seed = self._run.model.initializer_range, self._run.training.seed
        whole = torch.empty(*shape, device=device)
        for rows, values in initial_values(name, shape, range(shape[0]), std, seed, device):
            whole[rows] = values
        return whole

    def _optimizer_of(self, wide: Sequence[nn.Parameter]) -> PartitionedAdamW:
        """Returns the optimizer, with the `wide` parameters in float32 and in separate groups.

        DeepSpeed calls this after it has cast every parameter, and then flattens each group into a buffer of one
        dtype.
        """
        ids = {id(parameter) for parameter in wide}
        for parameter in wide:
            parameter.data = parameter.data.float()
        for group in list(self.optimizer.param_groups):
            kept = [parameter for parameter in group["params"] if id(parameter) not in ids]
            taken = [parameter for parameter in group["params"] if id(parameter) in ids]
            if kept and taken:
                group["params"] = kept
                self.optimizer.add_param_group({**group, "params": taken})
        return self.optimizer

    def _link_moments(self) -> None:
        """Allocates all moments before the first step, and lets DeepSpeed map them to the parameters."""
        zero_optimizer = self._engine.optimizer
        if self._stage == 3:
            self.optimizer.make_moments(zero_optimizer.fp32_partitioned_groups_flat)
        else:
            self.optimizer.make_moments(part for group in self.optimizer.param_groups for part in group["params"])
            zero_optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _set_weight(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Sets the float32 weight, and the copy that the model computes with."""
        safe_set_full_fp32_param(parameter, values)
        if self._stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if self.mesh.rank == 0:
                    parameter.copy_(values)
        else:
            parameter.copy_(values)

    def _entries(self, weight: Callable[[str], Tensor], moment: Callable[[str, str], Tensor]) -> dict[str, Any]:
        moments = {kind: {name: moment(name, kind) for name in self._parameters} for kind in MOMENTS}
        weights = {name: weight(name) for name in self._parameters}
        buffers = dict(self.models[0].named_buffers())
        return {"model": weights | buffers, "optimizer": {"num_steps": self.optimizer.num_steps, **moments}}

    def _rows_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """First and end of this rank's rows in checkpoints, which are divided as `torch.chunk` divides them."""
        size = -(-shape[0] // self.mesh.size)
        return min(self.mesh.rank * size, shape[0]), min((self.mesh.rank + 1) * size, shape[0])

    def _own_rows(self, whole: Tensor) -> Tensor:
        """Copies this rank's rows to CPU memory."""
        first, last = self._rows_of(whole.shape)
        return self._as_sharded(whole[first:last].detach().to("cpu", copy=True), whole.shape)

    def _as_sharded(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        return rows if self.mesh.is_alone else as_dtensor(rows, self._cpu_mesh, [Shard(0)], shape)

    @cached_property
    def _cpu_mesh(self) -> DeviceMesh:
        """All ranks; it only describes how checkpoints are sharded, and has no process group."""
        return DeviceMesh("cpu", torch.arange(self.mesh.size), _init_backend=False)

    def _gathered(self, part: Tensor, device: torch.device) -> Tensor:
        """Gathers the rows of all ranks to a float32 tensor on `device`."""
        first, last = self._rows_of(part.shape)
        whole = torch.zeros(*part.shape, device=device)
        whole[first:last] = local(part).to(device)
        return self.mesh.sum_over_ranks(whole)


def _shape(parameter: nn.Parameter) -> Sequence[int]:
    """The global shape of a parameter, even if DeepSpeed has partitioned it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _init_deepspeed() -> None:
    """Initialises DeepSpeed on the existing process group, and reduces its log output."""
    logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile; gloo does the same
    deepspeed.init_distributed(dist_init_required=False, verbose=False)


def _checked_settings(file: DeepSpeedFile, config: RunConfig, is_bfloat16: bool) -> dict[str, Any]:
    """Returns the filled settings. Raises ConfigError if DeepSpeed rejects a field or value."""
    settings = file.filled(config, is_bfloat16)
    try:
        DeepSpeedConfig(settings)
    except (AssertionError, DeepSpeedConfigError, ValueError) as error:
        raise ConfigError(f"{file.path}: DeepSpeed refuses it: {' '.join(str(error).split())}") from error
    return settings
