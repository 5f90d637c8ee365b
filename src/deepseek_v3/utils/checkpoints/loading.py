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
from deepseek_v3.utils.checkpoints.expectations import OTHER_CONFIG, infos, refuse, unfit, unknown
from deepseek_v3.utils.checkpoints.ranks import gathered, on_any, rank_and_size, shared_errors, together


def load_sharded(
    path: Path, tensors: dict[str, Tensor], group: ProcessGroup | None, *, verify: bool = True
) -> None:
    """Fills `tensors`, plain ones and DTensors, in place with those of their dotted names in a checkpoint.

    All ranks of `group`, which is gloo, call this; each gives the tensors that it holds a part of. The ranks share
    out the checksums of the files, or skip them by `verify=False`. Raises CheckpointError, on all ranks and before
    anything is changed, for damage, for names that only one side has, and for other shapes or types: all in one.
    """
    contents = together(group, lambda: open_checkpoint(path))
    if verify:
        _verify(contents, group)
    _check_tensors(contents, tensors, group)
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


def _check_tensors(contents: Contents, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Raises one CheckpointError on all ranks, with the problems of all of them."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"{name} is on the meta device and has no memory to load into")
    wanted = on_any(group, [name in tensors for name in contents.tensors])
    left_over = [name for name, place in zip(contents.tensors, wanted, strict=True) if not place]
    of_ranks = gathered(group, unfit(contents.tensors, infos(tensors)))
    problems = [problem for of_rank in of_ranks for problem in of_rank]
    refuse(contents.path, [*problems, *unknown(left_over)], OTHER_CONFIG)
