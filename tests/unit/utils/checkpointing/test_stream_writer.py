"""Checkpoint folders from blocks that come one by one are read like those that ranks write together."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deepseek_v3.utils.checkpointing.directory import load_checkpoint
from deepseek_v3.utils.checkpointing.stream_writer import Block, CheckpointStream

WHOLE = {
    "model.a.weight": torch.arange(60.0).view(5, 4, 3),
    "model.b": torch.arange(7, dtype=torch.int64),
    "model.c": torch.randn(6, 2).bfloat16(),
    "model.empty": torch.empty(0, 3),
}


def rows_of(tensors: dict[str, Tensor], step: int) -> Iterator[Block]:
    for name, tensor in tensors.items():
        for first in range(0, max(len(tensor), 1), step):
            offsets = (first, *(0 for _ in tensor.shape[1:]))
            yield Block(name, tuple(tensor.shape), offsets, tensor[first : first + step])


@pytest.mark.parametrize("file_bytes", [1, 60, 10**9])
@pytest.mark.parametrize("step", [1, 2, 100])
def test_blocks_become_whole_tensors_again(tmp_path: Path, step: int, file_bytes: int) -> None:
    folder = tmp_path / "checkpoint_step_0"
    folder.mkdir()
    CheckpointStream(folder, file_bytes).write(rows_of(WHOLE, step), {"step": 0, "model": {}})
    files = len(list(folder.glob("*.safetensors")))
    assert (files == 1) == (file_bytes == 10**9)
    found = load_checkpoint(folder)
    assert found["step"] == 0
    for name, tensor in WHOLE.items():
        assert torch.equal(found["model"][name.removeprefix("model.")], tensor)


def test_a_block_that_is_missing_is_noticed(tmp_path: Path) -> None:
    blocks = list(rows_of(WHOLE, 2))
    with pytest.raises(ValidationError, match="in no chunk"):
        CheckpointStream(tmp_path).write(blocks[1:], {})
    assert not (tmp_path / "index.json").exists()
