"""Flattening of training states, safetensors files, and states that several ranks cannot load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from deepseek_v3.utils.checkpointing.directory import save_checkpoint
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPES, map_bytes, write_tensor_file
from deepseek_v3.utils.checkpointing.sharded import load_sharded
from deepseek_v3.utils.checkpointing.state_dict import flatten, unflatten
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.files import sha256_of_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
LEAVES = JSON | st.integers(0, 9).map(torch.tensor)
KEYS = st.text("abc", min_size=1, max_size=2)
STATES = st.recursive(
    st.dictionaries(KEYS, LEAVES, max_size=3),
    lambda inner: st.dictionaries(
        KEYS, LEAVES | inner | st.dictionaries(st.text("a.", min_size=1), LEAVES), max_size=3
    ),
    max_leaves=6,
)


def shown(value: Any) -> Any:
    """The nested dicts with tensors replaced by values that `==` can compare."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return ("tensor", value.item()) if isinstance(value, Tensor) else value


@given(state=STATES)
def test_unflatten_is_the_inverse_of_flatten(state: dict[str, Any]) -> None:
    tensors, plain = flatten(state)
    assert shown(unflatten(tensors, plain)) == shown(state)
    assert not any(isinstance(value, Tensor) for value in plain.values())


def test_names_are_paths_with_dots() -> None:
    weight = torch.zeros(1)
    moments = {"num_steps": 3, "exp_avg": {"norm.weight": weight}, "exp_avg_sq": {"norm.weight": weight}}
    state = {"step": 1, "model": {"norm.weight": weight}, "optimizer": moments}
    tensors, plain = flatten(state)
    assert list(tensors) == [
        "model.norm.weight",
        "optimizer.exp_avg.norm.weight",
        "optimizer.exp_avg_sq.norm.weight",
    ]
    assert plain == {"step": 1, "model": {}, "optimizer": {"num_steps": 3, "exp_avg": {}, "exp_avg_sq": {}}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {1: 2}}, r"state\['a'\] has the key 1"),
        ({"a": (1, 2)}, r"state\['a'\] is \(1, 2\) \(tuple\)"),
        ({"a": [{"b": torch.zeros(1)}]}, r"state\['a'\]\[0\]\['b'\] is tensor"),
        ({"a": float("nan")}, r"state\['a'\] is nan"),
        ({"a": [{1: 2}]}, r"state\['a'\]\[0\] has the key 1"),
        ({"a": {"b.c": {"d": torch.zeros(1)}}}, r"state\['a'\]\['b.c'\]\['d'\] is a tensor whose dotted name"),
        ({"a": {"b": {}, "b.c": torch.zeros(1)}}, r"state\['a'\]\['b.c'\] is a tensor whose dotted name"),
    ],
)
def test_flatten_refuses_what_unflatten_cannot_rebuild(state: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        flatten(state)


@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=8
    ),
    seed=st.integers(0, 2**32),
)
def test_a_tensor_file_is_valid_safetensors(
    shapes: list[tuple[str, list[int]]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "tensors"
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{number}[é]": torch.randint(2, shape, generator=draw).to(DTYPES[dtype])
        for number, (dtype, shape) in enumerate(shapes)
    }
    written = write_tensor_file(path, tensors)
    assert written.num_bytes == path.stat().st_size
    assert written.sha256 == sha256_of_file(path)
    mapped = map_bytes(path, written.num_bytes)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert found.tolist() == tensor.tolist()
            here = mapped[written.begins[name] :][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            assert here.tolist() == tensor.tolist()


def test_tensors_in_lists_are_not_of_format_2(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_1.pt"
    save_checkpoint(path, {"optimizer": {"moments": [{"exp_avg": torch.zeros(1)}]}})
    with pytest.raises(CheckpointError, match=r"state\['optimizer'\]\['moments'\]\[0\].*format 2 does not have"):
        load_sharded(path, {}, None)


def test_meta_tensors_cannot_be_loaded_into(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_step_1.pt"
    save_checkpoint(path, {"w": torch.zeros(1)})
    with pytest.raises(TypeError, match="w is on the meta device"):
        load_sharded(path, {"w": torch.zeros(1, device="meta")}, None)
