"""dsv3 import and export: a Hugging Face directory in, a checkpoint, a directory out, and every command on them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import load_pretrained, save_pretrained
from deepseek_v3.interop.load_model import load_model
from helpers.models import small_config, small_model
from helpers.runs import dsv3, message_of

CPU = torch.device("cpu")
GREEDY = ["--prompt", "the cat", "--temperature", 0, "--max-new-tokens", 6, "--device", "cpu"]
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in bfloat16 with MTP weights, several files, and a tokenizer with a chat template."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("released")
    Tokenizer.train(["the cat sat on the mat\n", "return the cat\n"] * 3, 280).save(folder / "tokenizer.json")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|fim_end|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "chat_template": TEMPLATE}))
    tokenizer = Tokenizer.load(folder)
    config = small_config(vocab_size=280, num_nextn_predict_layers=1)
    save_pretrained(
        small_model(config), folder / "hf", tokenizer=tokenizer, dtype=torch.bfloat16, max_shard_size="80KB"
    )
    return folder / "hf"


def text_of(model: Path) -> str:
    result = dsv3("generate", "--checkpoint", model, *GREEDY)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_directory_survives_import_and_export(tmp_path: Path, released: Path) -> None:
    result = dsv3("import", released, tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    assert "a checkpoint of 3 layers and 1 MTP layers" in result.output
    assert f"dsv3 generate --checkpoint {tmp_path / 'checkpoint'}" in result.output.replace("\n", " ")
    result = dsv3("export", tmp_path / "checkpoint", tmp_path / "hf", "--max-shard-size", "80KB")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {path.name for path in released.iterdir()}
    for path in released.iterdir():
        assert path.read_bytes() == (tmp_path / "hf" / path.name).read_bytes(), path.name
    assert text_of(released) == text_of(tmp_path / "checkpoint") == text_of(tmp_path / "hf")


def test_a_checkpoint_is_not_imported_again(tmp_path: Path, released: Path) -> None:
    assert dsv3("import", released, tmp_path / "checkpoint").exit_code == 0
    message = message_of(dsv3("import", tmp_path / "checkpoint", tmp_path / "again"))
    assert message.startswith(f"{tmp_path / 'checkpoint'}: is a checkpoint of this project")


def test_the_next_step_of_an_imported_model_names_its_data(tmp_path: Path, released: Path) -> None:
    """It has no held-out tokens of a training here, without which `dsv3 eval` needs a text."""
    result = dsv3("generate", "--checkpoint", released, *GREEDY)
    assert f"Next:\n  dsv3 eval --checkpoint {released} --data FILE" in result.stderr


def test_an_imported_model_can_be_trained_further(tmp_path: Path, released: Path) -> None:
    assert dsv3("import", released, tmp_path / "checkpoint").exit_code == 0
    config = load_config(tmp_path / "checkpoint" / "config.yaml")
    assert config.model == load_pretrained(released).config
    assert config.training.sequence_length == config.model.max_position_embeddings
    saved = load_model(tmp_path / "checkpoint", CPU)
    assert (saved.config, saved.step, saved.tokens) == (config, 0, 0)
    assert all(parameter.dtype == torch.float32 for parameter in saved.model.parameters())


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ([], torch.bfloat16),
        (["--dtype", "fp32"], torch.float32),
        (["--dtype", "fp16"], torch.float16),
        (["--quantization", "fp8"], torch.float8_e4m3fn),
        (["--quantization", "fp8", "--dtype", "fp32"], torch.float8_e4m3fn),
    ],
)
def test_options_of_the_export(tmp_path: Path, released: Path, words: list[str], stored: torch.dtype) -> None:
    result = dsv3("export", released, tmp_path / "hf", *words)
    assert result.exit_code == 0, result.output
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    assert weights["model.layers.3.mlp.experts.0.up_proj.weight"].dtype == stored
    others = torch.float32 if "fp32" in words else torch.bfloat16 if "fp8" in words else stored
    assert weights["model.layers.3.eh_proj.weight"].dtype == others


def test_another_tokenizer_can_be_exported(
    tmp_path: Path, released: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = json.loads((released / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text((released / "tokenizer.json").read_text())
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": "other"}))
    assert dsv3("export", released, tmp_path / "hf", "--tokenizer", tmp_path / "tokenizer").exit_code == 0
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == "other"
    Tokenizer.train(["the cat sat on a mat of wool and slept"] * 3, 300).save(tmp_path / "large.json")
    message = message_of(dsv3("export", released, tmp_path / "no", "--tokenizer", tmp_path / "large.json"))
    assert "ids, expected at most the model's vocab_size = 280" in message
    assert not any("are other tokens there" in line for line in caplog.messages)
    Tokenizer.train(["some other text of other words"] * 3, 275).save(tmp_path / "other.json")
    assert dsv3("export", released, tmp_path / "warned", "--tokenizer", tmp_path / "other.json").exit_code == 0
    assert any("are other tokens there" in line for line in caplog.messages)
    assert not (tmp_path / "no").exists()


def test_mtp_layers_that_are_missing_are_told_or_refused(tmp_path: Path, released: Path) -> None:
    for path in released.iterdir():
        if not path.name.startswith("model"):
            os.link(path, tmp_path / path.name)
    weights = {name: t for file in released.glob("*.safetensors") for name, t in load_file(file).items()}
    main = {name: tensor for name, tensor in weights.items() if "layers.3." not in name}
    save_file(main, tmp_path / "model.safetensors")
    assert "hold 0 of the 1 MTP layers of the config" in message_of(
        dsv3("import", tmp_path, tmp_path / "checkpoint", "--require-mtp")
    )
    result = dsv3("import", tmp_path, tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    assert "a checkpoint of 3 layers and 0 MTP layers" in result.output


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "tokenizer.json", "config.json"])
def test_a_missing_file_is_one_line_on_every_command(tmp_path: Path, released: Path, name: str) -> None:
    for path in released.iterdir():
        if path.name != name:
            os.link(path, tmp_path / path.name)
    assert (released / name).exists()
    (tmp_path / "text.txt").write_text("the cat sat on the mat")
    for command in (
        ["import", tmp_path, tmp_path / "out"],
        ["export", tmp_path, tmp_path / "out"],
        ["generate", "--checkpoint", tmp_path, *GREEDY],
        ["eval", tmp_path, "--data", tmp_path / "text.txt", "--device", "cpu"],
    ):
        message = message_of(dsv3(*command))
        assert name in message
        assert len(message.splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_eval_reads_a_directory(tmp_path: Path, released: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 9)
    assert dsv3("import", released, tmp_path / "checkpoint").exit_code == 0
    outputs = []
    for model in (released, tmp_path / "checkpoint"):
        result = dsv3(
            "eval", model, "--data", tmp_path / "text.txt", "--device", "cpu", "--output", f"{model}.json"
        )
        assert result.exit_code == 0, result.output
        outputs.append(json.loads(Path(f"{model}.json").read_text()))
    first, second = ({key: value for key, value in output.items() if key != "model"} for output in outputs)
    assert first.keys() == second.keys()
    assert first["sources"] == second["sources"]
