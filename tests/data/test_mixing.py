"""Mixing: the shares of sources, a limit of repetitions, and a budget of tokens in whole documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.documents import record_batch
from deepseek_v3.data.mixing import copies_per_document, repeat_documents, tokens_per_source
from deepseek_v3.data.pipeline.run import run_pipeline
from helpers import ROOT
from helpers.pipeline import pipeline_config, rows_of, write_lines

TINY = ROOT / "configs" / "deepseek_v3_tiny.yaml"


def shares(weights: list[float], available: list[int], budget: int, max_epochs: float) -> list[float]:
    return tokens_per_source(np.array(weights), np.array(available), budget, max_epochs).tolist()


def test_shares_follow_the_weights() -> None:
    assert shares([3, 1], [1000, 1000], 400, 4) == [300, 100]


def test_other_sources_make_up_for_a_small_one_by_weight() -> None:
    assert shares([2, 1, 1], [10, 1000, 1000], 440, 4) == [40, 200, 200]


def test_no_source_is_repeated_more_often_than_allowed() -> None:
    assert shares([1, 1], [100, 50], 10_000, 2) == [200, 100]


def test_a_source_without_documents_gives_nothing() -> None:
    assert shares([1, 1], [0, 500], 100, 4) == [0, 100]


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(0, 10**9)), min_size=1, max_size=6),
    st.integers(1, 10**10),
    st.floats(1, 8),
)
def test_shares_reach_the_budget_or_everything(
    sources: list[tuple[float, int]], budget: int, max_epochs: float
) -> None:
    weights, available = [weight for weight, _ in sources], [tokens for _, tokens in sources]
    targets = np.array(shares(weights, available, budget, max_epochs))
    most = np.array(available) * max_epochs
    assert (targets <= most * (1 + 1e-9)).all()
    assert targets.sum() == pytest.approx(min(budget, most.sum()), rel=1e-9)
    # Each source that is not exhausted gets its share by weight, and no exhausted source would have got less.
    open_ = targets < most * (1 - 1e-9)
    levels = targets / np.array(weights)
    if open_.any():
        assert levels[open_] == pytest.approx(levels[open_].max(), rel=1e-9)
        assert levels.max() <= levels[open_].max() * (1 + 1e-9)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.floats(0, 5000), st.integers(0, 5))
def test_copies_come_as_close_to_the_target_as_possible(tokens: list[int], target: float, seed: int) -> None:
    counts = np.array(tokens, np.int64)
    order = np.random.default_rng(seed).integers(0, 2**64, len(tokens), np.uint64)
    copies = copies_per_document(counts, order, target)
    assert copies.max() - copies.min() <= 1
    assert abs(int((counts * copies).sum()) - target) <= max(tokens)


def _corpus(tmp_path: Path) -> Path:
    for name, number in (("wiki", 40), ("code", 60)):
        rows = [{"id": f"{name}-{index}", "text": f"{name} {index} " + "word " * 20} for index in range(number)]
        write_lines(tmp_path / "in" / name / "a.jsonl", rows)
    return tmp_path / "in"


def test_a_mixture_on_disk(tmp_path: Path) -> None:
    options = {"weights": {"wiki/*": 3, "code/*": 1}, "tokens": 4000}
    config = pipeline_config(str(_corpus(tmp_path)), tmp_path / "out", ["mixing"], mixing=options)
    counts = run_pipeline(config)["counts"]
    rows = rows_of(tmp_path / "out", "data")
    sizes = {name: sum(len(row["text"]) for row in rows if row["id"].startswith(name)) for name in ("wiki", "code")}
    assert sizes["wiki"] / sizes["code"] == pytest.approx(3, rel=0.1)
    assert sum(sizes.values()) / 4 + len(rows) == pytest.approx(4000, rel=0.03)
    assert counts["copies"] == sum("#" in row["id"] for row in rows) > 0
    assert len({row["id"] for row in rows}) == len(rows)
    dropped = rows_of(tmp_path / "out", "dropped")
    assert {row["reason"] for row in dropped} == {"over_budget"}
    assert counts["input"] == 100 == counts["kept"] + counts["dropped"]


def test_a_document_of_no_listed_source_is_dropped(tmp_path: Path) -> None:
    config = pipeline_config(
        str(_corpus(tmp_path)), tmp_path / "out", ["mixing"], mixing={"weights": {"wiki/*": 1}}
    )
    assert run_pipeline(config)["counts"]["dropped"] == 60
    assert {row["reason"] for row in rows_of(tmp_path / "out", "dropped")} == {"no_weight"}


def test_another_seed_chooses_other_documents(tmp_path: Path) -> None:
    source = _corpus(tmp_path)
    chosen = []
    for seed in (0, 0, 1):
        output = tmp_path / f"out-{len(chosen)}"
        run_pipeline(pipeline_config(str(source), output, ["mixing"], mixing={"tokens": 1000, "seed": seed}))
        chosen.append([row["id"] for row in rows_of(output, "data")])
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_model_sets_the_budget_and_too_little_text_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = pipeline_config(str(_corpus(tmp_path)), tmp_path / "out", ["mixing"], mixing={"for_config": str(TINY)})
    counts = run_pipeline(config)["counts"]
    assert counts["kept"] == 100
    assert counts["copies"] == 300
    assert "the sources give no more with max_epochs = 4.0" in caplog.text


@pytest.mark.parametrize("batch_bytes", [1, 25, 10**9])
def test_copies_follow_their_document_in_small_batches(batch_bytes: int) -> None:
    texts = ["a" * 10, "b", "", "d" * 40]
    batch = record_batch(["w", "x", "y", "z"], texts, ["s"] * 4, range(4), [None] * 4)
    batches = [*repeat_documents(batch, np.array([3, 1, 20_000, 2]), batch_bytes)]
    ids = [id_ for each in batches for id_ in each.column("id").to_pylist()]
    assert ids[:4] == ["w", "w#2", "w#3", "x"]
    assert ids[4:6] + ids[-3:] == ["y", "y#2", "y#20000", "z", "z#2"]
    assert len(ids) == 20_006
    assert max(sum(map(len, each.column("text").to_pylist())) for each in batches) <= max(batch_bytes, 40)


def test_any_number_of_copies_takes_the_memory_of_one_batch() -> None:
    batch = record_batch(["x"], ["a" * 1000], ["s"], [0], [None])
    first = next(repeat_documents(batch, np.array([10**12]), 2**20))
    assert 1000 < first.num_rows < 1100
