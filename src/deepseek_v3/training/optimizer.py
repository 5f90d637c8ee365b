"""AdamW (arXiv:1711.05101) as DeepSeek-V3 uses it: float32 master weights, moments in bfloat16 or float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek_v3.config.optimizer_config import OptimizerConfig
from deepseek_v3.ops.multi_tensor import MULTI_TENSOR, AdamWStep, MultiTensor
from deepseek_v3.ops.operation import Target
from deepseek_v3.utils.logging import get_logger

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "ema"


def local(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class StepLimits(NamedTuple):
    """The largest total loss (nats per token) and gradient norm of a step that is not skipped."""

    loss: float = math.inf
    norm: float = math.inf


NO_LIMITS = StepLimits()


def is_accepted_step(loss: Tensor, norm: Tensor, limits: StepLimits) -> Tensor:
    """Whether loss and gradient norm, 0-d, are finite and within `limits`, so that the step is taken; 0-d bool."""
    finite = loss.isfinite() & norm.isfinite()
    return finite if limits == NO_LIMITS else finite & (loss <= limits.loss) & (norm <= limits.norm)


class AdamW(torch.optim.Optimizer):
    """AdamW with weight decay on matrices only, and clipping by the global norm folded into the update.

    Parameters and gradients are float32, whole or sharded (DTensor); each rank updates its local shards.
    `total_norm` computes the global norm from this rank's gradients by name; None computes the norm of these alone.
    `step` does not wait for the device, so the device also counts `num_steps`, the updates without skipped steps.

    With `ema_decay` in the config, each update moves float32 averages towards the weights by 1 - `ema_decay`; they
    begin as the initial weights. `Engine.state` saves and restores moments and averages under the names of the
    parameters.
    """

    _has_whole_parameters = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        total_norm: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> None:
        matrices = [p for p in parameters.values() if self._is_matrix(p)]
        others = [p for p in parameters.values() if not self._is_matrix(p)]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate})
        self.parameters = dict(parameters)
        self.config = config
        device = next((parameter.device for parameter in parameters.values()), None)
        self._steps_taken = torch.zeros((), dtype=torch.int64, device=device)
        self._total_norm = total_norm or self._local_norm
        self._kernels: MultiTensor | None = None
        self.moment_dtype = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        if self._has_whole_parameters:
            self.make_moments(parameters.values())

    def make_moments(self, parameters: Iterable[Tensor]) -> None:
        """Allocates the moments, zeros, of those parameters or partitions that have none; all are on one device.

        The first call selects the back end of the update for that device, and logs it.
        """
        for parameter in parameters:
            if self._kernels is None:
                selection = MULTI_TENSOR.select(Target(parameter.device))
                get_logger("Plan").info(f"Optimizer: {selection}")
                self._kernels = selection.run
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter, dtype=self.moment_dtype) for name in MOMENTS}
                self.state[parameter] = moments | self._first_average(parameter)

    @property
    def num_steps(self) -> int:
        """The number of updates so far, without skipped steps. Reading it waits for the device."""
        return int(self._steps_taken)

    @num_steps.setter
    def num_steps(self, number: int) -> None:
        self._steps_taken.fill_(number)

    @torch.no_grad()
    def step(  # type: ignore[override]  # the schedule sets the rate
        self, learning_rate: float, loss: Tensor | None = None, limits: StepLimits = NO_LIMITS
    ) -> Tensor:
        """Clips, updates every parameter that has a gradient, and returns the norm before clipping (0-d).

        Nothing changes if the norm or `loss`, the step's loss (0-d), is not finite or exceeds its limit.
        """
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        norm = self._total_norm(gradients)
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for group in self.param_groups:
            group["lr"] = learning_rate
        accepted = is_accepted_step(norm if loss is None else loss, norm, limits)
        self._update_all(scale, accepted)
        self._update_averages(accepted)
        self._steps_taken += accepted
        return norm

    @property
    def has_averages(self) -> bool:
        """Whether it averages the weights."""
        return self.config.ema_decay is not None

    @torch.no_grad()
    def restart_averages(self) -> None:
        """Sets the averages to the weights, if there are any averages."""
        for weight, average in self._averages():
            average.copy_(weight)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchanges the values of weights and averages; a second call restores both, bit for bit."""
        for weight, average in self._averages():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's shard of each weight with that of its average; empty without averages."""
        if not self.has_averages:
            return []
        return [(local(p), local(self.state[p][AVERAGE])) for p in self.parameters.values()]

    def _first_average(self, parameter: Tensor) -> dict[str, Tensor]:
        return {AVERAGE: parameter.detach().clone()} if self.has_averages else {}

    def _update_averages(self, accepted: Tensor) -> None:
        """Moves the averages towards the weights, unless the step was skipped: `accepted`, 0-d bool."""
        if self.config.ema_decay is not None:
            share = (1 - self.config.ema_decay) * accepted
            for weight, average in self._averages():
                average.lerp_(weight, share.to(average.dtype))

    @property
    def _backend(self) -> MultiTensor:
        assert self._kernels is not None, "make_moments comes first"
        return self._kernels

    def _local_norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """The L2 norm of all these gradients as one vector, 0-d."""
        return self._backend.sum_of_squares(list(gradients.values()), [1.0] * len(gradients)).sqrt()

    def _is_matrix(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2

    def _update_all(self, scale: Tensor, accepted: Tensor) -> None:
        """Updates every parameter that has a gradient, at its group's learning rate, with gradients times `scale`.

        `scale` and `accepted` are 0-d; nothing changes unless `accepted` is true.
        """
        config = self.config
        number = (self._steps_taken.to(scale.device) + 1).double()
        mean_share, square_share = (1 - torch.pow(beta, number) for beta in (config.beta1, config.beta2))
        correction = (1 / square_share).float()
        scale = torch.where(accepted.to(scale.device), scale, torch.nan)
        for group in self.param_groups:
            rate, updated = group["lr"], [p for p in group["params"] if p.grad is not None]
            if updated:
                step = AdamWStep(
                    decay=1 - rate * group["weight_decay"],
                    size=(rate / mean_share).float(),
                    correction=correction,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                )
                means, squares = ([local(self.state[p][name]) for p in updated] for name in MOMENTS)
                gradients = [local(p.grad) for p in updated]
                self._backend.adamw_([local(p) for p in updated], gradients, means, squares, scale, step)


class PartitionedAdamW(AdamW):
    """AdamW for DeepSpeed, which replaces the parameters by flat partitions and clips gradients by itself.

    Call `make_moments` for the partitions. `before_step` begins a step; DeepSpeed may then call `step` several
    times, each for different partitions, or not at all; `after_step` ends the step. DeepSpeed stores the global
    shape of a parameter that it has partitioned as `ds_shape`.
    """

    _has_whole_parameters = False

    _is_accepted: Callable[[], Tensor] | None = None  # until the first step begins

    def before_step(self, learning_rate: float, is_accepted: Callable[[], Tensor]) -> None:
        """Begins a step at this learning rate.

        `is_accepted()` is called once the gradient norm is known; if it returns false, 0-d bool, the step changes
        nothing.
        """
        self._is_accepted = is_accepted
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # as the engine calls it
        """Updates the partitions that have gradients. DeepSpeed also calls this before the first step."""
        if self._is_accepted is not None and self.state:
            device = next(iter(self.state)).device
            self._update_all(torch.ones((), device=device), self._is_accepted())

    def after_step(self) -> None:
        """Counts the step, unless it was skipped."""
        assert self._is_accepted is not None
        self._steps_taken += self._is_accepted()

    def _is_matrix(self, parameter: nn.Parameter) -> bool:
        return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
