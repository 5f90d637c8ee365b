"""What a checkpoint holds beside tensors, and the check that it is all there and of the right kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek_v3.utils.checkpointing.errors import REPAIR, validation_problems
from deepseek_v3.utils.errors import CheckpointError


def _of_tensors_alone(rest: dict[str, Any]) -> dict[str, Any]:
    if rest:
        raise ValueError(f"has {', '.join(map(repr, sorted(rest)))}, which should be tensors")
    return rest


Natural = Annotated[int, Field(ge=0)]
Tensors = Annotated[dict[str, Any], AfterValidator(_of_tensors_alone)]  # as `nesting.split` leaves a dict of them


class _Entries(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _OptimizerEntries(_Entries):
    num_steps: Natural
    exp_avg: Tensors
    exp_avg_sq: Tensors


class ModelEntries(_Entries):
    """What a model needs to run; entries of its training may be there, and are left alone."""

    format: int
    config: dict[str, Any]
    model: Tensors
    tokenizer: str
    step: Natural
    tokens: Natural
    optimizer: Any = None
    random: Any = None
    corpus: Any = None
    skipped_in_a_row: Natural = 0


class RunEntries(ModelEntries):
    """What a run needs to go on."""

    optimizer: _OptimizerEntries
    random: Tensors
    corpus: Annotated[list[str], Field(min_length=1)]

    @model_validator(mode="after")
    def _no_more_updates_than_steps(self) -> RunEntries:
        if self.optimizer.num_steps > self.step:
            raise ValueError(f"optimizer.num_steps is {self.optimizer.num_steps}, more than step {self.step}")
        return self


def check_entries(kind: type[ModelEntries], plain: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for plain entries that are missing, unknown or of a wrong type: all in one message."""
    try:
        kind.model_validate(plain)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {validation_problems(error)}; {REPAIR}") from None
