"""configs/data_config.yaml shows every option with its default; sizes and counts are read as people write them."""

from __future__ import annotations

import pytest
import yaml

from deepseek_v3.config.loading import load_section
from deepseek_v3.config.preprocess_config import PreprocessConfig
from deepseek_v3.utils.numbers import parse_size
from helpers import ROOT

CONFIG = ROOT / "configs" / "data_config.yaml"


def test_the_shipped_config_lists_every_option_with_its_default() -> None:
    config = load_section(PreprocessConfig, CONFIG)
    assert config == PreprocessConfig(
        input_path=config.input_path, output_dir=config.output_dir, pipeline=config.pipeline
    )
    written = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    assert written.keys() == PreprocessConfig.model_fields.keys()
    for name, field in PreprocessConfig.model_fields.items():
        options = getattr(field.annotation, "model_fields", None)
        assert options is None or written[name].keys() == options.keys(), name


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 kB", 1500), ("7", 7), ("2T", 2 * 10**12), ("1e9", 10**9)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4iB", "-1GB", "4 GB extra", "1e9 GB extra", "1e-400"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 4GB"):
        parse_size(text)
