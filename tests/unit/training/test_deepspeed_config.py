"""What a DeepSpeed file may say beside a run's config, and what is refused in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_v3.training.parallel.build import build_engine
from deepseek_v3.training.parallel.deepspeed_config import DeepSpeedFile
from deepseek_v3.training.parallel.mesh import ParallelMesh
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT, parallel_runs

SHIPPED = ROOT / "configs" / "deepspeed_config.json"


def file_of(folder: Path, settings: Any) -> DeepSpeedFile:
    path = folder / "deepspeed.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    return DeepSpeedFile(path)


def filled(file: DeepSpeedFile, is_bfloat16: bool = True, **fields: Any) -> dict[str, Any]:
    config = parallel_runs.run_config(10, {"micro_batch_size": 2, **fields}, {})
    return file.filled(file.resolve_layout(config, 2), is_bfloat16)


def test_the_shipped_file_is_filled_from_the_run() -> None:
    settings = filled(DeepSpeedFile(SHIPPED))
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"] == {"enabled": True}
    assert settings["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(settings)


def test_an_empty_file_means_the_same_as_one_full_of_auto(tmp_path: Path) -> None:
    empty = filled(file_of(tmp_path, {}))
    assert empty == filled(file_of(tmp_path, {"bf16": "auto", "zero_optimization": {"stage": "auto"}}))
    assert empty["zero_optimization"] == {"stage": 3}


def test_gradients_are_summed_in_float32_by_default(tmp_path: Path) -> None:
    assert filled(file_of(tmp_path, {}))["communication_data_type"] == "fp32"
    chosen = filled(file_of(tmp_path, {"communication_data_type": "bf16"}))
    assert chosen["communication_data_type"] == "bf16"
    assert "communication_data_type" not in filled(file_of(tmp_path, {}), is_bfloat16=False)


def test_what_the_run_does_not_decide_is_kept(tmp_path: Path) -> None:
    settings = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "allgather_bucket_size": "auto"}}
    assert filled(file_of(tmp_path, settings))["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["zero_optimization"]["allgather_bucket_size"] == "auto"


def test_deepspeed_shards_over_all_ranks_whatever_the_config(tmp_path: Path) -> None:
    given = parallel_runs.run_config(10, {"data_replicate": 2, "data_shard": 2, "expert": 2, "pipeline": 2}, {})
    layout = file_of(tmp_path, {"zero_optimization": {"stage": 2}}).resolve_layout(given, 8).parallel
    assert (layout.data_replicate, layout.data_shard, layout.expert, layout.pipeline) == (1, 8, 1, 1)
    assert layout.zero_stage == 2


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"over 3 processes: training.global_batch_size = 8 is not a multiple"):
        file_of(tmp_path, {}).resolve_layout(parallel_runs.run_config(10, {}, {}), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_batch_size": 16},
            "train_batch_size = 16, and the run's training.global_batch_size = 8",
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            "per_gpu = 1, and the run's parallel.micro_batch_size = 2 makes",
        ),
        ({"gradient_accumulation_steps": 4}, "= 4, and the run's batch of 8 in micro-batches of 2 on 2 ranks"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5, and the run's training.optimizer.max_grad_norm = 1"),
        (
            {"bf16": {"enabled": False}},
            "bf16.enabled = false, and the run's parallel.precision = auto",
        ),
    ],
)
def test_what_contradicts_the_run_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        filled(file_of(tmp_path, settings))
    assert str(tmp_path / "deepspeed.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer: the optimizer is training.optimizer; remove this section"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the schedule is training.schedule"),
        ({"fp16": {"enabled": True}}, "fp16: parallel.precision is bf16, fp8 or fp32"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0: expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = true: expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage = "2": expected 1, 2 or 3'),
        ({"zero_optimization": 2}, "zero_optimization = 2: expected an object"),
        ({"bf16": True}, "bf16 = true: expected an object"),
        ([1], "holds a list, expected an object"),
        ("", ":1:1: is not JSON"),
        ('{"bf16": {},\n "bf16": {}}', "bf16 is given twice"),
        ('{"bf16" {}}', ":1:9: is not JSON"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        file_of(tmp_path, settings)
    assert str(tmp_path / "deepspeed.json") in str(caught.value)


def test_what_is_switched_off_needs_no_removal(tmp_path: Path) -> None:
    assert file_of(tmp_path, {"fp16": {"enabled": False}}).stage == 3


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: there is no such file"):
        DeepSpeedFile(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="is a folder, expected a configuration"):
        DeepSpeedFile(tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"bytes\.json:1: is not UTF-8"):
        DeepSpeedFile(tmp_path / "bytes.json")


def test_stage_3_does_not_compile_layers(tmp_path: Path) -> None:
    config = parallel_runs.run_config(10, {"compile": True}, {})
    with pytest.raises(ConfigError, match=r"zero_optimization.stage = 3 .* --set parallel.compile=auto"):
        file_of(tmp_path, {}).resolve_layout(config, 2)
    assert file_of(tmp_path, {"zero_optimization": {"stage": 2}}).resolve_layout(config, 2).parallel.compile is True


def test_gradients_in_fewer_bits_are_refused(tmp_path: Path) -> None:
    run = parallel_runs.run_config(10, {"gradient_reduction": "bf16"}, {})
    with pytest.raises(ConfigError, match=r"gradient_reduction = bf16 needs FSDP.*gradient_reduction=fp32"):
        file_of(tmp_path, {}).resolve_layout(run, 2)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "deepseek_v3.training.parallel.deepspeed_engine", raising=False)
    config, file = parallel_runs.run_config(10, {}, {}), file_of(tmp_path, {})
    with pytest.raises(
        ConfigError, match=r"--deepspeed needs deepspeed; run `pip install 'deepseek_v3\[deepspeed\]'`"
    ):
        build_engine(config, ParallelMesh(config.parallel), torch.device("cpu"), lambda _: None, file)
