"""Clusters: connected components against a plain search, and the document kept of each."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.data.deduplication.clusters import choose_kept, connected_components
from deepseek_v3.data.deduplication.key_files import group_keys, repeated_keys

Pairs = set[tuple[int, int]]
DOCUMENTS = 12
PAIRS = st.sets(
    st.tuples(st.integers(0, 11), st.integers(0, 11)).filter(lambda pair: pair[0] < pair[1]), max_size=25
)


def _columns(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    one, other = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
    return one, other


def _reachable(pairs: Pairs, start: int) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        near = {b if a == here else a for a, b in pairs if here in (a, b)} - found
        found |= near
        waiting += near
    return found


def _all(kept: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return np.ones(len(documents), np.bool_)


def _none(kept: np.ndarray, documents: np.ndarray) -> np.ndarray:
    return np.zeros(len(documents), np.bool_)


@given(PAIRS)
def test_connected_components_equal_a_plain_search(pairs: Pairs) -> None:
    expected = [min(_reachable(pairs, document)) for document in range(DOCUMENTS)]
    assert connected_components(*_columns(pairs), DOCUMENTS).tolist() == expected
    assert choose_kept(*_columns(pairs), DOCUMENTS, _all).tolist() == expected


@given(PAIRS, st.sets(st.integers(0, 11)))
def test_at_most_one_document_of_each_pair_is_kept(pairs: Pairs, close: set[int]) -> None:
    kept = choose_kept(*_columns(pairs), DOCUMENTS, lambda _, documents: np.isin(documents, list(close))).tolist()
    for one, other in pairs:
        assert kept[one] != one or kept[other] != other
    for document, keeper in enumerate(kept):
        assert kept[keeper] == keeper <= document
        if document != keeper:
            assert (keeper, document) in pairs or document in close
            assert keeper in _reachable(pairs, document)


def test_a_chain_of_pairs_is_split_without_closeness() -> None:
    chain = {(i, i + 1) for i in range(6)}
    assert choose_kept(*_columns(chain), 8, _all).tolist() == [0] * 7 + [7]
    assert choose_kept(*_columns(chain), 8, _none).tolist() == [0, 0, 2, 2, 4, 4, 6, 7]


@given(st.lists(st.integers(0, 9), max_size=40))
def test_group_keys_sorts_by_key_then_position(keys: list[int]) -> None:
    found = group_keys(np.array(keys, np.uint64))
    expected = sorted(range(len(keys)), key=lambda position: (keys[position], position))
    assert found.positions.tolist() == expected
    values = sorted(set(keys))
    assert [keys[position] for position in expected] == [values[group] for group in found.groups.tolist()]
    more = repeated_keys(found)
    assert more.positions.tolist() == [position for position in expected if keys.count(keys[position]) > 1]
    assert [values[group] for group in more.groups.tolist()] == [keys[i] for i in more.positions.tolist()]
