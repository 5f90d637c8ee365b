"""The section `training.optimizer` of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, model_validator

from deepseek_v3.config.base import NonNegativeFloat, PositiveFloat, Real, Section

# The validation context of a config that a checkpoint stores.
STORED = {"stored": True}

_SIGNIFICANT_BITS = {"bfloat16": 8, "float32": 24}
_LARGEST_MOMENT_ERROR = 0.1


class OptimizerConfig(Section):
    """AdamW. Weight decay applies to matrices only; moments are bfloat16 by default, as in the report (§3.3.2).

    A step moves a moment by (1 - β) of its distance to the gradient. Rounding to b significant bits discards a move
    below 2^-b of the moment, so the moment can stay 2^-b / (1 - β) of its value away from the exact one: 8% for
    bfloat16 at β = 0.95, more than its whole value at 0.999. A β whose error exceeds 10% is refused, except in the
    config of a checkpoint: its model may still be used, or its run resumed with other moments.

    With `ema_decay` the run also keeps an exponential moving average of its weights, in float32, as the report does
    to judge a model before its learning rate has decayed (§3.2.3); null: none.
    """

    learning_rate: PositiveFloat
    beta1: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[Real, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[PositiveFloat, Field(ge=1e-30)] = 1e-8  # 0 in float32 would divide gradients of 0 by 0
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    moments: Literal["bfloat16", "float32"] = "bfloat16"
    ema_decay: Annotated[Real, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _moments_can_follow(self, info: ValidationInfo) -> OptimizerConfig:
        if info.context == STORED:
            return self
        smallest_move = 2.0 ** -_SIGNIFICANT_BITS[self.moments]
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            error = smallest_move / (1 - beta)
            if error > _LARGEST_MOMENT_ERROR:
                advice = "set moments: float32, or lower it" if self.moments == "bfloat16" else "lower it"
                raise ValueError(
                    f"{name} = {beta} with moments in {self.moments}, whose rounding would keep a moment up to "
                    f"{error:.0%} of itself from its true value; expected {name} at most "
                    f"{1 - smallest_move / _LARGEST_MOMENT_ERROR:.7g} and so {_LARGEST_MOMENT_ERROR:.0%}: {advice}"
                )
        return self

    @property
    def moment_bytes(self) -> int:
        """Bytes per number of a moment."""
        return 2 if self.moments == "bfloat16" else 4

    @property
    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps for each weight: two moments, and an average if there is one."""
        return 2 * self.moment_bytes + (0 if self.ema_decay is None else 4)
