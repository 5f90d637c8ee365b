"""FP8 with 128×128 scales: written as the release has it, read as its scales say, in blocks of any shape."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepseek_v3.interop.huggingface import load_pretrained, load_released, released_state, save_pretrained
from deepseek_v3.interop.huggingface.import_weights import ReleasedWeights
from deepseek_v3.interop.huggingface.tensor_source import CPU, TensorDict, TensorFolder
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.utils.errors import CheckpointError
from helpers.models import small_config, small_model
from helpers.released_shapes import stored_weights

# No width is a multiple of 128, and most are larger, so that every matrix has smaller blocks at its edges.
CONFIG = small_config(
    hidden_size=140,
    intermediate_size=300,
    moe_intermediate_size=136,
    kv_lora_rank=130,
    qk_nope_head_dim=40,
    num_nextn_predict_layers=1,
)
IN_FP8 = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj".split()


def dequantized(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each matrix times its scales, number by number in float64, without the project's code."""
    values = {}
    for name, tensor in weights.items():
        if (scales := weights.get(f"{name}_scale_inv")) is not None:
            rows, columns = torch.arange(tensor.shape[-2]) // 128, torch.arange(tensor.shape[-1]) // 128
            values[name] = tensor.double() * scales.double()[..., rows, :][..., columns]
        elif not name.endswith("_scale_inv"):
            values[name] = tensor.double()
    return values


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    torch.manual_seed(0)
    return small_model(CONFIG)


@pytest.fixture(scope="module")
def folder(model: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "hf"
    save_pretrained(model, path, quantization="fp8", max_shard_size="300KB")
    return path


def test_fp8_covers_what_the_release_has_in_fp8(folder: Path) -> None:
    weights = stored_weights(folder)
    assert "model.layers.3.mlp.experts.7.down_proj.weight_scale_inv" in weights
    for name, tensor in weights.items():
        part = name.split(".")[-2]
        if name.endswith("_scale_inv"):
            rows, columns = weights[name.removesuffix("_scale_inv")].shape
            assert (tensor.dtype, tensor.shape) == (torch.float32, (-(-rows // 128), -(-columns // 128)))
        elif part in IN_FP8:
            assert tensor.dtype == torch.float8_e4m3fn
            assert f"{name}_scale_inv" in weights
        else:
            expected = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert tensor.dtype == expected, name
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }


@pytest.mark.parametrize("size", [128, 192])
def test_sides_that_others_misread_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    """The release has 576 rows of `kv_a_proj_with_mqa`, which is no reason for a warning."""
    heads = {"num_attention_heads": 2, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
    widths = {"hidden_size": 128, "intermediate_size": size, "moe_intermediate_size": 128, "q_lora_rank": 128}
    model = small_model(small_config(**heads, **widths, kv_lora_rank=128, num_hidden_layers=2))
    save_pretrained(model, tmp_path / "hf", quantization="fp8")
    warned = "3 of the weights in FP8 have a side that is no multiple of 128, such as model.layers.0.mlp.gate_proj"
    assert (warned in caplog.text) == (size == 192)
    assert ("no multiple of 128" in caplog.text) == (size == 192)


def test_fp8_is_read_as_its_scales_say_and_close_to_the_weights(folder: Path, model: DeepSeekV3) -> None:
    expected, original = dequantized(stored_weights(folder)), released_state(model)
    found = released_state(load_pretrained(folder, dtype=torch.float32))
    assert found.keys() == expected.keys() == original.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-7, atol=0), name
        largest = original[name].abs().max()
        assert (tensor - original[name]).abs().le(original[name].abs() / 16 + largest / 448 / 1024).all(), name


def test_a_wide_model_of_fp8_weights_is_in_bfloat16_by_default(folder: Path) -> None:
    found = load_pretrained(folder)
    assert found.head_weight_VD.dtype == torch.bfloat16
    expected = dequantized(stored_weights(folder))
    for name, tensor in released_state(found).items():
        assert torch.equal(tensor, expected[name].float().to(tensor.dtype)), name


def test_an_fp8_export_of_fp8_weights_changes_nothing(folder: Path, tmp_path: Path) -> None:
    """The largest number of a block is 448 times its scale, so that the same scales come out again."""
    save_pretrained(load_pretrained(folder, dtype=torch.float32), tmp_path / "again", quantization="fp8")
    first, second = stored_weights(folder), stored_weights(tmp_path / "again")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def random_blocks(shape: tuple[int, ...], count: int) -> list[tuple[list[int], list[int]]]:
    """Starts and sizes of blocks anywhere in a tensor, empty ones too."""
    blocks = []
    for _ in range(count):
        starts = [int(torch.randint(size + 1, ())) for size in shape]
        sizes = [int(torch.randint(size - start + 1, ())) for size, start in zip(shape, starts, strict=True)]
        blocks.append((starts, sizes))
    return blocks


class Counting(TensorFolder):
    """A folder that counts the bytes of weights that are read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.num_bytes = 0

    def read(self, tensor: str, rows: range | None = None, device: torch.device = CPU) -> Tensor:
        values = super().read(tensor, rows, device)
        self.num_bytes += 0 if tensor.endswith("_scale_inv") else values.nbytes
        return values


@pytest.mark.parametrize("kind", ["fp8", "bfloat16", "stacked", "stacked fp8"])
def test_any_block_is_that_part_of_the_whole(folder: Path, model: DeepSeekV3, tmp_path: Path, kind: str) -> None:
    if kind == "bfloat16":
        folder = tmp_path / "hf"
        save_pretrained(model, folder, dtype=torch.bfloat16)
    elif kind != "fp8":
        folder = tmp_path
        save_file(stacked(model, in_fp8=kind == "stacked fp8"), folder / "model.safetensors")
    source = Counting(folder)
    weights = ReleasedWeights(source, CONFIG, compare_copies=False)
    for name, shape in weights.shapes.items():
        whole = torch.empty(shape)
        weights.read_into(whole, name)
        for starts, sizes in random_blocks(shape, 3):
            block, source.num_bytes = torch.full(sizes, 7.0), 0
            weights.read_into(block, name, starts)
            ends = zip(starts, sizes, strict=True)
            assert torch.equal(block, whole[tuple(slice(start, start + size) for start, size in ends)]), name
            if not name.endswith(("gate_up_proj", "down_proj")) or "stacked" not in kind:
                # Whole rows of the block: its own columns, and those beside them.
                own_rows = block.shape[:-1].numel() if block.ndim > 1 else len(block)
                row_bytes = shape[-1] if block.ndim > 1 else 1
                assert source.num_bytes <= own_rows * row_bytes * 4


def stacked(model: DeepSeekV3, in_fp8: bool) -> dict[str, Tensor]:
    """The state of a model in Transformers 5, which stacks experts; in FP8 with scales for each expert."""
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.contiguous()
        if in_fp8 and tensor.ndim == 3:
            experts, rows, columns = tensor.shape
            scales = 0.01 + torch.rand(experts, -(-rows // 128), -(-columns // 128))
            state[name] = (tensor * 50).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = scales
    return state


def test_stacks_in_fp8_are_multiplied_by_their_scales(model: DeepSeekV3) -> None:
    state = stacked(model, in_fp8=True)
    found = DeepSeekV3(CONFIG)
    load_released(found, state)
    expected = dequantized(state)
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-7, atol=0), name
    name = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=rf"{name}_scale_inv: found shape \(8, 2\), expected \(8, 2, 2\)"):
        load_released(found, {**state, f"{name}_scale_inv": torch.ones(8, 2)})
    with pytest.raises(CheckpointError, match=rf"{name}: is in FP8 without {name}_scale_inv"):
        load_released(found, {key: tensor for key, tensor in state.items() if key != f"{name}_scale_inv"})


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16, torch.float16, torch.float64])
def test_scales_have_any_float_type(model: DeepSeekV3, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    quantized, scales = torch.randn(300, 140).to(torch.float8_e4m3fn), 2.0 ** torch.randint(-5, 5, (3, 2))
    state = {**released_state(model), name: quantized, f"{name}_scale_inv": scales.to(dtype)}
    weights = ReleasedWeights(TensorDict(state), CONFIG)
    found = torch.empty(300, 140)
    weights.read_into(found, name)
    assert torch.equal(found.double(), dequantized({name: quantized, f"{name}_scale_inv": scales})[name])


def test_embedding_and_head_may_be_in_fp8_too(model: DeepSeekV3, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = stored_weights(folder)
    for name in [name for name in state if name.endswith(("embed_tokens.weight", "head.weight"))]:
        state[name] = state[name].float().to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = torch.full((1, 2), 0.5)
    save_file(state, tmp_path / "model.safetensors")
    found = load_pretrained(tmp_path)
    assert found.head_weight_VD.dtype == torch.bfloat16
    assert torch.equal(found.head_weight_VD, (state["lm_head.weight"].float() * 0.5).bfloat16())
