"""`dsv3 train --init`: the weights of another run or of a release, with a fresh optimizer, schedule and data."""

from pathlib import Path

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.tokenizer import Tokenizer
from deepseek_v3.interop.huggingface import save_pretrained
from deepseek_v3.model.pretrained import model_entries
from deepseek_v3.model.transformer import DeepSeekV3
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.trainer import Trainer
from deepseek_v3.utils.checkpointing.directory import load_checkpoint, save_checkpoint
from helpers import deepspeed_runs, parallel_runs
from helpers.models import fill_with_noise
from helpers.rank_pool import RankPool
from helpers.runs import dsv3, message_of, write_run

CPU = torch.device("cpu")
MODEL = ["model.num_hidden_layers=4", "model.n_routed_experts=8"]
BATCH = ["parallel.micro_batch_size=1", "training.global_batch_size=8", *MODEL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose corpus is tokenized, with noise as weights in `weights.pt` and in `released`, in float32."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(write_run(folder, 2), MODEL)
    tokenizer = open_tokens(config).load_tokenizer()
    model = DeepSeekV3(config.model)
    fill_with_noise(model)
    entries = model_entries(model.state_dict(), config, tokenizer)
    save_checkpoint(folder / "weights.pt", {**entries, "step": 5, "tokens": 640})
    save_pretrained(model, folder / "released", tokenizer=tokenizer)
    save_pretrained(model, folder / "bf16", tokenizer=tokenizer, dtype=torch.bfloat16, max_shard_size="20KB")
    return folder


def start(folder: Path, init: str, place: Path, *changes: str) -> DeepSeekV3:
    """The model of a run of one process, before its first step."""
    config = load_config(folder / "run.yaml", [*MODEL, f"checkpoint.directory={place}", *changes])
    return Trainer(config, CPU, init=folder / init).engine.models[0]


def words(folder: Path, place: Path, *more: object) -> tuple[object, ...]:
    places = [f"checkpoint.directory={place}/checkpoints", f"logging.directory={place}/log", *MODEL]
    sets = [word for place in places for word in ("--set", place)]
    return ("train", "--device", "cpu", "--config", folder / "run.yaml", *sets, *more)


@pytest.mark.parametrize("init", ["weights.pt", "released"])
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.data_shard=4"],
        ["parallel.data_replicate=2", "parallel.data_shard=2", "parallel.expert=2"],
        ["parallel.pipeline=2", "parallel.data_shard=2", "parallel.expert=2"],
        ["parallel.pipeline=2", "parallel.pipeline_schedule=dualpipe_v", "model.tie_word_embeddings=false"],
    ],
    ids=["FSDP", "HSDP × EP", "PP × EP", "DualPipeV"],
)
def test_every_rank_gets_its_part_of_the_weights(
    pool: RankPool, folder: Path, tmp_path: Path, init: str, layout: list[str]
) -> None:
    overrides = [*BATCH, *layout, f"checkpoint.directory={tmp_path}"]
    world = load_config(folder / "run.yaml", overrides).parallel.world_size
    results = pool.run(world, parallel_runs.started, folder / "run.yaml", overrides, folder / init, pool.device)
    for compared, differing in results:
        assert differing == []
        assert compared > 20


def test_deepspeed_starts_from_the_weights(deepspeed_pool: RankPool, folder: Path, tmp_path: Path) -> None:
    file = deepspeed_runs.write_settings(tmp_path, {"zero_optimization": {"stage": 3}})
    overrides = [*BATCH, "parallel.micro_batch_size=2", f"checkpoint.directory={tmp_path / 'checkpoints'}"]
    results = deepspeed_pool.run(
        2, deepspeed_runs.started, file, folder / "run.yaml", overrides, folder / "released"
    )
    expected = load_checkpoint(folder / "weights.pt")["model"]
    for state in results:
        weights = {
            name.removeprefix("model."): values for name, values in state.items() if name.startswith("model.")
        }
        assert weights.keys() == expected.keys()
        assert all(torch.equal(torch.from_numpy(weights[name]), expected[name]) for name in expected)
        assert not any(values.any() for name, values in state.items() if name.startswith("optimizer.exp"))


def test_bfloat16_weights_become_float32(folder: Path, tmp_path: Path) -> None:
    model = start(folder, "bf16", tmp_path)
    for name, tensor in load_checkpoint(folder / "weights.pt")["model"].items():
        found = model.state_dict()[name]
        assert found.dtype == torch.float32
        rounded = tensor if name.endswith("bias") else tensor.bfloat16().float()
        assert torch.equal(found, rounded), name


@pytest.mark.parametrize("init", ["weights.pt", "released"])
def test_a_longer_context_and_other_mtp_layers_are_taken(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, init: str
) -> None:
    longer = [
        "model.max_position_embeddings=256",
        "model.rope_scaling.factor=4",
        "model.rope_scaling.original_max_position_embeddings=64",
        "training.sequence_length=48",
        "model.num_nextn_predict_layers=2",
    ]
    saved = load_checkpoint(folder / "weights.pt")["model"]
    model = start(folder, init, tmp_path, *longer)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert model.config.rope_scaling is not None
    added = [name for name in state if name not in saved]
    assert added
    assert all(name.startswith("model.layers.5.") for name in added)
    assert state["model.layers.5.eh_proj.weight"].std() > 0
    for text in (
        "model.max_position_embeddings: 64 -> 256",
        "model.rope_scaling.factor: null -> 4",
        "model.num_nextn_predict_layers: 1 -> 2",
    ):
        assert text in caplog.text
    assert ("training.sequence_length: 32 -> 48" in caplog.text) == (init == "weights.pt")  # a release has no run


@pytest.mark.parametrize("init", ["weights.pt", "released"])
def test_mtp_layers_can_be_left_out(folder: Path, tmp_path: Path, init: str) -> None:
    state = start(folder, init, tmp_path, "model.num_nextn_predict_layers=0").state_dict()
    saved = load_checkpoint(folder / "weights.pt")["model"]
    assert set(saved) - set(state) == {name for name in saved if name.startswith("model.layers.4.")}
    assert all(torch.equal(state[name], saved[name]) for name in state)


@pytest.mark.parametrize("init", ["weights.pt", "released"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.hidden_size=48"], "model.hidden_size: 32 -> 48"),
        (["model.num_attention_heads=4", "model.qk_nope_head_dim=2"], "model.num_attention_heads: 2 -> 4"),
        (["model.num_hidden_layers=3"], "model.num_hidden_layers: 4 -> 3"),
        (["model.vocab_size=310"], "model.vocab_size: 300 -> 310"),
        (["model.tie_word_embeddings=true"], "model.tie_word_embeddings: false -> true"),
    ],
)
def test_a_model_that_the_weights_do_not_fit_is_refused(
    folder: Path, tmp_path: Path, init: str, changes: list[str], message: str
) -> None:
    sets = [word for change in changes for word in ("--set", change)]
    result = dsv3(*words(folder, tmp_path, "--init", folder / init, *sets))
    assert result.exit_code != 0
    assert f"{folder / init}: its weights do not fit this model: " in message_of(result)
    assert message in message_of(result)
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").glob("checkpoint_*"))


def test_tokens_of_another_tokenizer_are_refused(folder: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["some other text " * 30], 300)
    state = load_checkpoint(folder / "weights.pt")
    save_checkpoint(tmp_path / "other.pt", {**state, "tokenizer": other.to_json()})
    result = dsv3(*words(folder, tmp_path, "--init", tmp_path / "other.pt"))
    assert "is another one than that of the run's tokens" in message_of(result)


def test_weights_without_a_tokenizer_are_taken_with_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(folder / "run.yaml", MODEL)
    save_pretrained(DeepSeekV3(config.model), tmp_path / "bare")
    start(folder, str(tmp_path / "bare"), tmp_path / "run")
    assert "has no tokenizer.json to compare with" in caplog.text


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    state = load_checkpoint(folder / "weights.pt")
    state["model"]["model.norm.weight"][3] = torch.nan
    save_checkpoint(tmp_path / "bad.pt", state)
    result = dsv3(*words(folder, tmp_path, "--init", tmp_path / "bad.pt"))
    assert "1 tensor holds NaN or infinity: model.norm.weight" in message_of(result)


def test_a_run_starts_once_and_is_resumed_from_then_on(folder: Path, tmp_path: Path) -> None:
    """With `--resume auto`, as a job scheduler restarts a run; the schedule begins with step 1."""
    command = words(folder, tmp_path, "--init", folder / "released", "--resume", "auto")
    first = dsv3(*command)
    assert first.exit_code == 0, first.output
    assert f"Starting from the weights of {folder / 'released'}" in " ".join(first.output.split())
    assert "Step 1/2" in first.output
    again = dsv3(*command)
    assert "Starting from" not in again.output
    assert "Resuming" in again.output
    refused = dsv3(*words(folder, tmp_path, "--init", folder / "released", "--resume", "latest"))
    assert "expected one of them" in message_of(refused)


@pytest.mark.parametrize("place", ["nothing", "empty"])
def test_a_place_without_weights_is_named(folder: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    result = dsv3(*words(folder, tmp_path, "--init", tmp_path / place))
    assert str(tmp_path / place) in message_of(result)


def test_a_checkpoint_without_an_optimizer_cannot_be_resumed(folder: Path, tmp_path: Path) -> None:
    result = dsv3(*words(folder, tmp_path, "--resume", folder / "weights.pt"))
    assert "holds a model without an optimizer" in message_of(result)
    assert "start a new run from its weights with --init" in message_of(result)
