"""Experts sharded over several ranks (real processes over gloo) against one process that has all experts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.experts import (
    Case,
    merge_ranks,
    order_of_events,
    rows_sent_and_received,
    run_cases_with_nan_memory,
    run_single_process,
    sums_of_constants,
)
from helpers.models import relative_difference
from helpers.rank_pool import RankPool

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
ANYWHERE = {"n_group": 1, "topk_group": 1}
ONE = {"num_experts_per_tok": 1}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    differences = {name: relative_difference(found[name], expected[name]) for name in expected}
    assert all(difference < tolerance for difference in differences.values()), differences


@st.composite
def some_cases(draw: st.DrawFn) -> list[Case]:
    """Any tokens on 1, 2 or 4 ranks, any experts, one exchange step or two."""
    world = draw(st.sampled_from([1, 2, 4]))
    return draw(st.lists(cases(world), min_size=4, max_size=4))


@st.composite
def cases(draw: st.DrawFn, world: int) -> Case:
    experts = draw(st.sampled_from([4, 8]))
    chosen = draw(st.integers(1, experts))
    model = {
        "n_routed_experts": experts,
        "num_experts_per_tok": chosen,
        "norm_topk_prob": chosen > 1,  # a single normalised gate is 1, and its gradient nothing but rounding
        "n_shared_experts": draw(st.integers(0, 2)),
    }
    return Case(
        lengths=tuple(draw(st.lists(st.integers(0, 6), min_size=world, max_size=world).filter(any))),
        seed=draw(st.integers(0, 99)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        favoured=tuple(draw(st.sets(st.integers(0, experts - 1), max_size=chosen))),
        ranks_per_node=draw(st.sampled_from([None, 1, 2])),
        recomputed=draw(st.booleans()),
        model=ANYWHERE | model,
    )


@settings(max_examples=5)
@given(drawn=some_cases())
def test_ranks_compute_what_one_process_does(pool: RankPool, drawn: list[Case]) -> None:
    results = pool.run(len(drawn[0].lengths), run_cases_with_nan_memory, drawn)
    for number, case in enumerate(drawn):
        assert_same(
            merge_ranks([result[number] for result in results]), run_single_process(case), TOLERANCES[case.dtype]
        )


# K experts of 8, of which each of four ranks holds two.
SITUATIONS: dict[str, dict[str, Any]] = {
    "groups": {"lengths": (5, 4, 3, 7)},
    "a rank without tokens": {"lengths": (5, 0, 3, 7)},
    "fewer tokens than ranks": {"lengths": (0, 0, 1, 0)},
    "empty experts": {"lengths": (5, 0, 3, 7), "favoured": (1, 6), "model": ANYWHERE | {"num_experts_per_tok": 2}},
    "empty ranks": {"lengths": (5, 0, 3, 7), "favoured": (2, 3), "model": ANYWHERE | {"num_experts_per_tok": 2}},
    "all to one expert": {
        "lengths": (4, 4, 4, 4),
        "favoured": (5,),
        "model": ANYWHERE | {"num_experts_per_tok": 1},
    },
    "all to all experts": {"lengths": (4, 2, 0, 1), "model": ANYWHERE | {"num_experts_per_tok": 8}},
    "one expert on each rank": {"lengths": (3, 4, 5, 6), "model": {"n_routed_experts": 4, "n_group": 2}},
}


@pytest.mark.parametrize("ranks_per_node", [None, 2], ids=["one step", "two steps"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_situation_with_new_memory_full_of_nan(
    pool: RankPool, dtype: torch.dtype, ranks_per_node: int | None
) -> None:
    situations = [Case(**fields, dtype=dtype, ranks_per_node=ranks_per_node) for fields in SITUATIONS.values()]
    results = pool.run(4, run_cases_with_nan_memory, situations)
    for number, case in enumerate(situations):
        assert_same(
            merge_ranks([result[number] for result in results]), run_single_process(case), TOLERANCES[dtype]
        )


@pytest.mark.parametrize("ranks_per_node", [None, 2], ids=["one step", "two steps"])
def test_dispatched_rows_in_fp8_leave_gradients_exact(pool: RankPool, ranks_per_node: int | None) -> None:
    """One process rounds the rows of its experts to FP8 too; gradients ignore the rounding."""
    situations = [Case(**fields, fp8=True, ranks_per_node=ranks_per_node) for fields in SITUATIONS.values()]
    results = pool.run(4, run_cases_with_nan_memory, situations)
    for number, case in enumerate(situations):
        assert_same(merge_ranks([result[number] for result in results]), run_single_process(case), 1e-10)


@pytest.mark.parametrize("ranks_per_node", [None, 2], ids=["one step", "two steps"])
@pytest.mark.parametrize("fp8", [False, True], ids=["activations", "fp8"])
def test_recomputed_layers_have_the_same_gradients(pool: RankPool, fp8: bool, ranks_per_node: int | None) -> None:
    case = Case((5, 0, 3, 7), recomputed=True, fp8=fp8, ranks_per_node=ranks_per_node)
    for one, other in pool.run(4, run_cases_with_nan_memory, [case, replace(case, recomputed=False)]):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)


# The rows that are sent.


Rows = list[tuple[list[int], list[int]]]  # sent to and received from each rank, in every exchange
Exchanges = dict[tuple[str, int | None], tuple[Rows, ...]]  # of each rank, by situation and ranks per node


def rows_exchanged(cases: list[Case]) -> list[Rows]:
    """For each case, every exchange of rows on this rank."""
    return [rows_sent_and_received(case) for case in cases]


@pytest.fixture(scope="module")
def exchanged(pool: RankPool) -> Exchanges:
    keys = [(situation, ranks_per_node) for situation in SITUATIONS for ranks_per_node in (None, 2)]
    cases = [Case(**SITUATIONS[situation], ranks_per_node=ranks_per_node) for situation, ranks_per_node in keys]
    return dict(zip(keys, zip(*pool.run(4, rows_exchanged, cases), strict=True), strict=True))


def chosen_experts(case: Case) -> list[list[list[int]]]:
    """By rank and token, the experts that the first layer chooses."""
    layer = case.layers()[0]
    experts_TK = layer.gate(case.tokens()[0][0]).experts_TK
    return [part.tolist() for part in experts_TK.split(case.lengths)]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_token_is_sent_once_to_each_rank_of_its_experts(exchanged: Exchanges, situation: str) -> None:
    case = Case(**SITUATIONS[situation])
    size = case.layers()[0].config.n_routed_experts // 4
    tokens = [
        [sum(any(e // size == there for e in experts) for experts in rank) for there in range(4)]
        for rank in chosen_experts(case)
    ]
    for here, exchanges in enumerate(exchanged[situation, None]):
        sent, received = tokens[here], [tokens[there][here] for there in range(4)]
        assert exchanges[:2] == [(sent, received), (received, sent)]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_token_is_sent_once_to_each_node_of_its_experts(exchanged: Exchanges, situation: str) -> None:
    case = Case(**SITUATIONS[situation])
    size = case.layers()[0].config.n_routed_experts // 4
    chosen = chosen_experts(case)
    between, within = [[0] * 4 for _ in range(4)], [[0] * 4 for _ in range(4)]
    for rank, tokens in enumerate(chosen):
        for experts in tokens:
            ranks = {e // size for e in experts}
            for node in {there // 2 for there in ranks}:
                twin = 2 * node + rank % 2
                between[rank][twin] += 1
                for there in ranks & {2 * node, 2 * node + 1}:
                    within[twin][there] += 1
    for here, exchanges in enumerate(exchanged[situation, 2]):
        there_and_back = [(table[here], [table[there][here] for there in range(4)]) for table in (between, within)]
        expected = there_and_back + [(received, sent) for sent, received in reversed(there_and_back)]
        assert exchanges[:4] == expected


# The order of exchanges and computation.


def test_shared_experts_overlap_with_both_exchanges(pool: RankPool) -> None:
    """Rows arrive only when something waits, in memory full of NaN, so nothing before can depend on them."""
    case = Case((5, 3))
    results = pool.run(2, order_of_events, case)
    for events, _ in results:
        assert events == [
            *("start", "shared hidden", "wait", "routed", "start", "shared down", "wait"),
            *("start", "shared down backward", "wait", "routed backward"),
            *("start", "shared hidden backward", "wait"),
        ]
    expected = run_single_process(case, layers=1)
    assert_same(merge_ranks([result for _, result in results]), expected, 1e-10)


def test_results_of_several_ranks_are_summed_in_float32(pool: RankPool) -> None:
    """In bfloat16, 256 + 1 would stay 256 at every step."""
    for ranks_per_node in (None, 2):
        for found in pool.run(4, sums_of_constants, [256.0, 1.0, 1.0, 2.0], ranks_per_node):
            assert found == ([260.0], [260.0])
