"""A run that was saved under one layout resumes under any other and ends with the same loss."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from deepseek_v3.config.loading import load_config
from deepseek_v3.data.tokens.tokenize_corpus import TokenFormat, tokenize_corpus
from deepseek_v3.training.data import open_tokens
from deepseek_v3.training.optimizer import MOMENTS
from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from helpers import deepspeed_runs, parallel_runs
from helpers.rank_pool import RankPool
from helpers.runs import SEQUENCE_LENGTH, TOKENS_PER_STEP, write_run

HALF, WHOLE = 1, 2
ALONE = ["parallel.micro_batch_size=4"]  # two micro-batches on each rank, as four ranks have them
TWO_RANKS = ["parallel.micro_batch_size=2"]
FSDP = ["parallel.data_shard=4"]
HSDP = ["parallel.data_replicate=2", "parallel.data_shard=2"]
EXPERTS = ["parallel.data_replicate=2", "parallel.data_shard=2", "parallel.expert=2"]
EXPERTS_APART = ["parallel.data_shard=2", "parallel.expert=2", *TWO_RANKS]
PIPELINE = ["parallel.pipeline=2", *TWO_RANKS]
DEEP = ["model.num_hidden_layers=4"]  # for two stages on each of two ranks
PIPELINE_V = [*PIPELINE, "parallel.pipeline_schedule=dualpipe_v", *DEEP]
PIPELINE_EXPERTS = [*PIPELINE, "parallel.data_shard=2", "parallel.expert=2"]
FSDP_2 = ["parallel.data_shard=2", *TWO_RANKS]
EXPERTS_2 = ["parallel.data_replicate=2", "parallel.expert=2", *TWO_RANKS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a run whose corpus is tokenized."""
    path = write_run(tmp_path_factory.mktemp("run"), WHOLE)
    open_tokens(load_config(path, []))
    return path


def train(pool: RankPool, run: Path, layout: list[str], checkpoints: Path, resume: str | None = None) -> float:
    """Trains, saves a checkpoint after step HALF, and returns the validation loss at the end."""
    overrides = recipe(checkpoints, layout)
    world = load_config(run, overrides).parallel.world_size
    return ended(pool.run(world, parallel_runs.train_run, run, overrides, resume, pool.device))


def train_by_deepspeed(
    pool: RankPool, run: Path, stage: int, checkpoints: Path, resume: str | None = None, *changes: str
) -> float:
    """Does the same with DeepSpeed's ZeRO stage `stage`, on two ranks."""
    checkpoints.mkdir()
    file = deepspeed_runs.write_settings(checkpoints, {"zero_optimization": {"stage": stage}})
    return ended(
        pool.run(2, deepspeed_runs.train_run, file, run, recipe(checkpoints, [*TWO_RANKS, *changes]), resume)
    )


def ended(results: list[tuple[int, float]]) -> float:
    """The validation loss after the last step, on which all ranks agree."""
    assert all(result == results[0] for result in results)
    assert results[0][0] == WHOLE
    return results[0][1]


def recipe(checkpoints: Path, layout: list[str]) -> list[str]:
    return [
        "parallel.micro_batch_size=1",
        "training.global_batch_size=8",
        "training.optimizer.learning_rate=0.001",
        "training.optimizer.moments=float32",
        "training.balance.bias_update_speed=0.1",  # a bias that is not restored changes the choice of experts
        f"checkpoint.interval_steps={HALF}",
        "model.num_hidden_layers=2",
        f"training.total_tokens={WHOLE * 2 * TOKENS_PER_STEP}",
        f"checkpoint.directory={checkpoints}",
        f"logging.directory={checkpoints}/log",
        *layout,
    ]


def in_the_middle(checkpoints: Path) -> str:
    (found,) = checkpoints.glob(f"checkpoint_step_{HALF}*")
    return str(found)


class Run(NamedTuple):
    """A finished run: the folder of its checkpoints, and its validation loss at the end."""

    checkpoints: Path
    held_out: float


@pytest.fixture(scope="module")
def run_of(pool: RankPool, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Run]:
    """Returns the finished run of a layout; each layout is trained once."""

    @cache
    def trained(layout: tuple[str, ...]) -> Run:
        folder = tmp_path_factory.mktemp("saved")
        return Run(folder, train(pool, run, list(layout), folder))

    return lambda layout: trained(tuple(layout))


@pytest.fixture(scope="module")
def uninterrupted(run_of: Callable[[list[str]], Run]) -> float:
    return run_of(ALONE).held_out


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (ALONE, FSDP),
        (FSDP, ALONE),
        (FSDP, EXPERTS),
        (EXPERTS, PIPELINE),
        (EXPERTS_APART, HSDP),
        (PIPELINE, EXPERTS_APART),
        (PIPELINE_V, [*FSDP_2, *DEEP]),
        ([*FSDP, *DEEP], PIPELINE_V),
        (PIPELINE_EXPERTS, ALONE),
        (ALONE, PIPELINE_EXPERTS),
    ],
)
def test_a_run_goes_on_under_another_layout(
    pool: RankPool,
    run: Path,
    run_of: Callable[[list[str]], Run],
    tmp_path: Path,
    first: list[str],
    second: list[str],
) -> None:
    found = train(pool, run, second, tmp_path, resume=in_the_middle(run_of(first).checkpoints))
    uninterrupted = run_of([*ALONE, *DEEP] if DEEP[0] in first else ALONE).held_out
    assert found == pytest.approx(uninterrupted, rel=1e-5)


TIED = ["model.tie_word_embeddings=true", *DEEP]
ZERO_BUBBLE = [*PIPELINE, "parallel.pipeline_schedule=zero_bubble"]


Saved = Callable[[list[str], list[str]], tuple[str, float]]


@pytest.fixture(scope="module")
def saved_by(pool: RankPool, run: Path, run_of: Callable[[list[str]], Run]) -> Saved:
    """Returns the checkpoint after step HALF of a layout's run, and its validation loss in one process."""

    @cache
    def saved(layout: tuple[str, ...], model: tuple[str, ...]) -> tuple[str, float]:
        folder = run_of([*layout, *model]).checkpoints
        checkpoint = in_the_middle(folder)
        (result,) = pool.run(1, parallel_runs.resumed, run, recipe(folder, [*ALONE, *model]), checkpoint)
        assert result.differing == []
        return checkpoint, result.validation

    return lambda layout, model: saved(tuple(layout), tuple(model))


@pytest.mark.parametrize("first", [ALONE, ZERO_BUBBLE], ids=["from one process", "from zero bubble"])
@pytest.mark.parametrize(
    ("second", "model"),
    [
        (PIPELINE, TIED),
        ([*PIPELINE, "parallel.pipeline_schedule=interleaved"], TIED),
        (ZERO_BUBBLE, TIED),
        (ZERO_BUBBLE, DEEP),
        (PIPELINE_V, TIED),
        ([*PIPELINE_EXPERTS, *ZERO_BUBBLE], TIED),
    ],
    ids=["1F1B", "interleaved", "zero bubble", "zero bubble, untied", "DualPipeV", "zero bubble × EP"],
)
def test_resuming_fills_every_copy_of_a_weight(
    pool: RankPool,
    run: Path,
    saved_by: Saved,
    tmp_path: Path,
    first: list[str],
    second: list[str],
    model: list[str],
) -> None:
    """The embedding is on the first and on the last stage; under DualPipeV one rank has both stages."""
    checkpoint, expected = saved_by(first, model)
    overrides = recipe(tmp_path, [*second, *model])
    world = load_config(run, overrides).parallel.world_size
    for result in pool.run(world, parallel_runs.resumed, run, overrides, checkpoint, pool.device):
        assert result.differing == []
        assert {"model", *MOMENTS} == result.compared
        assert result.validation == pytest.approx(expected, rel=1e-6)


def test_replicas_may_sum_in_fewer_bits_before_and_after(
    pool: RankPool, run: Path, saved_by: Saved, tmp_path: Path
) -> None:
    """FSDP then knows of one replica, but the checkpoint is that of any other layout."""
    checkpoint, expected = saved_by([*HSDP, "parallel.gradient_reduction=bf16"], [])
    overrides = recipe(tmp_path, [*EXPERTS, "parallel.gradient_reduction=fp8"])
    for result in pool.run(4, parallel_runs.resumed, run, overrides, checkpoint, pool.device):
        assert result.differing == []
        assert result.validation == pytest.approx(expected, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_run_goes_on_under_another_layout_on_gpus(run: Path, tmp_path: Path) -> None:
    pool = RankPool(2, "cuda")
    exact = ["parallel.precision=fp32"]
    uninterrupted = train(pool, run, exact, tmp_path / "whole")
    layouts = [FSDP_2, EXPERTS_2, PIPELINE, ALONE, FSDP_2]
    try:
        for number, (first, second) in enumerate(pairwise(layouts)):
            places = [tmp_path / f"{number}_{part}" for part in ("first", "second")]
            train(pool, run, [*exact, *first], places[0])
            found = train(pool, run, [*exact, *second], places[1], in_the_middle(places[0]))
            assert found == pytest.approx(uninterrupted, rel=1e-4), (first, second)
    finally:
        pool.close()


@pytest.mark.parametrize(("first", "second"), [(1, ALONE), (FSDP, 3), (3, 2)], ids=["1-alone", "FSDP-3", "3-2"])
def test_a_run_goes_on_by_deepspeed_and_from_it(
    pool: RankPool,
    deepspeed_pool: RankPool,
    run: Path,
    run_of: Callable[[list[str]], Run],
    uninterrupted: float,
    tmp_path: Path,
    first: list[str] | int,
    second: list[str] | int,
) -> None:
    if isinstance(first, int):
        train_by_deepspeed(deepspeed_pool, run, first, tmp_path / "first")
    middle = in_the_middle(tmp_path / "first" if isinstance(first, int) else run_of(first).checkpoints)
    if isinstance(second, int):
        found = train_by_deepspeed(deepspeed_pool, run, second, tmp_path / "second", middle)
    else:
        found = train(pool, run, second, tmp_path / "second", middle)
    assert found == pytest.approx(uninterrupted, rel=1e-5)


def test_a_mixture_goes_on_under_every_layout(
    pool: RankPool, deepspeed_pool: RankPool, run: Path, tmp_path: Path
) -> None:
    folder = run.parent
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(4000))))
    options: dict[str, Any] = {"holdout": 0.2, "fim_rate": 0.0, "seed": 0, "sequence_length": SEQUENCE_LENGTH}
    options |= {"vocab_size": None, "tokenizer": folder / "tokens" / "tokenizer.json"}
    options["token_format"] = TokenFormat.MEGATRON
    tokenize_corpus(str(tmp_path / "numbers.txt"), tmp_path / "numbers", **options)
    paths = {"text": (folder / "tokens", 2), "numbers": (tmp_path / "numbers", 1)}
    sources = [f"{{name: {name}, path: {path}, weight: {weight}}}" for name, (path, weight) in paths.items()]
    mixed = ["data.corpus=null", f"data.sources=[{', '.join(sources)}]"]
    whole = train(pool, run, [*ALONE, *mixed], tmp_path / "whole")
    middle = in_the_middle(tmp_path / "whole")
    found = [
        train(pool, run, [*layout, *mixed], tmp_path / str(number), middle)
        for number, layout in enumerate((FSDP, EXPERTS_APART, PIPELINE))
    ]
    found.append(train_by_deepspeed(deepspeed_pool, run, 2, tmp_path / "deepspeed", middle, *mixed))
    assert found == pytest.approx([whole] * 4, rel=1e-5)


def test_other_samples_are_refused_and_moments_converted_by_all(
    pool: RankPool,
    deepspeed_pool: RankPool,
    run: Path,
    run_of: Callable[[list[str]], Run],
    uninterrupted: float,
    tmp_path: Path,
) -> None:
    """`test_train_command` tests the same in one process."""
    middle = in_the_middle(run_of(ALONE).checkpoints)
    with pytest.raises(AssertionError, match=r"CheckpointError: .*training\.seed: 0 -> 1"):
        train(pool, run, [*FSDP_2, "training.seed=1"], tmp_path / "seed", middle)
    rounded = "training.optimizer.moments=bfloat16"
    assert train(pool, run, [*FSDP_2, rounded], tmp_path / "fsdp", middle) == pytest.approx(uninterrupted, rel=1e-3)
    found = train_by_deepspeed(deepspeed_pool, run, 3, tmp_path / "deepspeed", middle, rounded)
    assert found == pytest.approx(uninterrupted, rel=1e-3)


def test_the_same_layout_goes_on_bit_for_bit(
    pool: RankPool, run: Path, run_of: Callable[[list[str]], Run], tmp_path: Path
) -> None:
    whole = run_of(EXPERTS)
    assert train(pool, run, EXPERTS, tmp_path, resume=in_the_middle(whole.checkpoints)) == whole.held_out
    states = [load_checkpoint(folder / f"checkpoint_step_{WHOLE}") for folder in (whole.checkpoints, tmp_path)]
    for name, tensor in states[0]["model"].items():
        assert tensor.equal(states[1]["model"][name]), name
