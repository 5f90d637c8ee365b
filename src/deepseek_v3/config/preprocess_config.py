"""The data pipeline's YAML file: what to read, which stages to run, what to write."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deepseek_v3.config.base import PositiveFloat, PositiveInt, Section, Size
from deepseek_v3.config.data_config import Address, AnyPath
from deepseek_v3.config.deduplication_config import DeduplicationConfig, ExactDeduplicationConfig
from deepseek_v3.config.filter_config import (
    CleaningConfig,
    DecontaminationConfig,
    HeuristicsConfig,
    LanguageConfig,
    MixingConfig,
    PiiConfig,
    QualityConfig,
)

StageName = Literal[
    "preliminary_cleaning",
    "exact_deduplication",
    "deduplication",
    "heuristic_filters",
    "language",
    "quality_filtering",
    "pii",
    "decontamination",
    "mixing",
]


class PreprocessConfig(Section):
    """One run of the data pipeline.

    `pipeline` names the stages in the order in which they run; the section of a stage's name holds its options.
    What is read: `text_field` (dots lead into objects) and `id_field` of each record, of `max_record_size` at most.
    What the run may use: `workers` (None: every core), `memory` for all of them together (None: half of the
    machine), `engine` (`ray_address`: a cluster to join). None of these changes what comes out.
    Pieces of `piece_size` bytes of text are the units of work and of resuming; `shard_size` is the text of one
    output file. `keep_keys` leaves the deduplication's keys in `keys/`, and `earlier` names finished runs with such
    keys: what they hold counts as seen. Tokens are counted with `tokenizer` (a tokenizer.json), or without one
    estimated from `bytes_per_token`.
    """

    input_path: Address | tuple[Address, ...]
    output_dir: AnyPath
    pipeline: tuple[StageName, ...]
    text_field: Annotated[str, Field(min_length=1)] = "text"
    id_field: Annotated[str, Field(min_length=1)] = "id"
    max_record_size: Size = 2**26
    output_format: Literal["parquet", "jsonl", "jsonl.zst", "jsonl.gz"] = "parquet"
    shard_size: Size = 2**26
    piece_size: Size = 2**25
    engine: Literal["local", "ray"] = "local"
    ray_address: Address | None = None
    workers: Annotated[PositiveInt, Field(le=4096)] | None = None
    memory: Size | None = None
    keep_keys: bool = False
    earlier: tuple[AnyPath, ...] = ()
    tokenizer: AnyPath | None = None
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
            raise ValueError(f"pipeline: {', '.join(twice)} stands there twice, expected each stage once")
        if "mixing" in self.pipeline and self.pipeline[-1] != "mixing":
            raise ValueError("pipeline: mixing repeats documents, so it must be the last stage")
        if self.earlier and not {"exact_deduplication", "deduplication"} & {*self.pipeline}:
            raise ValueError("earlier: needs exact_deduplication or deduplication in the pipeline")
        if self.ray_address is not None and self.engine != "ray":
            raise ValueError("ray_address: needs engine: ray")
        return self
