"""The base class of every section of a configuration, and the types of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deepseek_v3.utils.numbers import MAX_COUNT, MAX_TOKENS, parse_count, parse_number, parse_size
from deepseek_v3.utils.text import format_value


@dataclass(frozen=True)
class RenamedFrom:
    """Metadata of a field: its former name. A file that uses it is refused; the message gives the present name."""

    name: str


class Section(BaseModel):
    """A frozen group of fields. Unknown fields are refused, and so are values of another type than the field's.

    Numbers use the types below, which also read numbers as people write them: `1e6`, `500k`, `10,000,000`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def field_names(cls) -> list[str]:
        """The names that a file may use in this section, sorted."""
        return sorted(cls.model_fields)

    @classmethod
    def subsection(cls, name: str) -> type[Section] | None:
        """The class of the section that the field `name` holds; None if it holds a plain value."""
        field = cls.model_fields.get(name)
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)

    @classmethod
    def renamed_fields(cls) -> dict[str, str]:
        """The present name of each renamed field, by its former name."""
        return {
            metadata.name: name
            for name, field in cls.model_fields.items()
            for metadata in field.metadata
            if isinstance(metadata, RenamedFrom)
        }

    @classmethod
    def with_present_names(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Renames fields that a former version stored, here and in inner sections, to their present names."""
        renamed = cls.renamed_fields()
        present = {renamed.get(name, name): value for name, value in fields.items()}
        for name, value in present.items():
            inner = cls.subsection(name)
            if inner is not None and isinstance(value, Mapping):
                present[name] = inner.with_present_names(value)
        return present


def text_parser(parse: Callable[[str], float]) -> Callable[[Any], Any]:
    """Returns a validator that parses text with `parse` and passes on values of other types."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"found {format_value(value)}: {error}") from None

    return read


def _whole(value: Any) -> Any:
    """Turns a float without a fraction into an integer; returns other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[
    int,
    BeforeValidator(text_parser(parse_count), json_schema_input_type=int | str),
    BeforeValidator(_whole),
    Field(ge=-MAX_COUNT, le=MAX_COUNT),
]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
TokenCount = Annotated[PositiveInt, Field(le=MAX_TOKENS)]
ByteSize = Annotated[
    int,
    BeforeValidator(text_parser(parse_size), json_schema_input_type=int | str),
    BeforeValidator(_whole),
    Field(ge=1, le=MAX_COUNT),
]

Real = Annotated[float, BeforeValidator(text_parser(parse_number), json_schema_input_type=float | str)]
PositiveFloat = Annotated[Real, Field(gt=0)]
NonNegativeFloat = Annotated[Real, Field(ge=0)]
Fraction = Annotated[Real, Field(ge=0, le=1)]


# The share of its documents that a stage may drop before the run warns.
DropWarning = Annotated[Real, Field(gt=0, le=1), RenamedFrom("alarm")]


class StageConfig(Section):
    """The options that every stage of the data pipeline has.

    `max_drop_warning`: the share of its documents that the stage may drop before the run warns.
    """

    max_drop_warning: DropWarning = 0.5
