"""AdamW (arXiv:1711.05101) as DeepSeek-V3 runs it: float32 master weights, moments that may be bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek_v3.config.train_config import OptimizerConfig

MOMENTS = ("exp_avg", "exp_avg_sq")

# Numbers updated at a time on a CPU: what the update makes on its way then stays in the caches, and small.
_CPU_PIECE = 1 << 18


class UpdateScalars(NamedTuple):
    """What changes between steps, each a 0-d tensor on the device so that compiled code stays the same.

    `decay` = 1 - lr · weight decay; `step_size` = lr / (1 - β1^t); `square_correction` = 1 / (1 - β2^t).
    """

    gradient_scale: Tensor
    decay: Tensor
    step_size: Tensor
    square_correction: Tensor


def _update(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    scalars: UpdateScalars,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One parameter's step, in place."""
    gradient = gradient.float() * scalars.gradient_scale
    new_mean = mean.float() * betas[0] + gradient * (1 - betas[0])
    new_square = square.float() * betas[1] + gradient.square() * (1 - betas[1])
    direction = new_mean / ((new_square * scalars.square_correction).sqrt() + eps)
    parameter.copy_(parameter * scalars.decay - direction * scalars.step_size)
    mean.copy_(new_mean)
    square.copy_(new_square)


@cache
def _fused_update() -> Callable[..., None]:
    """The same in one kernel; made at first use, because importing the compiler takes seconds."""
    return torch.compile(_update, dynamic=True, fullgraph=True)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which shares its memory: the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_of_all(gradients: Mapping[str, Tensor]) -> Tensor:
    """The norm of all these gradients as one vector, 0-d."""
    return nn.utils.get_total_norm(list(gradients.values()))


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay on matrices only, and clipping by the global norm folded into the update.

    Parameters and gradients are float32, whole or sharded (DTensor): each rank updates what it holds. `total_norm`
    makes one norm of the gradients that a rank holds, by name. `step` reads no value back from the device.
    """

    _has_whole_parameters = True

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimizerConfig,
        total_norm: Callable[[Mapping[str, Tensor]], Tensor] = norm_of_all,
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
        self.num_steps = 0
        self._total_norm = total_norm
        self.moment_dtype = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        if self._has_whole_parameters:
            self.make_moments(parameters.values())

    def make_moments(self, parameters: Iterable[Tensor]) -> None:
        """Makes the moments of those of these parameters, or parts of them, that have none yet."""
        for parameter in parameters:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter, dtype=self.moment_dtype) for name in MOMENTS}
                self.state[parameter] = moments

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:  # type: ignore[override]  # the schedule owns the rate
        """Clips, updates every parameter that has a gradient, and returns the norm before clipping (0-d)."""
        config = self.config
        self.num_steps += 1
        gradients = {name: local(p.grad) for name, p in self.parameters.items() if p.grad is not None}
        norm = self._total_norm(gradients)
        scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._update_all(scale)
        return norm

    def _is_matrix(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2

    def _update_all(self, scale: Tensor) -> None:
        """Updates every parameter that has a gradient, at its group's rate, with gradients times `scale` (0-d)."""
        config = self.config
        mean_share, square_share = 1 - config.beta1**self.num_steps, 1 - config.beta2**self.num_steps
        for group in self.param_groups:
            rate = group["lr"]
            decay = scale.new_full((), 1 - rate * group["weight_decay"])
            step_size, correction = scale.new_full((), rate / mean_share), scale.new_full((), 1 / square_share)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_one(parameter, UpdateScalars(scale, decay, step_size, correction))

    def _update_one(self, parameter: nn.Parameter, scalars: UpdateScalars) -> None:
        assert parameter.grad is not None
        moments = self.state[parameter]
        whole = (parameter, parameter.grad, *(moments[name] for name in MOMENTS))
        tensors = [local(tensor).view(-1) for tensor in whole]
        if tensors[0].is_cuda:
            self._apply(_fused_update(), tensors, scalars)
            return
        for pieces in zip(*(tensor.split(_CPU_PIECE) for tensor in tensors), strict=True):
            self._apply(_update, pieces, scalars)

    def _apply(self, update: Callable[..., None], tensors: Sequence[Tensor], scalars: UpdateScalars) -> None:
        """Runs `update` on a parameter, its gradient, mean and square, or on a piece of each."""
        update(*tensors, scalars, (self.config.beta1, self.config.beta2), self.config.eps)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, and for each moment its values by the parameters' names."""
        moments = {
            moment: {name: self.state[parameter][moment] for name, parameter in self.parameters.items()}
            for moment in MOMENTS
        }
        return {"num_steps": self.num_steps, **moments}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, for parameters of the same names."""
        self.num_steps = state_dict["num_steps"]
        for moment in MOMENTS:
            for name, parameter in self.parameters.items():
                self.state[parameter][moment].copy_(state_dict[moment][name])


class PartitionedAdamW(AdamW):
    """The same for an engine that puts flat partitions in the parameters' place, and clips by itself.

    `before_step` says when a step begins; the engine may then call `step` several times, each for other partitions.
    Their moments are made by `make_moments` or when they first have a gradient. Where DeepSpeed has shared out a
    parameter already, `ds_shape` is the shape of the whole.
    """

    _has_whole_parameters = False

    def before_step(self, learning_rate: float) -> None:
        """Counts a step, and sets its learning rate."""
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # as the engine calls it
        """Updates the partitions that have gradients; before the first step, only makes their moments."""
        self.make_moments(p for group in self.param_groups for p in group["params"] if p.grad is not None)
        if self.num_steps and self.state:
            device = next(iter(self.state)).device
            self._update_all(torch.ones((), device=device))

    def _is_matrix(self, parameter: nn.Parameter) -> bool:
        return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
