"""Loading a model for inference: what is read, how it is stored, and that it computes the same numbers."""

from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import config_from_dict
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import save_pretrained
from deepseek_v3.interop.load_model import load_for_inference, load_model
from deepseek_v3.model import pretrained
from deepseek_v3.model.pretrained import model_entries
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.moe.routing import Router
from deepseek_v3.ops.layers import RMSNorm
from deepseek_v3.utils.checkpointing.directory import save_checkpoint
from deepseek_v3.utils.checkpointing.reader import FileReader
from deepseek_v3.utils.errors import CheckpointError, ConfigError
from helpers.models import random_tokens, small_config, small_model

CPU = torch.device("cpu")
TRAINING = {
    "total_tokens": 1000,
    "sequence_length": 16,
    "global_batch_size": 1,
    "optimizer": {"learning_rate": 0.001},
}


@pytest.fixture(scope="module")
def trained() -> DeepSeekV3:
    torch.manual_seed(0)
    return small_model(small_config(vocab_size=280, num_nextn_predict_layers=1)).eval()


@pytest.fixture(scope="module")
def path(trained: DeepSeekV3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run, with two moments of every weight."""
    sections = {"model": trained.config.model_dump(), "training": TRAINING, "data": {"path": "x"}}
    config = config_from_dict({**sections, "logging": {"directory": "x"}}, "test")
    tokenizer = Tokenizer.train(["the cat sat on the mat\n"] * 3, vocab_size=280)
    weights = trained.state_dict()
    moments = {each: {name: torch.ones_like(value) for name, value in weights.items()} for each in ("m", "v")}
    state = {**model_entries(weights, config, tokenizer), "optimizer": moments, "step": 7, "tokens": 112}
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint_step_7.pt"
    save_checkpoint(path, state)
    return path


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probabilities_are_those_of_training(path: Path, trained: DeepSeekV3, precision: str) -> None:
    tokens_BS = random_tokens(trained.config, 2, 20)
    trained.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    wanted = trained.logits(trained.hidden_states(tokens_BS).main_BSD).log_softmax(-1)
    loaded = load_for_inference(path, CPU, precision).model
    assert torch.equal(loaded(tokens_BS).log_softmax(-1), wanted)
    assert loaded.model.embed_tokens.weight.dtype == trained.compute_dtype


def test_only_what_computes_in_float32_is_stored_in_it(path: Path, tmp_path: Path) -> None:
    saved = load_model(path, CPU)
    save_pretrained(saved.model, tmp_path / "hf", tokenizer=saved.tokenizer)
    for place in (path, tmp_path / "hf"):
        model = load_for_inference(place, CPU, "bf16").model
        wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
        modules = dict(model.named_modules())
        assert all(isinstance(modules[name.rpartition(".")[0]], (RMSNorm, Router)) for name in wide)
        assert len(model.model.layers) == model.config.num_hidden_layers


@torch.no_grad()
@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_mtp_layers_are_loaded_on_request(path: Path, trained: DeepSeekV3, tmp_path: Path, kind: str) -> None:
    place = path
    if kind == "folder":
        saved, place = load_model(path, CPU), tmp_path / "hf"
        save_pretrained(saved.model, place, tokenizer=saved.tokenizer)
    trained.compute_dtype = torch.float32
    model = load_for_inference(place, CPU, "fp32", mtp_layers=1).model
    tokens_BS = random_tokens(trained.config, 2, 20)
    assert torch.equal(model.hidden_states(tokens_BS).mtp[0], trained.hidden_states(tokens_BS).mtp[0])
    with pytest.raises(ConfigError, match="found 1 MTP layers in the model, expected 2 to draft tokens; take"):
        load_for_inference(place, CPU, "fp32", mtp_layers=2)


def test_moments_and_unused_layers_are_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    read = FileReader.chunk
    monkeypatch.setattr(FileReader, "chunk", lambda self, name, at: names.append(name) or read(self, name, at))
    model = load_for_inference(path, CPU).model
    assert sorted(names) == sorted(f"model.{name}" for name in model.state_dict())


def test_weights_that_do_not_fit_are_refused_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "free_bytes", lambda _: 10**5)
    with pytest.raises(CheckpointError) as error:
        load_for_inference(path, CPU, "fp32")
    assert str(error.value).replace("\xa0", " ") == (
        f"{path}: the weights take 382.6 kB in float32, found 100.0 kB free on cpu; take a device with "
        "more memory, or generate with --precision bf16, which takes half of it"
    )
