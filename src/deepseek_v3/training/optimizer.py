"""AdamW (arXiv:1711.05101) as DeepSeek-V3 runs it: float32 master weights, moments that may be bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_v3.config.train_config import OptimizerConfig

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


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay on matrices only, and clipping by the global norm folded into the update.

    Parameters and gradients are float32. `step` reads no value back from the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> None:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, {"lr": config.learning_rate})
        self.config = config
        self.num_steps = 0
        moments = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        for parameter in parameters:
            self.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter, dtype=moments),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=moments),
            }

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:  # type: ignore[override]  # the schedule owns the rate
        """Clips, updates every parameter that has a gradient, and returns the norm before clipping (0-d)."""
        config = self.config
        self.num_steps += 1
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        scale = (config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        step_size = norm.new_full((), learning_rate / (1 - config.beta1**self.num_steps))
        square_correction = norm.new_full((), 1 / (1 - config.beta2**self.num_steps))
        for group in self.param_groups:
            group["lr"] = learning_rate
            decay = norm.new_full((), 1 - learning_rate * group["weight_decay"])
            scalars = UpdateScalars(scale, decay, step_size, square_correction)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_one(parameter, scalars)
        return norm

    def _update_one(self, parameter: nn.Parameter, scalars: UpdateScalars) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        tensors = [t.view(-1) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        if parameter.is_cuda:
            self._apply(_fused_update(), tensors, scalars)
            return
        for pieces in zip(*(tensor.split(_CPU_PIECE) for tensor in tensors), strict=True):
            self._apply(_update, pieces, scalars)

    def _apply(self, update: Callable[..., None], tensors: Sequence[Tensor], scalars: UpdateScalars) -> None:
        """Runs `update` on a parameter, its gradient, mean and square, or on a piece of each."""
        update(*tensors, scalars, (self.config.beta1, self.config.beta2), self.config.eps)

    def state_dict(self) -> dict[str, Any]:
        """The moments in parameter order and the number of steps taken."""
        return {"num_steps": self.num_steps, "moments": [dict(self.state[p]) for p in self._ordered()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, for the same parameters in the same order."""
        self.num_steps = state_dict["num_steps"]
        for parameter, saved in zip(self._ordered(), state_dict["moments"], strict=True):
            for name, moment in self.state[parameter].items():
                moment.copy_(saved[name])

    def _ordered(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
