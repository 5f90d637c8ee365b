"""Stages of other packages: registered or found as entry points, their sections checked by their own classes."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from deepseek_v3.config import extensions
from deepseek_v3.config.base import Fraction, StageConfig
from deepseek_v3.config.extensions import FilterExtension, filter_names, find_filter, register_filter
from deepseek_v3.config.loading import load_section, section_from_dict
from deepseek_v3.config.preprocess_config import BUILT_IN_STAGES, PreprocessConfig
from deepseek_v3.utils.errors import ConfigError

RUN = "input_path: raw\noutput_dir: clean\npipeline: [language, toxicity]\n"


class ToxicityConfig(StageConfig):
    limit: Fraction = 0.5
    words: tuple[str, ...] = ()


TOXICITY = FilterExtension("toxicity", ToxicityConfig, load=lambda: dict)


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extensions, "_registered", {})
    return


def _package(folder: Path, value: str = "toxic:TOXICITY", name: str = "toxic") -> None:
    """Installs a package with the entry point `toxicity` into a folder."""
    (folder / f"{name}.py").write_text(
        "from deepseek_v3.config.base import StageConfig\n"
        "from deepseek_v3.config.extensions import FilterExtension\n"
        "class ToxicityConfig(StageConfig):\n    limit: int\n"
        "TOXICITY = FilterExtension('toxicity', ToxicityConfig, load=lambda: dict)\n"
    )
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[deepseek_v3.filters]\ntoxicity = {value}\n")


def _load(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> Any:
    (folder / "run.yaml").write_text(text)
    return load_section(PreprocessConfig, folder / "run.yaml", overrides)


def _message(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as error:
        _load(folder, text, overrides)
    return str(error.value).replace(f"{folder}/", "")


def test_a_registered_filter_has_a_checked_section(tmp_path: Path) -> None:
    register_filter(TOXICITY)
    config = _load(tmp_path, RUN + "toxicity: {words: [bad], max_drop_warning: 0.9}\n", ("toxicity.limit=0.25",))
    assert config.pipeline == ("language", "toxicity")
    assert config.toxicity == ToxicityConfig(limit=0.25, words=("bad",), max_drop_warning=0.9)
    assert config.model_dump(mode="json")["toxicity"] == {"max_drop_warning": 0.9, "limit": 0.25, "words": ["bad"]}
    for copied in (
        section_from_dict(PreprocessConfig, config.model_dump(mode="json"), "here"),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        assert copied == config


def test_a_filter_without_a_section_has_its_defaults(tmp_path: Path) -> None:
    register_filter(TOXICITY)
    assert _load(tmp_path, RUN).toxicity == ToxicityConfig()
    made = PreprocessConfig(
        input_path="raw", output_dir=tmp_path, pipeline=("toxicity",), toxicity=ToxicityConfig(limit=1.0)
    )
    assert made.model_dump()["toxicity"]["limit"] == 1.0


def test_sections_of_unused_filters_are_left_out(tmp_path: Path) -> None:
    register_filter(TOXICITY)
    assert "toxicity" not in _load(tmp_path, RUN.replace(", toxicity", "")).model_dump()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("toxicity: {limit: 2}\n", (), "run.yaml:4: toxicity.limit: found 2: expected less than or equal to 1"),
        ("toxicity:\n  limt: 1\n", (), "run.yaml:5: toxicity.limt: unknown field; did you mean limit?"),
        ("toxicity:\n  alarm: 1\n", (), "run.yaml:5: toxicity.alarm: this field was renamed; use max_drop_warning"),
        (
            "",
            ("toxicity.words=a",),
            "--set toxicity.words=a: toxicity.words: found a: expected a list, such as [a, b]",
        ),
        ("toxicity: 3\n", (), "run.yaml:4: toxicity: found 3: expected a section, with fields such as "),
        ("toxicty: {}\n", (), "run.yaml:4: toxicty: unknown field; did you mean toxicity?"),
    ],
)
def test_mistakes_in_a_section_are_named(
    tmp_path: Path, text: str, overrides: tuple[str, ...], message: str
) -> None:
    register_filter(TOXICITY)
    assert _message(tmp_path, RUN + text, overrides).startswith(message)


def test_an_unknown_stage_lists_the_known_ones(tmp_path: Path) -> None:
    known = ", ".join(BUILT_IN_STAGES)
    assert _message(tmp_path, RUN) == f"run.yaml:3: pipeline.1: found toxicity: expected one of {known}"
    register_filter(FilterExtension("another", StageConfig, load=lambda: dict))
    assert _message(tmp_path, RUN).endswith(f"{known}, another")


def test_unknown_fields_are_named_beside_other_mistakes(tmp_path: Path) -> None:
    text = "input_pth: raw\noutput_dir: clean\npipeline: []\nworkers: many\n"
    lines = _message(tmp_path, text).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["input_path", "workers", "input_pth"]
    assert lines[-1] == "run.yaml:1: input_pth: unknown field; did you mean input_path?"


def test_an_entry_point_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert filter_names() == ["toxicity"]
    assert _load(tmp_path, RUN + "toxicity: {limit: 7}\n").toxicity.limit == 7
    assert (
        _message(tmp_path, RUN) == "run.yaml: toxicity.limit: missing; this field has no default, give it a value"
    )


def test_two_packages_may_not_offer_the_same_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("toxic", "toxic_too"):
        _package(tmp_path, f"{name}:TOXICITY", name)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "several packages offer it (toxic:TOXICITY, toxic_too:TOXICITY)" in _message(tmp_path, RUN)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:TOXICITY", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("toxic_broken:ToxicityConfig", "expected a FilterExtension with the name toxicity"),
    ],
)
def test_a_broken_entry_point_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    _package(tmp_path, value, "toxic_broken")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = _message(tmp_path, RUN)
    assert found.startswith(f"filter toxicity: the entry point {value} of the group deepseek_v3.filters ")
    assert message in found


@pytest.mark.parametrize("name", ["pii", "workers", "two words", ""])
def test_a_name_that_cannot_be_a_section_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="filter"):
        register_filter(FilterExtension(name, StageConfig, load=lambda: dict))


def test_a_name_is_registered_once() -> None:
    register_filter(TOXICITY)
    register_filter(TOXICITY)
    assert find_filter("toxicity") is TOXICITY
    with pytest.raises(ValueError, match="the name is taken"):
        register_filter(FilterExtension("toxicity", StageConfig, load=lambda: dict))


def test_the_python_constructor_refuses_unknown_fields(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        PreprocessConfig(input_path="raw", output_dir=tmp_path, pipeline=(), nonsense=1)  # type: ignore[call-arg]
