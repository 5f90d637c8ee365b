"""Slurm's notations, against lists written out the long way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.utils.distributed.launch import first_host, tasks_on_node

NAMES = st.text("abcxyz-", min_size=1, max_size=5).map(lambda text: f"n{text}")


@st.composite
def _entries(draw: st.DrawFn) -> tuple[str, str]:
    """One entry of a list of nodes, and the first node that it stands for."""
    name = draw(NAMES)
    if draw(st.booleans()):
        return name, name
    width = draw(st.integers(1, 4))
    numbers = [f"{draw(st.integers(0, 10**width - 1)):0{width}d}" for _ in range(draw(st.integers(1, 3)))]
    ranges = ",".join(f"{number}-{'9' * width}" if draw(st.booleans()) else number for number in numbers)
    suffix = draw(st.sampled_from(["", "-ib", ".cluster"]))
    return f"{name}[{ranges}]{suffix}", f"{name}{numbers[0]}{suffix}"


@given(st.lists(_entries(), min_size=1, max_size=4))
def test_the_first_host_of_any_list(entries: list[tuple[str, str]]) -> None:
    assert first_host(",".join(entry for entry, _ in entries)) == entries[0][1]


@pytest.mark.parametrize(
    ("node_list", "expected"),
    [("node[01-03,07]", "node01"), ("gpu7", "gpu7"), ("a,b[1-2]", "a"), ("rack[2-3]n[04,08-09],x", "rack2n04")],
)
def test_examples_of_lists(node_list: str, expected: str) -> None:
    assert first_host(node_list) == expected


@pytest.mark.parametrize("node_list", ["", ",a", "node[", "node[]", "node[01-03"])
def test_what_is_no_list_of_nodes_is_refused(node_list: str) -> None:
    with pytest.raises(ValueError, match="not a list of nodes"):
        first_host(node_list)


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 5)), min_size=1, max_size=5), st.data())
def test_tasks_of_any_node(groups: list[tuple[int, int]], data: st.DataObject) -> None:
    counts = ",".join(str(tasks) if nodes == 1 else f"{tasks}(x{nodes})" for tasks, nodes in groups)
    written_out = [tasks for tasks, nodes in groups for _ in range(nodes)]
    node = data.draw(st.integers(0, len(written_out) - 1))
    assert tasks_on_node(counts, node) == written_out[node]
    with pytest.raises(ValueError, match="has no node"):
        tasks_on_node(counts, len(written_out))


def test_what_is_no_list_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="not a list of task counts"):
        tasks_on_node("8(x", 0)
