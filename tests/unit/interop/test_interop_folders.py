"""Hugging Face directories: what is saved comes back bit for bit, in every shape, type and number of files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepseek_v3.interop.huggingface import load_pretrained, released_state, save_pretrained
from deepseek_v3.interop.huggingface.import_weights import ReleasedWeights
from deepseek_v3.interop.huggingface.pretrained_folder import open_pretrained
from deepseek_v3.interop.huggingface.tensor_source import TensorFolder
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.routing import Router
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from helpers.models import small_config, small_model
from helpers.released_shapes import SHAPES, stored_weights


def assert_same(found: DeepSeekV3, expected: DeepSeekV3) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


CASES = [
    *((changes, torch.float32) for changes in SHAPES.values()),
    *((SHAPES["one MTP layer"], dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]


@pytest.mark.parametrize(("changes", "dtype"), CASES, ids=str)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = small_model(small_config(**changes), dtype)
    save_pretrained(model, tmp_path / "hf", max_shard_size=60_000)
    found = load_pretrained(tmp_path / "hf")
    assert_same(found, model)
    assert not found.training
    heads = {"num_key_value_heads": model.config.num_attention_heads}
    assert found.config == model.config.model_copy(update=heads)


@pytest.mark.parametrize(
    ("stored_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
)
def test_types_are_converted_as_asked(tmp_path: Path, stored_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The reference is the released state, converted tensor by tensor."""
    model = small_model(small_config(num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path / "hf", dtype=stored_dtype)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == str(stored_dtype)[6:]
    for name, tensor in stored_weights(tmp_path / "hf").items():
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else stored_dtype)
    found = load_pretrained(tmp_path / "hf", dtype=dtype)
    for module in found.modules():
        if isinstance(module, Router):
            assert {module.weight.dtype, module.e_score_correction_bias.dtype} == {torch.float32}
    expected = released_state(model)
    for name, tensor in released_state(found).items():
        narrow = expected[name].to(torch.float32 if name.endswith("correction_bias") else stored_dtype)
        assert torch.equal(tensor, narrow.to(tensor.dtype)), name


def test_the_largest_file_has_at_most_the_size_that_was_asked(tmp_path: Path) -> None:
    config = small_config(num_nextn_predict_layers=1)
    for quantization in (None, "fp8"):
        folder = tmp_path / str(quantization)
        save_pretrained(small_model(config), folder, quantization=quantization, max_shard_size="16KB")
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        assert len(files) > 5
        sizes = [(sum(tensor.nbytes for tensor in file.values()), len(file)) for file in files]
        assert max(size for size, count in sizes if count > 1) <= 16_000
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(size for size, _ in sizes)
        assert index["weight_map"].keys() == stored_weights(folder).keys()


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path) -> None:
    save_pretrained(small_model(small_config()), tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("size", "files"),
    [(10**9, 1), ("1GB", 1), ("1 gib", 1), ("20000000", 1), ("90KB", 4), ("90 kB", 4), ("88KiB", 4)],
)
def test_sizes_of_files_are_numbers_or_texts(tmp_path: Path, size: int | str, files: int) -> None:
    save_pretrained(small_model(small_config()), tmp_path / "hf", max_shard_size=size)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == files


@pytest.mark.parametrize("size", [0, -1, "", "5 apples", "GB", "0GB", "1.5GB", "9" * 40, "5GBGB", "٥GB"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ConfigError, match=r"max_shard_size = .*: expected a size such as 500MB or 5GB"):
        save_pretrained(small_model(small_config()), tmp_path / "hf", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64, "bfloat16"])
def test_a_type_that_weights_cannot_have_is_refused(tmp_path: Path, dtype: Any) -> None:
    save_pretrained(small_model(small_config()), tmp_path / "hf")
    for call in (
        lambda: save_pretrained(small_model(small_config()), tmp_path / "other", dtype=dtype),
        lambda: load_pretrained(tmp_path / "hf", dtype=dtype),
    ):
        with pytest.raises(ConfigError, match=r"dtype = .*: expected torch.bfloat16, torch.float16, torch"):
            call()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_numbers_that_a_type_cannot_hold_are_not_saved(tmp_path: Path, value: float) -> None:
    model = small_model(small_config())
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = value
    name = r"model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight"
    with pytest.raises(CheckpointError, match=rf"1 tensor holds NaN or infinity: {name} in float16"):
        save_pretrained(model, tmp_path / "hf", dtype=torch.float16)
    if value == 1e5:
        save_pretrained(model, tmp_path / "hf", dtype=torch.bfloat16)
        save_pretrained(model, tmp_path / "fp8", quantization="fp8")
    else:
        with pytest.raises(CheckpointError, match=rf"{name}_scale_inv in float32"):
            save_pretrained(model, tmp_path / "fp8", quantization="fp8")
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, name: str, value: float) -> None:
    save_pretrained(small_model(small_config()), tmp_path / "hf")
    weights = stored_weights(tmp_path / "hf")
    weights[name][0] = value
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"its weights: 1 tensor holds NaN or infinity: {name}; get the files"
    ):
        load_pretrained(tmp_path / "hf")


def test_tables_that_the_config_gives_are_ignored(tmp_path: Path) -> None:
    """Some releases, such as Kimi-K2, store the rotary frequencies of every layer."""
    model = small_model(small_config(num_nextn_predict_layers=1))
    save_pretrained(model, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tables = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(4)}
    save_file(stored_weights(tmp_path / "hf") | tables, file)
    assert_same(load_pretrained(tmp_path / "hf"), model)
    main = {name: tensor for name, tensor in stored_weights(tmp_path / "hf").items() if "layers.3." not in name}
    save_file(main | tables, file)
    assert load_pretrained(tmp_path / "hf").config.num_nextn_predict_layers == 0


def test_mtp_layers_that_are_missing_can_be_required(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pretrained(small_model(small_config(num_nextn_predict_layers=1)), tmp_path / "hf")
    weights = {name: tensor for name, tensor in stored_weights(tmp_path / "hf").items() if "layers.3." not in name}
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    assert load_pretrained(tmp_path / "hf").config.num_nextn_predict_layers == 0
    message = "hold 0 of the 1 MTP layers of the config and nothing of model.layers.3"
    assert message in caplog.text
    with pytest.raises(CheckpointError, match=f"{message}; expected all of them"):
        load_pretrained(tmp_path / "hf", require_mtp=True)


def test_copies_of_embedding_and_head_may_be_in_another_type(tmp_path: Path) -> None:
    """Their values must be the same, in whatever type they are stored."""
    model = small_model(small_config(num_nextn_predict_layers=1), torch.bfloat16)
    save_pretrained(model, tmp_path / "hf")
    weights = stored_weights(tmp_path / "hf")
    copy = "model.layers.3.embed_tokens.weight"
    save_file(weights | {copy: weights[copy].float()}, tmp_path / "hf" / "model.safetensors")
    assert_same(load_pretrained(tmp_path / "hf"), model)
    wrong = weights[copy].clone()
    wrong[96, 39] += 1
    save_file(weights | {copy: wrong}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{copy} differs from model\.embed_tokens\.weight"):
        load_pretrained(tmp_path / "hf")
    assert isinstance(open_pretrained(tmp_path / "hf", compare_copies=False), ReleasedWeights)


def test_a_source_knows_types_and_shapes_of_a_folder(tmp_path: Path) -> None:
    save_pretrained(small_model(small_config(), torch.bfloat16), tmp_path / "hf", max_shard_size=50_000)
    source, expected = TensorFolder(tmp_path / "hf"), stored_weights(tmp_path / "hf")
    assert {name: (info.dtype, info.shape) for name, info in source.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor)
        assert torch.equal(source.read(name, range(1, len(tensor) - 1)), tensor[1:-1])
        assert source.read(name, range(2, 2)).shape == (0, *tensor.shape[1:])
