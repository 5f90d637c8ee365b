"""AdamW (arXiv:1711.05101) as DeepSeek-V3 runs it: float32 master weights, moments that may be bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepseek_v3.config.train_config import OptimizerConfig
from deepseek_v3.ops.multi_tensor import AdamWStep, adamw_, sum_of_squares

MOMENTS = ("exp_avg", "exp_avg_sq")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which shares its memory: the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def norm_of_all(gradients: Mapping[str, Tensor]) -> Tensor:
    """The norm of all these gradients as one vector, 0-d."""
    return sum_of_squares(list(gradients.values()), [1.0] * len(gradients)).sqrt()


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
            rate, updated = group["lr"], [p for p in group["params"] if p.grad is not None]
            if updated:
                step = AdamWStep(
                    decay=1 - rate * group["weight_decay"],
                    size=rate / mean_share,
                    correction=1 / square_share,
                    beta1=config.beta1,
                    beta2=config.beta2,
                    eps=config.eps,
                )
                means, squares = ([local(self.state[p][name]) for p in updated] for name in MOMENTS)
                gradients = [local(p.grad) for p in updated]
                adamw_([local(p) for p in updated], gradients, means, squares, scale, step)

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

    `make_moments` makes those of the partitions. `before_step` says when a step begins; the engine may then call
    `step` several times, each for other partitions. Where DeepSpeed has shared out a parameter already, `ds_shape`
    is the shape of the whole.
    """

    _has_whole_parameters = False

    def before_step(self, learning_rate: float) -> None:
        """Counts a step, and sets its learning rate."""
        self.num_steps += 1
        for group in self.param_groups:
            group["lr"] = learning_rate

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # as the engine calls it
        """Updates the partitions that have gradients; the engine also calls it before there is any step."""
        if self.num_steps and self.state:
            device = next(iter(self.state)).device
            self._update_all(torch.ones((), device=device))

    def _is_matrix(self, parameter: nn.Parameter) -> bool:
        return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2
