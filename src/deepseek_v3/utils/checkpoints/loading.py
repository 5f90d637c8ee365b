"""Loading a checkpoint, folder or file, by any number of ranks, into tensors however they are cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from deepseek_v3.utils.checkpointing import CheckpointDirectory
from deepseek_v3.utils.checkpoints.contents import Contents, open_checkpoint
from deepseek_v3.utils.checkpoints.contents_reader import ContentsReader
from deepseek_v3.utils.checkpoints.ranks import gathered, on_any, rank_and_size, shared_errors, together
from deepseek_v3.utils.errors import CheckpointError


def load_sharded(
    path: Path, tensors: dict[str, Tensor], group: ProcessGroup | None, *, verify: bool = True
) -> None:
    """Fills `tensors`, plain ones and DTensors, in place with those of their dotted names in a checkpoint.

    All ranks of `group`, which is gloo, call this; each gives the tensors that it holds a part of. The ranks share
    out the checksums of the files, or skip them by `verify=False`. Raises CheckpointError, on all ranks and before
    anything is changed, for damage, for a name that only one side has, and for another shape or type.
    """
    contents = together(group, lambda: open_checkpoint(path))
    if verify:
        _verify(contents, group)
    together(group, lambda: _check_each(contents, tensors))
    _check_left_over(contents, tensors, group)
    with shared_errors():
        load(
            dict(tensors),
            storage_reader=ContentsReader(contents),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )


def newest_checkpoint(checkpoints: CheckpointDirectory, group: ProcessGroup | None) -> Path:
    """The newest checkpoint whose checksums hold, the same on all ranks, which share out the files.

    Rank 0 logs each that is passed over. Raises CheckpointError where there is none.
    """
    paths = gathered(group, together(group, checkpoints.newest_first))[0]
    tell = rank_and_size(group)[0] == 0
    return checkpoints.first_usable(paths, partial(verify_checkpoint, group=group), tell=tell)[0]


def verify_checkpoint(path: Path, group: ProcessGroup | None) -> None:
    """Raises CheckpointError, on all ranks, where a checkpoint is missing or damaged; the ranks share the work."""
    _verify(together(group, lambda: open_checkpoint(path)), group)


def _verify(contents: Contents, group: ProcessGroup | None) -> None:
    together(group, lambda: contents.verify(*rank_and_size(group)))


def _check_each(contents: Contents, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"{name} is on the meta device and has no memory to load into")
        if name not in contents.tensors:
            raise CheckpointError(
                f"{contents.path}: has no tensor {name!r}, which this run needs; "
                "resume with the config that it was saved with"
            )
        saved = contents.tensors[name]
        if saved.shape != tuple(tensor.shape) or saved.dtype != tensor.dtype:
            raise CheckpointError(
                f"{contents.path}: {name!r} is {saved.dtype} {list(saved.shape)} there, "
                f"{tensor.dtype} {list(tensor.shape)} here; resume with the config that it was saved with"
            )


def _check_left_over(contents: Contents, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    wanted = on_any(group, [name in tensors for name in contents.tensors])
    left_over = [name for name, place in zip(contents.tensors, wanted, strict=True) if not place]
    if left_over:
        raise CheckpointError(
            f"{contents.path}: has the tensor {left_over[0]!r}, which has no place in this run, as have "
            f"{len(left_over) - 1} others; resume with the config that it was saved with"
        )
