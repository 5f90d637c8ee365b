"""Indexes with a right checksum and wrong contents: each is refused in one line, or loads the same bits."""

from __future__ import annotations

import hashlib
import json
import random
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.index import Chunk, Index, StoredFile, StoredTensor, chunk_name, tiling_problem
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES, write_tensor_file
from deepseek_v3.utils.checkpointing.sharded import load_sharded
from deepseek_v3.utils.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

TENSORS = {
    "model.a.weight": torch.arange(12.0).view(4, 3),
    "model.b.weight": -torch.arange(12.0).view(4, 3),
    "model.bias": torch.arange(6, dtype=torch.int64),
    "model.scale": torch.tensor(0.5, dtype=torch.bfloat16),
    "model.none": torch.zeros(0, 2),
}
PLAIN = {"step": 3, "model": {}, "notes": [1, 2.5, None, {"x": "y"}]}


def write_folder(folder: Path) -> Path:
    """An index with two files; each tensor with rows is stored in two chunks."""
    folder.mkdir()
    boxes = [
        (rank, name, (first, *[0] * (tensor.ndim - 1)), part)
        for name, tensor in TENSORS.items()
        for rank, first, part in (
            [(0, 0, tensor[:2]), (1, 2, tensor[2:])] if tensor.ndim and len(tensor) else [(0, 0, tensor)]
        )
    ]
    files, chunks = {}, {name: [] for name in TENSORS}
    for rank in (0, 1):
        mine = {
            chunk_name(name, tuple(TENSORS[name].shape), offsets[: part.ndim], tuple(part.shape)): part
            for owner, name, offsets, part in boxes
            if owner == rank
        }
        file = f"rank_{rank:05d}.safetensors"
        num_bytes, sha256, begins = write_tensor_file(folder / file, mine)
        files[file] = StoredFile(bytes=num_bytes, sha256=sha256)
        for owner, name, offsets, part in boxes:
            sizes, place = tuple(part.shape), offsets[: part.ndim]
            if owner == rank:
                begin = begins[chunk_name(name, tuple(TENSORS[name].shape), place, sizes)]
                chunks[name].append(Chunk(file=file, begin=begin, offsets=place, sizes=sizes))
    tensors = {
        name: StoredTensor(dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), chunks=tuple(chunks[name]))
        for name, tensor in TENSORS.items()
    }
    Index(files=files, tensors=tensors, plain=PLAIN).write(folder)
    return folder


def write_index(folder: Path, text: str) -> None:
    """Writes an index with this JSON text and a right checksum."""
    body = text[1:].encode()
    head = f'{{"version":1,"sha256":"{hashlib.sha256(body).hexdigest()}",'.encode()
    (folder / "index.json").write_bytes(head + body)


def read_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / "index.json").read_text())
    return {name: value for name, value in index.items() if name not in ("version", "sha256")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "checkpoint_step_3")


def refusal(folder: Path) -> str:
    """The error message, which both ways of loading share; neither writes anything."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(folder)
    filled = {name: torch.full_like(tensor, 7) for name, tensor in TENSORS.items()}
    with pytest.raises(CheckpointError):
        load_sharded(folder, filled, None)
    assert all(bool((tensor == 7).all()) for tensor in filled.values())
    assert "\n" not in str(error.value)
    return str(error.value)


# Tiling


def _cut(draw: random.Random, begin: list[int], end: list[int], depth: int) -> list[tuple[tuple[int, ...], ...]]:
    """Boxes made from one box by cutting it repeatedly, along any axis at any position."""
    axes = [axis for axis in range(len(begin)) if end[axis] - begin[axis] > 1]
    if not depth or not axes:
        return [(tuple(begin), tuple(e - b for b, e in zip(begin, end, strict=True)))]
    axis = draw.choice(axes)
    middle = draw.randrange(begin[axis] + 1, end[axis])
    left, right = list(end), list(begin)
    left[axis] = right[axis] = middle
    return [*_cut(draw, begin, left, depth - 1), *_cut(draw, right, end, depth - 1)]


@settings(max_examples=50)
@given(st.lists(st.integers(1, 5), max_size=3), st.integers(0, 4), st.randoms(use_true_random=False))
def test_boxes_that_tile_a_shape_are_recognised(shape: list[int], depth: int, draw: random.Random) -> None:
    boxes = _cut(draw, [0] * len(shape), list(shape), depth)
    draw.shuffle(boxes)
    empty = (tuple(0 for _ in shape), tuple(0 for _ in shape))
    assert tiling_problem(tuple(shape), [*boxes, *([empty] if shape else [])]) is None
    wrong = list(boxes)
    if draw.random() < 0.5:
        wrong[draw.randrange(len(boxes))] = draw.choice(boxes)
    else:
        wrong.append(draw.choice(boxes))
    counts = {
        position: sum(all(o <= p < o + s for p, o, s in zip(position, *box, strict=True)) for box in wrong)
        for position in product(*map(range, shape))
    }
    first = next((position for position, count in counts.items() if count != 1), None)
    found = tiling_problem(tuple(shape), wrong)
    if first is None:
        assert found is None
    else:
        expected = f"in {counts[first]} chunks" if counts[first] else "in no chunk"
        assert found == f"has the element at {list(first)} {expected}"


def test_huge_shapes_are_checked_at_once() -> None:
    rows = [((row * 2**40, 0), (2**40, 2**40)) for row in range(1000)]
    assert tiling_problem((1000 * 2**40, 2**40), rows) is None
    assert tiling_problem((1000 * 2**40, 2**40), rows[1:]) == "has the element at [0, 0] in no chunk"
    corners = [((0,) * 20, (1,) * 20)]
    assert tiling_problem((2,) * 20, corners) == "is cut along 20 axes, expected at most 8"


# Inconsistent indexes


def test_a_chunk_named_twice_is_refused(folder: Path) -> None:
    index = read_index(folder)
    chunks = index["tensors"]["model.a.weight"]["chunks"]
    chunks[1] = chunks[0]
    write_index(folder, json.dumps(index))
    message = refusal(folder)
    assert "'model.a.weight' has the element at [0, 0] in 2 chunks" in message
    assert "'model.a.weight' overlaps 'model.a.weight' at byte" in message


def test_all_problems_are_in_one_message(folder: Path) -> None:
    index = read_index(folder)
    index["tensors"]["model.a.weight"]["chunks"].pop()
    index["tensors"]["model.bias"]["chunks"][0]["begin"] += 4
    index["tensors"]["model.scale"]["dtype"] = "F128"
    write_index(folder, json.dumps(index))
    message = refusal(folder)
    for problem in ("'model.a.weight' has the element at [2, 0] in no chunk", "not aligned", "has dtype 'F128'"):
        assert problem in message


def test_headers_that_contradict_the_index_are_refused(folder: Path) -> None:
    index = read_index(folder)
    one, other = (index["tensors"][name]["chunks"] for name in ("model.a.weight", "model.b.weight"))
    one[0]["begin"], other[0]["begin"] = other[0]["begin"], one[0]["begin"]
    write_index(folder, json.dumps(index))
    message = refusal(folder)
    assert "rank_00000.safetensors: has F32 [2, 3] at byte" in message
    assert "as 'model.a.weight[0:2,0:3]', and by index.json F32 [2, 3] at byte" in message


def test_a_file_without_a_header_is_refused(folder: Path) -> None:
    index = read_index(folder)
    lengths = [length.to_bytes(8, "little") for length in (2, 7, 2**40)]
    for content in (b"", lengths[0] + b"[]", lengths[1] + b'{"a":1}', lengths[2]):
        path = folder / "rank_00001.safetensors"
        path.write_bytes(content.ljust(index["files"][path.name]["bytes"], b"\0"))
        index["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_index(folder, json.dumps(index))
        assert "has no header of the safetensors format" in refusal(folder)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"step": 3', '"step": 3, "step": 4', "the key 'step' is given twice"),
        ('"step": 3', '"step": NaN', "found NaN, expected a finite number"),
        ('"step": 3', '"step": ' + "[" * 100_000 + "]" * 100_000, ""),
        ('"step": 3', '"step": ' + "9" * 10_000, ""),
        ('"step": 3', '"step": "\udcff"', ""),
        ('"plain"', '"plane"', "plain: Field required"),
        ("}", "", ""),
    ],
)
def test_ambiguous_json_is_refused(folder: Path, old: str, new: str, problem: str) -> None:
    text = json.dumps(read_index(folder)).replace(old, new, 1)
    body = text[1:].encode(errors="surrogateescape")
    head = f'{{"version":1,"sha256":"{hashlib.sha256(body).hexdigest()}",'.encode()
    (folder / "index.json").write_bytes(head + body)
    assert problem in refusal(folder)


# Any mutation

JUNK = [None, True, "", "x", 0, -1, 1, 1.5, 2**31, 2**63, 10**30, [], {}, [[]], [[[[0]]]], {"a": {}}, "F32", "I32"]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in [(*path, key), *_places(item, (*path, key))]]


def _parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def mutated(index: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """An index with one entry removed, doubled, swapped, resized or replaced by junk."""
    index = deepcopy(index)
    places = _places(index)
    path, other = draw.choice(places), draw.choice(places)
    parent, key = _parent(index, path), path[-1]
    match draw.choice(["remove", "double", "exchange", "resize", "junk"]):
        case "remove":
            del parent[key]
        case "double" if isinstance(parent, list):
            parent.insert(key, deepcopy(parent[key]))
        case "double":
            parent[draw.choice([f"{key}x", *parent, "rank_00002.safetensors"])] = deepcopy(parent[key])
        case "exchange" if path[: len(other)] != other and other[: len(path)] != path:
            one, two = parent[key], _parent(index, other)[other[-1]]
            parent[key], _parent(index, other)[other[-1]] = two, one
        case "resize" if type(parent[key]) is int:
            parent[key] = draw.choice([parent[key] + 1, parent[key] - 1, 2 * parent[key], parent[key] + 8])
        case _:
            parent[key] = deepcopy(draw.choice(JUNK))
    return index


def test_any_wrong_index_raises_a_checkpoint_error(folder: Path) -> None:
    draw, good = random.Random(0), read_index(folder)
    messages: list[str] = []
    untouched = True
    for _ in range(100):
        index = mutated(good, draw)
        write_index(folder, json.dumps(index))
        filled = {name: torch.full_like(tensor, 7) for name, tensor in TENSORS.items()}
        try:
            load_checkpoint(folder)
            load_sharded(folder, filled, None)
        except CheckpointError as error:
            messages.append(str(error))
            untouched = untouched and all(bool((tensor == 7).all()) for tensor in filled.values())
        else:
            assert all(torch.equal(filled[name], tensor) for name, tensor in TENSORS.items()), index
    assert untouched
    assert 70 < len(messages) < 100
    assert all(str(folder) in message and "\n" not in message for message in messages)
