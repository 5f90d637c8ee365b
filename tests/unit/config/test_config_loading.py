"""A run's configuration from YAML and overrides and back; every mistake is named with its place."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.config.data_config import CorpusConfig, DataConfig
from deepseek_v3.config.loading import (
    config_from_dict,
    config_to_yaml,
    find_config,
    load_config,
    section_from_dict,
    short_config_name,
)
from deepseek_v3.config.model_config import ModelConfig
from deepseek_v3.config.train_config import (
    BatchRampConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainingConfig,
)
from deepseek_v3.utils.errors import ConfigError
from helpers import ROOT
from helpers.models import YARN, small_config
from helpers.runs import dsv3, message_of, run_fields

CONFIGS = ROOT / "configs"
SHIPPED = sorted(CONFIGS.glob("deepseek_v3_*.yaml"))

RUN = """\
model:
  vocab_size: 97
  hidden_size: 40
  num_hidden_layers: 3
  first_k_dense_replace: 1
  intermediate_size: 56
  num_attention_heads: 4
  kv_lora_rank: 16
  qk_nope_head_dim: 10
  qk_rope_head_dim: 8
  v_head_dim: 14
  n_routed_experts: 8
  num_experts_per_tok: 3
  moe_intermediate_size: 20
training:
  total_tokens: 20x
  sequence_length: 64
  global_batch_size: 8
  optimizer:
    learning_rate: 1e-4
data:
  path: data/small
logging:
  directory: runs/small
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def line_of(text: str, start: str) -> int:
    """The number, from 1, of the only line that starts with this text after its indentation."""
    numbers = [n for n, line in enumerate(text.splitlines(), start=1) if line.strip().startswith(start)]
    assert len(numbers) == 1
    return numbers[0]


def refusal_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refusal:
        load_config(path, overrides)
    return str(refusal.value)


def run_config(**sections: Any) -> RunConfig:
    """A small run, with whole sections replaced."""
    defaults: dict[str, Any] = {
        "model": small_config(),
        "training": TrainingConfig(
            total_tokens="20x",
            sequence_length=64,
            global_batch_size=8,
            optimizer=OptimizerConfig(learning_rate=1e-3),
        ),
        "data": DataConfig(path=Path("data/small")),
        "logging": LoggingConfig(directory=Path("runs/small")),
    }
    return RunConfig(**{**defaults, **sections})


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_run_loads_and_survives_the_round_trip(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


def test_runs_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"deepseek_v3_tiny", "deepseek_v3_base"}


def test_override_values_are_read_as_yaml(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RUN))
    assert config.training.optimizer.learning_rate == 1e-4
    assert config.training.total_tokens == "20x"
    assert config.model.q_lora_rank is None
    assert config.logging.directory == Path("runs/small")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2.2e-4", 2.2e-4), ("1E-4", 1e-4), ("1e+1", 10.0), ("3", 3.0), ("1_0e-1", 1.0)],
)
def test_a_number_is_a_number_in_every_spelling(tmp_path: Path, text: str, value: float) -> None:
    config = load_config(write(tmp_path, RUN.replace("1e-4", text)))
    assert config.training.optimizer.learning_rate == value


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, RUN),
        [
            "training.seed=1",
            "training.seed=2",
            "training.optimizer.learning_rate=3e-4",
            "data.mask_documents=true",
            "model.rope_scaling={type: yarn, factor: 4, original_max_position_embeddings: 16}",
            "data.corpus.source=python-stdlib",
            "data.corpus.vocab_size=260",
            "model.vocab_size=300",
            "parallel.compile=false",
        ],
    )
    assert config.training.seed == 2
    assert config.training.optimizer.learning_rate == 3e-4
    assert config.data.mask_documents is True
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 4.0
    assert config.parallel.compile is False


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, RUN.replace("  directory: runs/small\n", "")), ["logging.directory=elsewhere"]
    )
    assert config.logging.directory == Path("elsewhere")


def test_an_override_can_set_null(tmp_path: Path) -> None:
    path = write(tmp_path, RUN.replace("  kv_lora_rank", "  q_lora_rank: 24\n  kv_lora_rank"))
    assert load_config(path).model.q_lora_rank == 24
    assert load_config(path, ["model.q_lora_rank=null"]).model.q_lora_rank is None


MISTAKES: list[tuple[str, str, str]] = [
    ("  hidden_size: 40", "  hidden_size: wide", "model.hidden_size: found wide"),
    ("  hidden_size: 40", "  hiden_size: 40", "model.hiden_size: unknown field; did you mean hidden_size?"),
    ("    learning_rate: 1e-4", "    learning_rate: 0", "training.optimizer.learning_rate: found 0"),
    ("    learning_rate: 1e-4", "    learning_rate: .inf", "training.optimizer.learning_rate: found"),
    ("  total_tokens: 20x", "  total_tokens: 20 x", "training.total_tokens: found '20 x'"),
    ("  total_tokens: 20x", "  total_tokens: 0x", "training.total_tokens: found '0x'"),
    ("  total_tokens: 20x", "  total_tokens: true", "training.total_tokens: found true"),
    ("  total_tokens: 20x", "  total_tokens: -5", "training.total_tokens: found -5"),
    ("  sequence_length: 64", "  sequence_length: 1", "training.sequence_length: found 1"),
    ("  path: data/small", "  path: 5", "data.path: found 5"),
    ("  n_routed_experts: 8", "  n_routed_experts: [8]", "model.n_routed_experts: found [8]"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), MISTAKES, ids=[message for *_, message in MISTAKES])
def test_a_mistake_is_named_with_its_line_and_field(tmp_path: Path, right: str, wrong: str, message: str) -> None:
    text = RUN.replace(right, wrong)
    path = write(tmp_path, text)

    lines = refusal_of(path).splitlines()

    assert any(line.startswith(f"{path}:{line_of(text, wrong.strip())}: {message}") for line in lines)


def test_a_missing_field_is_named_with_the_line_of_its_section(tmp_path: Path) -> None:
    text = RUN.replace("    learning_rate: 1e-4", "    beta1: 0.8")
    path = write(tmp_path, text)
    place = f"{path}:{line_of(text, 'optimizer:')}"
    assert refusal_of(path).startswith(f"{place}: training.optimizer.learning_rate: missing")


def test_a_missing_section_is_named_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, RUN.replace("logging:\n  directory: runs/small\n", ""))
    assert refusal_of(path).startswith(f"{path}: logging: missing")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=wide", "model.hidden_size: found wide"),
        ("model.hiden_size=4", "model.hiden_size: unknown field; did you mean hidden_size?"),
        ("trainin.seed=4", "trainin: unknown field; did you mean training?"),
        ("model=null", "model: found null"),
        ("training.optimizer={learning_rate: 0}", "training.optimizer.learning_rate: found 0"),
        ("training.optimizer={beta1: 0.5}", "training.optimizer.learning_rate: missing"),
        ("model.vocab_size.x=3", "vocab_size is the value 97, not a section"),
        ("model.vocab_size", "expected section.field=value"),
        ("model..vocab_size=3", "expected section.field=value"),
        ("=3", "expected section.field=value"),
        ("model.vocab_size=[1", "the value '[1' is not valid YAML"),
        ("training.optimizer={beta1: 0, beta1: 1}", "the value '{beta1: 0, beta1: 1}' is not valid YAML"),
    ],
)
def test_a_mistaken_override_is_named_as_it_was_typed(tmp_path: Path, override: str, message: str) -> None:
    assert refusal_of(write(tmp_path, RUN), override).startswith(f"--set {override}: {message}")


CONTRADICTORY_SECTIONS: list[tuple[str, str]] = [
    ("training.sequence_length=8192", "training.sequence_length = 8192 is more than model.max_position_embeddings"),
    ("model.num_nextn_predict_layers=64", "leaves nothing to predict at depth model.num_nextn_predict_layers = 64"),
    (
        "parallel.micro_batch_size=3",
        "training.global_batch_size = 8 is not a multiple of parallel.micro_batch_size",
    ),
    ("training.batch_ramp.initial=16", "training.batch_ramp.initial = 16 is more than training.global_batch_size"),
    ("data.corpus={source: text, vocab_size: 512}", "data.corpus.vocab_size = 512 is more than model.vocab_size"),
]


@pytest.mark.parametrize(("override", "message"), CONTRADICTORY_SECTIONS)
def test_sections_that_contradict_each_other_are_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal_of(write(tmp_path, RUN), override)


def test_a_ramp_of_the_batch_starts_with_whole_micro_batches(tmp_path: Path) -> None:
    message = refusal_of(write(tmp_path, RUN), "parallel.micro_batch_size=4", "training.batch_ramp.initial=2")
    assert "training.batch_ramp.initial = 2 is not a multiple of parallel.micro_batch_size = 4" in message


def test_a_repeated_key_is_refused_at_its_second_line(tmp_path: Path) -> None:
    text = RUN.replace("  hidden_size: 40\n", "  hidden_size: 40\n  kv_lora_rank : 8\n")
    path = write(tmp_path, text)
    assert (
        refusal_of(path)
        == f"{path}:{line_of(text, 'kv_lora_rank:')}: is not valid YAML: kv_lora_rank is given twice"
    )


def test_values_shared_by_yaml_merge_may_be_overridden(tmp_path: Path) -> None:
    """A field beside YAML's merge key overrides the merged one; it is not a repeated field."""
    text = RUN.replace("  optimizer:\n", "  optimizer:\n    <<: {beta1: 0.5}\n    beta1: 0.6\n")
    assert load_config(write(tmp_path, text)).training.optimizer.beta1 == 0.6


UNREADABLE: list[tuple[bytes, str]] = [
    (b"model: \xff\xfe", "is not UTF-8 text"),
    (b"model: [1", ":1: is not valid YAML"),
    (b"model:\n\tvocab_size: 1", ":2: is not valid YAML"),
    (b"model: 1\n---\nmodel: 2\n", ":2: is not valid YAML"),
    (b"model: !!python/object:os.system {}", ":1: is not valid YAML"),
    (b"- model", "holds a list, expected sections"),
    (b"5", "holds 5, expected sections"),
    (b"model: 2024-01-01", ":1: model: found '2024-01-01': expected a section"),
    (b"? [model, data]\n: 1\n", ":1: is not valid YAML"),
    (b"model: &m {training: *m}", "run.yaml"),
    (b"", "model: missing"),
]


@pytest.mark.parametrize(("content", "message"), UNREADABLE, ids=[repr(content) for content, _ in UNREADABLE])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert message in refusal_of(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    expected = f"{tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"
    assert refusal_of(tmp_path / "absent.yaml") == expected


def test_a_stored_config_names_its_source_when_it_is_wrong() -> None:
    fields = run_config().model_dump(mode="json")
    assert config_from_dict(fields, "step-5.pt") == run_config()
    fields["model"]["hidden_size"] = "wide"
    with pytest.raises(ConfigError, match=r"^step-5\.pt: model\.hidden_size: found wide"):
        config_from_dict(fields, "step-5.pt")


def test_a_stored_config_may_have_moments_refused_today() -> None:
    fields = run_config().model_dump(mode="json")
    fields["training"]["optimizer"] |= {"beta2": 0.999, "moments": "bfloat16"}
    assert config_from_dict(fields, "step-5.pt").training.optimizer.beta2 == 0.999
    with pytest.raises(ConfigError, match=r"beta2 = 0\.999 with moments in bfloat16"):
        section_from_dict(RunConfig, fields, "run.yaml")


@pytest.mark.parametrize(
    "name", ["1e5", "1e-4", "2024-01-01", "null", "yes", "0x10", "1_000", "a: b", "5", "é\u2028"]
)
def test_a_folder_may_be_named_like_anything(tmp_path: Path, name: str) -> None:
    config = run_config(logging=LoggingConfig(directory=Path(name)))
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


positive = st.integers(1, 2**40)
positive_number = st.floats(min_value=1e-30, max_value=1e30)
paths = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).map(Path)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    groups, group_size = draw(st.integers(1, 8)), draw(st.integers(2, 32))
    kept = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 100))
    return small_config(
        vocab_size=draw(st.integers(1, 10**6)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        q_lora_rank=draw(st.none() | positive),
        n_routed_experts=groups * group_size,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, kept * group_size)),
        routed_scaling_factor=draw(positive_number),
        rope_theta=draw(st.floats(min_value=1, max_value=1e30, exclude_min=True)),
        rope_scaling=draw(st.none() | st.just(YARN)),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=draw(st.integers(64, 10**6)),
    )


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    model, micro = draw(model_configs()), draw(st.integers(1, 64))
    batch = draw(st.integers(1, 1000))
    training = TrainingConfig(
        total_tokens=draw(positive | st.integers(1, 100).map("{}x".format) | st.just("0.5x")),
        sequence_length=draw(st.integers(2, 64)),
        global_batch_size=micro * batch,
        batch_ramp=draw(
            st.none() | st.integers(1, batch).map(lambda n: BatchRampConfig(initial=n * micro, fraction=0.5))
        ),
        optimizer=OptimizerConfig(learning_rate=draw(positive_number), eps=draw(positive_number)),
    )
    return run_config(
        model=model,
        training=training,
        parallel=ParallelConfig(micro_batch_size=micro, compile=draw(st.sampled_from(["auto", True, False]))),
        data=DataConfig(path=draw(paths), corpus=None),
        logging=LoggingConfig(directory=draw(paths)),
    )


@given(config=run_configs())
def test_any_valid_config_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, config: RunConfig
) -> None:
    path = write(tmp_path_factory.mktemp("round_trip"), config_to_yaml(config))
    assert load_config(path) == config


def test_a_corpus_survives_the_round_trip(tmp_path: Path) -> None:
    corpus = CorpusConfig(source="python-stdlib", vocab_size=260)
    config = run_config(model=small_config(vocab_size=300), data=DataConfig(path=Path("data/small"), corpus=corpus))
    assert load_config(write(tmp_path, config_to_yaml(config))) == config


@pytest.mark.parametrize(
    ("parallel", "batch", "message"),
    [
        ({"pipeline": 2}, 1, r"a batch of 1 is 1 micro-batches for each pipeline, and .* = 1f1b needs 2"),
        ({"pipeline": 2, "micro_batch_size": 2}, 2, "needs 2; lower parallel.micro_batch_size, or raise the batch"),
        ({"pipeline": 2, "pipeline_schedule": "dualpipe_v"}, 3, "dualpipe_v needs 4"),
        ({"pipeline": 2, "pipeline_schedule": "interleaved"}, 5, "needs a multiple of parallel.pipeline = 2"),
        ({"pipeline": 2, "data_shard": 2}, 2, "1 micro-batches for each pipeline"),
    ],
)
def test_batches_that_a_schedule_cannot_take_are_refused(
    tmp_path: Path, parallel: dict[str, Any], batch: int, message: str
) -> None:
    fields = run_fields(tmp_path)
    fields["model"]["num_hidden_layers"] = 4
    fields["training"]["global_batch_size"] = batch
    fields["parallel"] = {"micro_batch_size": 1, **parallel}
    with pytest.raises(ConfigError, match=message):
        config_from_dict(fields, "here")


@pytest.mark.parametrize(
    ("schedule", "pipeline", "layers", "advised"),
    [
        ("1f1b", 4, 3, ["pipeline=3"]),
        ("interleaved", 2, 3, ["pipeline=1", "pipeline_schedule=1f1b"]),
        ("zero_bubble", 3, 5, ["pipeline=2", "pipeline_schedule=1f1b"]),
        ("dualpipe_v", 4, 4, ["pipeline=2", "pipeline_schedule=1f1b"]),
        ("dualpipe_v", 4, 3, ["pipeline=1"]),
    ],
)
def test_more_stages_than_layers_are_refused_with_what_works(
    tmp_path: Path, schedule: str, pipeline: int, layers: int, advised: list[str]
) -> None:
    fields = run_fields(tmp_path)
    fields["model"]["num_hidden_layers"] = layers
    fields["training"]["global_batch_size"] = 24
    fields["parallel"] = {"micro_batch_size": 1, "pipeline": pipeline, "pipeline_schedule": schedule}
    with pytest.raises(ConfigError, match=f"is more than the {layers} layers") as refused:
        config_from_dict(fields, "here")
    found = re.findall(r"--set parallel\.(\w+=\w+)", str(refused.value))
    assert found == advised
    path = write(tmp_path, yaml.safe_dump(fields))
    for override in found:
        load_config(path, [f"parallel.{override}"])


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zero_bubble", "dualpipe_v"])
def test_every_size_of_a_ramp_must_suit_the_schedule(tmp_path: Path, schedule: str) -> None:
    fields = run_fields(tmp_path)
    fields["model"]["num_hidden_layers"] = 4
    fields["parallel"] = {"micro_batch_size": 1, "pipeline": 2, "pipeline_schedule": schedule}
    fields["training"] |= {"global_batch_size": 8, "batch_ramp": {"initial": 4, "increment": 2}}
    assert config_from_dict(fields, "here").parallel.pipeline_schedule == schedule
    fields["training"]["batch_ramp"] = {"initial": 1, "increment": 1}
    if schedule == "zero_bubble":
        config_from_dict(fields, "here")
    else:
        with pytest.raises(ConfigError, match="micro-batches for each pipeline"):
            config_from_dict(fields, "here")


@pytest.mark.parametrize(
    "name",
    ["1b", "deepseek_v3_1b", "deepseek_v3_1b.yaml", "configs/1b", "configs/deepseek_v3_1b.yaml"],
)
def test_a_shipped_config_goes_by_its_name_anywhere(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1b").mkdir()  # such as the folder of a run
    assert load_config(name) == load_config(CONFIGS / "deepseek_v3_1b.yaml")
    assert short_config_name(find_config(name)) == "1b"


def test_a_file_comes_before_a_shipped_config_of_its_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (CONFIGS / "deepseek_v3_tiny.yaml").read_text().replace("hidden_size: 96", "hidden_size: 104")
    (tmp_path / "tiny").write_text(text)
    assert load_config("tiny").model.hidden_size == 104
    assert load_config("deepseek_v3_tiny").model.hidden_size == 96


def test_an_unknown_name_lists_the_shipped_configs(tmp_path: Path) -> None:
    for name in ("2b", "configs/2b.yaml"):
        with pytest.raises(
            ConfigError, match=r"2b.*: cannot be read: .* config: 10b, 15b, 1b, 20b, 5b, base, data_"
        ):
            load_config(name)
    for path in ("elsewhere/1b", "../1b", tmp_path / "1b"):
        with pytest.raises(ConfigError, match=r"1b: cannot be read: No such file or directory$"):
            load_config(path)


def test_every_command_that_takes_a_config_takes_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["config", "show", "tiny"],
        ["config", "counts", "tiny"],
        ["validate", "--config", "tiny"],
        ["plan", "--gpus", "1", "--config", "tiny"],
    ):
        assert dsv3(*words).exit_code == 0
    assert "data/raw" in message_of(dsv3("preprocess", "--config", "data_config"))
    words = ["train", "--config", "tiny", "--set", "data.corpus=null", "--set", "data.path=nowhere"]
    assert "nowhere: no token shards here" in message_of(dsv3(*words, "--device", "cpu"))
