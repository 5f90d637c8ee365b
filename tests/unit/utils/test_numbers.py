"""Numbers as people write them: in configurations, in overrides and on command lines."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from deepseek_v3.config.base import Section
from deepseek_v3.config.data_config import CorpusConfig
from deepseek_v3.config.loading import load_config, load_section
from deepseek_v3.config.model_config import RopeScaling
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.config.train_config import BatchRampConfig, RunConfig
from deepseek_v3.inference.sampling import SamplingConfig
from deepseek_v3.planning.hardware import Device
from deepseek_v3.utils.errors import ConfigError, GenerationError
from deepseek_v3.utils.numbers import parse_count, parse_number, parse_size
from deepseek_v3.utils.text import format_value
from helpers.runs import dsv3, message_of, write_run


class Kind(Enum):
    FAST = "fast"


WAYS = [
    ("12", 12),
    ("1e6", 10**6),
    ("1E+6", 10**6),
    ("3.75B", 3_750_000_000),
    ("500k", 500_000),
    ("2.1T", 2_100_000_000_000),
    ("10_000_000", 10**7),
    ("10,000,000", 10**7),
    ("1,234.5k", 1_234_500),
    ("-5", -5),
    ("8.0", 8),
    ("1e18", 10**18),
]
NO_WHOLE_NUMBER = ["", "k", "1.5", "3,8", "1,0000", "1e-4", "0x10", "ten", "1 2", "1__0", "_1", "1e5000", "9" * 65]


@pytest.mark.parametrize(("text", "number"), WAYS)
def test_whole_numbers_in_every_notation(text: str, number: int) -> None:
    assert parse_count(text) == parse_number(text) == number


def test_every_digit_of_a_whole_number_is_kept() -> None:
    assert parse_count("123456789012345678") == 123456789012345678


@pytest.mark.parametrize("text", NO_WHOLE_NUMBER)
def test_an_invalid_whole_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a whole number"):
        parse_count(text)


@pytest.mark.parametrize("text", ["", "x", "1,5", "--1", "1e", "5 %"])
def test_an_invalid_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number"):
        parse_number(text)


def test_a_fraction_of_a_byte_is_refused() -> None:
    assert parse_size("1.5kB") == 1500
    for text in ("1.5", "0.5B"):
        with pytest.raises(ValueError, match="whole number of bytes"):
            parse_size(text)


def _fields(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        inner = [kind for kind in kinds if issubclass(kind, BaseModel)]
        for kind in inner:
            yield from _fields(kind, f"{path}{name}.")
        if not inner:
            yield f"{path}{name}", field


def _answer(field: FieldInfo, value: Any) -> Any:
    """The value that the field parses, or the types of its validation errors."""
    annotated: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(annotated, config=Section.model_config).validate_python(value)
    except ValidationError as error:
        return [problem["type"] for problem in error.errors()]


ROOTS = (RunConfig, PreprocessConfig, Device)
FIELDS = [(f"{root.__name__}.{path}", field) for root in ROOTS for path, field in _fields(root)]


def test_every_numeric_field_reads_every_notation() -> None:
    numeric = set()
    for value, text in ((20, "2e1"), (300, "3e2"), (0.5, "5e-1")):
        for path, field in FIELDS:
            if _answer(field, value) == value:
                numeric.add(path)
                assert _answer(field, text) == value, path
    assert len(numeric) > 110


def test_no_field_of_whole_numbers_takes_a_fraction() -> None:
    whole = {
        path: field
        for path, field in FIELDS
        for n in (20, 300)
        if _answer(field, n) == n and isinstance(_answer(field, n + 0.5), list)
    }
    tokens = {"RunConfig.training.total_tokens", "PreprocessConfig.mixing.tokens"}
    assert tokens <= whole.keys()
    assert len(whole) > 60
    for path, field in whole.items():
        assert isinstance(_answer(field, "20.5"), list), path


def test_fields_of_every_section_are_covered() -> None:
    paths = {path for path, _ in FIELDS}
    for section, prefix in (
        (CorpusConfig, "RunConfig.data.corpus"),
        (RopeScaling, "RunConfig.model.rope_scaling"),
        (BatchRampConfig, "RunConfig.training.batch_ramp"),
    ):
        assert {f"{prefix}.{name}" for name in section.model_fields} <= paths


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1,000,000", "1000k", "1M", "'1e6'", "1.0e6", "1000000.0"])
def test_overrides_and_files_read_the_same_counts(tmp_path: Path, text: str) -> None:
    path = write_run(tmp_path)
    assert load_config(path, [f"training.total_tokens={text}"]).training.total_tokens == 10**6
    assert load_config(path, [f"training.evaluation.tokens={text}"]).training.evaluation.tokens == 10**6
    pipeline = tmp_path / "data.yaml"
    pipeline.write_text(
        f"input_path: a\noutput_dir: b\npipeline: []\nwork_unit_size: {text.replace('M', 'MB')}\n"
        f"mixing:\n  tokens: {text}\n  weights: {{a: {text.replace(',', '_')}}}\n",
        encoding="utf-8",
    )
    config = load_section(PreprocessConfig, pipeline)
    assert (config.work_unit_size, config.mixing.tokens, config.mixing.weights) == (10**6, 10**6, {"a": 1e6})


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-4", 1e-4), ("'1e-4'", 1e-4), (".5e-3", 5e-4), ("1.e-4", 1e-4), ("5E-1", 0.5), ("+1", 1)]
)
def test_rates_in_every_notation(tmp_path: Path, text: str, rate: float) -> None:
    config = load_config(write_run(tmp_path), [f"training.optimizer.learning_rate={text}"])
    assert config.training.optimizer.learning_rate == rate


@pytest.mark.parametrize("text", ["1.5", "3,8", "true", "[1]", "1e-3", "-1", "0", "1e19", "1:30", "2001-99-99"])
def test_a_fraction_of_a_token_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.total_tokens: found .*: expected a number of tokens"):
        load_config(write_run(tmp_path), [f"training.total_tokens={text}"])


def test_whole_numbers_with_exponents_keep_every_digit(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["training.total_tokens=1.23456789012345678e17"])
    assert config.training.total_tokens == 123456789012345678


def test_command_lines_read_the_same_numbers() -> None:
    plain = dsv3("plan", "--gpus", 16, "--budget-dollars", 2000, "--tokens", 4_000_000_000, "--json")
    written = dsv3("plan", "--gpus", "1.6e1", "--budget-dollars", "2,000", "--tokens", "4,000,000,000", "--json")
    assert plain.exit_code == written.exit_code == 0, written.output
    assert plain.output == written.output


def test_a_count_on_a_command_line_is_whole() -> None:
    for words in (("plan", "--gpus", "1.5"), ("train", "--config", "x", "--timeout", "0"), ("plan", "--gpus", "x")):
        result = dsv3(*words)
        assert result.exit_code == 2
        assert "expected a whole number" in result.output
    assert "--gpus -1: expected" in message_of(dsv3("plan", "--gpus", "-1"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (("",), "['']"),
        ([1, None, "a b"], "[1, null, 'a b']"),
        ({"a": Path("b/c"), "d": False}, "{a: b/c, d: false}"),
        (Kind.FAST, "fast"),
        (1e-07, "1e-07"),
        ("5", "'5'"),
        ("null", "'null'"),
        ("a\nb", '"a\\nb"'),
        (frozenset({3}), "[3]"),
        ("x" * 5000, f"{'x' * 100} … {'x' * 100} (5,000 characters)"),
        ([[[[[[[[[[[1]]]]]]]]]]], "[[[[[[[[[…]]]]]]]]]"),
    ],
)
def test_values_are_shown_as_yaml_writes_them(value: object, text: str) -> None:
    assert format_value(value) == text


def test_a_number_too_long_to_write_is_described() -> None:
    assert format_value(10**5000) == "a number of 16,610 bits"


def test_an_option_of_generate_is_shown_as_it_was_typed() -> None:
    with pytest.raises(GenerationError, match=r"stop = \[''\]: expected texts, none of them empty"):
        SamplingConfig(stop=("",))
    with pytest.raises(GenerationError, match="top_k = 0: expected a whole number from 1, or none"):
        SamplingConfig(top_k=0)


def test_a_vocabulary_of_any_size_is_trained_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    words = ("tokenize", "--input", tmp_path / "a.txt", "--output", tmp_path / "tokens", "--vocab-size")
    assert "vocab_size = 1,000,000,000,000: expected at most 4,194,304" in message_of(dsv3(*words, "1e12"))
    with pytest.raises(ConfigError, match=r"data\.corpus\.vocab_size: found '1T'"):
        load_config(write_run(tmp_path), ["data.corpus.vocab_size=1T"])
    assert dsv3(*words, "300", "--workers", "1e9").exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 kB", 1500), ("7", 7), ("2T", 2 * 10**12), ("1e9", 10**9)],
)
def test_a_size_is_a_number_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4iB", "-1GB", "4 GB extra", "1e9 GB extra", "1e-400"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 4GB"):
        parse_size(text)
