"""The data pipeline's YAML file: what to read, which stages to run, what to write."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from deepseek_v3.config.base import ByteSize, PositiveFloat, PositiveInt, Real, RenamedFrom, Section, StageConfig
from deepseek_v3.config.data_config import Address, LocalPath
from deepseek_v3.config.deduplication_config import DeduplicationConfig, ExactDeduplicationConfig
from deepseek_v3.config.extensions import filter_names, find_filter, reserve_names
from deepseek_v3.config.filter_config import (
    CleaningConfig,
    DecontaminationConfig,
    HeuristicsConfig,
    LanguageConfig,
    MixingConfig,
    PiiConfig,
    QualityConfig,
)
from deepseek_v3.utils.text import format_value

BUILT_IN_STAGES = (
    "preliminary_cleaning",
    "exact_deduplication",
    "deduplication",
    "heuristic_filters",
    "language",
    "quality_filtering",
    "pii",
    "decontamination",
    "mixing",
)


def _check_stage(name: str) -> str:
    """Raises ValueError for a name that is neither a built-in stage nor one of another package."""
    if name in BUILT_IN_STAGES or find_filter(name) is not None:
        return name
    known = ", ".join([*BUILT_IN_STAGES, *filter_names()])
    raise ValueError(f"found {format_value(name)}: expected one of {known}")


StageName = Annotated[str, AfterValidator(_check_stage)]


class PreprocessConfig(Section):
    """One run of the data pipeline.

    Stages: `pipeline` names them in the order in which they run; the section with a stage's name holds its options.
    Other packages may add stages (`config/extensions.py`); the section of such a stage is an instance of its class
    of options, an attribute of this object like the built-in ones.

    Input: `text_field` and `id_field` name fields of a record (`a.b` is the field `b` of the object `a`). Without
    `text_field`, the text is found by the usual names, such as `text` and `content`. A record may have
    `max_record_size` bytes. `max_quarantine_warning` is the share of records that may be unreadable before the run
    warns. `previous_runs` are the `output_dir`s of finished runs that kept their keys:
    their documents count as already seen by the deduplication.

    Output: one file holds up to about `shard_size` bytes of text. `keep_keys` stores the deduplication's keys in
    `keys/` for later runs. `tokenizer` (a tokenizer.json) counts the tokens; without one, `bytes_per_token`
    estimates them.

    Resources do not change the output: `workers` (None: one per core), `memory` for all workers together (None:
    half of the machine), `engine` and `ray_address` (the cluster to join). The input is cut into work units of
    about `work_unit_size` bytes on disk, and each is read in parts of about that many bytes of text; an interrupted
    run repeats only the unfinished parts.
    """

    # Unknown fields are sections of other packages, or are refused by `_check_extensions`.
    model_config = ConfigDict(extra="allow")

    input_path: Address | tuple[Address, ...]
    output_dir: LocalPath
    pipeline: tuple[StageName, ...]
    text_field: Annotated[str, Field(min_length=1)] | None = None
    id_field: Annotated[str, Field(min_length=1)] = "id"
    max_record_size: ByteSize = 2**26
    max_quarantine_warning: Annotated[Real, Field(gt=0, le=1)] = 0.01
    output_format: Literal["parquet", "jsonl", "jsonl.zst", "jsonl.gz"] = "parquet"
    shard_size: ByteSize = 2**26
    work_unit_size: Annotated[ByteSize, RenamedFrom("piece_size")] = 2**25
    engine: Literal["local", "ray"] = "local"
    ray_address: Address | None = None
    workers: Annotated[PositiveInt, Field(le=4096)] | None = None
    memory: ByteSize | None = None
    keep_keys: bool = False
    previous_runs: Annotated[tuple[LocalPath, ...], RenamedFrom("earlier")] = ()
    tokenizer: LocalPath | None = None
    bytes_per_token: Annotated[PositiveFloat, Field(ge=0.01, le=10_000)] = 4.0
    preliminary_cleaning: CleaningConfig = CleaningConfig()
    exact_deduplication: ExactDeduplicationConfig = ExactDeduplicationConfig()
    deduplication: DeduplicationConfig = DeduplicationConfig()
    heuristic_filters: HeuristicsConfig = HeuristicsConfig()
    language: LanguageConfig = LanguageConfig()
    quality_filtering: QualityConfig = QualityConfig()
    pii: PiiConfig = PiiConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    mixing: MixingConfig = MixingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PreprocessConfig:
        twice = sorted({name for name in self.pipeline if self.pipeline.count(name) > 1})
        if twice:
            raise ValueError(f"pipeline: {', '.join(twice)} is named twice, expected each stage once")
        if "mixing" in self.pipeline and self.pipeline[-1] != "mixing":
            raise ValueError("pipeline: mixing repeats documents, so it must be the last stage")
        if self.previous_runs and not {"exact_deduplication", "deduplication"} & {*self.pipeline}:
            raise ValueError("previous_runs: needs exact_deduplication or deduplication in the pipeline")
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError("ray_address: needs engine: ray")
        return self

    @model_validator(mode="after")
    def _check_extensions(self, info: ValidationInfo) -> PreprocessConfig:
        """Checks the sections of stages from other packages; those of `pipeline` without a section get defaults."""
        sections = self.__pydantic_extra__
        assert sections is not None, "extra fields are allowed"
        for name in self.pipeline:
            if name not in BUILT_IN_STAGES:
                sections.setdefault(name, {})
        problems: list[Any] = []
        for name, value in sections.items():
            try:
                sections[name] = _check_extension(name, value, from_json=info.mode == "json")
            except ValidationError as error:
                problems += [_inside(name, dict(problem)) for problem in error.errors()]
        if problems:
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    @classmethod
    def field_names(cls) -> list[str]:
        return sorted([*cls.model_fields, *filter_names()])

    @classmethod
    def subsection(cls, name: str) -> type[Section] | None:
        extension = None if name in cls.model_fields else find_filter(name)
        return extension.options if extension else super().subsection(name)


reserve_names(PreprocessConfig.model_fields)


def _check_extension(name: str, value: Any, from_json: bool) -> StageConfig:
    """The section of a stage from another package. Raises ValidationError."""
    extension = find_filter(name)
    if extension is None:
        unknown: Any = {"type": "extra_forbidden", "loc": (), "input": value}
        raise ValidationError.from_exception_data(name, [unknown])
    if from_json:
        return extension.options.model_validate_json(json.dumps(value))
    return extension.options.model_validate(value)


def _inside(section: str, problem: dict[str, Any]) -> dict[str, Any]:
    """A problem in a section, in the form that `ValidationError.from_exception_data` takes."""
    return {
        "type": problem["type"],
        "loc": (section, *problem["loc"]),
        "input": problem["input"],
        "ctx": problem.get("ctx", {}),
    }
