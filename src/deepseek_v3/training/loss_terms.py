"""Loss terms that other packages add to the training objective.

A term is a function from `LossInputs` to a 0-d tensor: the sum over all positions whose target counts. Training
divides it by the number of such targets in the batch, exactly as it does for the main loss, so that the value does
not depend on micro-batches or ranks, and adds it to the total with its weight. A package offers a term as an entry
point in its `pyproject.toml`:

    [project.entry-points."deepseek_v3.loss_terms"]
    z_loss = "my_package.losses:z_loss"

where `my_package/losses.py` holds

    def z_loss(inputs: LossInputs) -> Tensor:
        logits_BSV = F.linear(inputs.hidden_BSD, inputs.head_weight_VD.to(inputs.hidden_BSD.dtype)).float()
        return inputs.sum_over_targets(logits_BSV.logsumexp(-1).square())

A Python program may call `register_loss_term("z_loss", z_loss)` instead. A run uses the term when its config says
`training.loss_terms: {z_loss: 1.0e-4}`, and logs its value before weighting as the metric `loss_terms/z_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.ops.cross_entropy import IGNORED
from deepseek_v3.utils.entry_points import entry_point_names, load_entry_point
from deepseek_v3.utils.errors import ConfigError

ENTRY_POINT_GROUP = "deepseek_v3.loss_terms"


class LossInputs(NamedTuple):
    """The tensors of one micro-batch that a loss term may use.

    `hidden_BSD`: the final states that the head reads, in the compute dtype. `targets_BS`: int64, the next tokens,
    IGNORED if a target does not count. `head_weight_VD`: the weight of the output head.
    """

    hidden_BSD: Tensor
    targets_BS: Tensor
    head_weight_VD: Tensor
    config: ModelConfig

    def sum_over_targets(self, values_BS: Tensor) -> Tensor:
        """The sum of `values_BS` over the positions whose target counts, 0-d."""
        return values_BS.masked_fill(self.targets_BS == IGNORED, 0).sum()


LossFunction = Callable[[LossInputs], Tensor]


class LossTerm(NamedTuple):
    """A loss term of a run: `function`, whose value is added to the total with `weight`."""

    name: str
    weight: float
    function: LossFunction


_registered: dict[str, LossFunction] = {}


def register_loss_term(name: str, function: LossFunction) -> None:
    """Adds a loss term for this process. Raises ValueError if the name belongs to another function."""
    if _registered.get(name, function) is not function:
        raise ValueError(f"loss term {name!r}: the name is taken; choose another")
    _registered[name] = function


def select_loss_terms(weights: Mapping[str, float]) -> tuple[LossTerm, ...]:
    """Finds the loss terms that `training.loss_terms` of a config names, with their weights, sorted by name.

    Raises ConfigError for an unknown name, for one that several packages offer, and for an entry point that cannot
    be loaded or is not a function.
    """
    return tuple(LossTerm(name, weight, _find(name)) for name, weight in sorted(weights.items()))


def _find(name: str) -> LossFunction:
    if name in _registered:
        return _registered[name]
    field, offered = f"training.loss_terms.{name}", entry_point_names(ENTRY_POINT_GROUP)
    if name not in offered:
        known = ", ".join(sorted({*_registered, *offered})) or "none"
        raise ConfigError(
            f"{field}: there is no loss term of this name; known: {known}; install the package that provides it, "
            "or remove the field"
        )
    function, entry_point = load_entry_point(ENTRY_POINT_GROUP, name, field)
    if not callable(function):
        raise ConfigError(f"{entry_point} is not a function")
    return function
