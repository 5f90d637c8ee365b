"""configs/data_config.yaml lists every option of the data pipeline with its default."""

from __future__ import annotations

import yaml

from deepseek_v3.config.loading import load_section
from deepseek_v3.config.preprocess_config import PreprocessConfig
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
