"""What every section of a configuration has in common, and the types of its numbers.

FOLDED: What the options of every stage of the data pipeline have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deepseek_v3.utils.numbers import MAX_COUNT, parse_count, parse_number, parse_size
from deepseek_v3.utils.text import format_value


class Section(BaseModel):
    """A frozen group of fields: unknown names are refused, and so are values of another kind than the field's.

    Numbers are of the types below, which also take them as people write them: `1e6`, `500k`, `10,000,000`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def read_with(parse: Callable[[str], float]) -> Callable[[Any], Any]:
    """A validator that reads text with `parse` and leaves all else as it is."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"found {format_value(value)}: {error}") from None

    return read


def _whole(value: Any) -> Any:
    """A float that is a whole number as an integer; all else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[
    int,
    BeforeValidator(read_with(parse_count), json_schema_input_type=int | str),
    BeforeValidator(_whole),
    Field(ge=-MAX_COUNT, le=MAX_COUNT),
]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
# Bytes.
Size = Annotated[
    int,
    BeforeValidator(read_with(parse_size), json_schema_input_type=int | str),
    BeforeValidator(_whole),
    Field(ge=1, le=MAX_COUNT),
]

Real = Annotated[float, BeforeValidator(read_with(parse_number), json_schema_input_type=float | str)]
PositiveFloat = Annotated[Real, Field(gt=0)]
NonNegativeFloat = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]


class StageConfig(Section):
    """`alarm`: the share of its documents that a stage may remove before the run warns of it."""

    alarm: Annotated[Real, Field(gt=0, le=1)] = 0.5
