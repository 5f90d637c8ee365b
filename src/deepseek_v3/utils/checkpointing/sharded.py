"""Saving a sharded checkpoint: all ranks together, in the background.

    with ShardedWriter(checkpoints, checkpoint_group()) as writer:
        ...
        writer.save(step, state)  # a pause for a copy into CPU memory; a thread does the rest

The engine is torch.distributed.checkpoint: it plans who writes what, so that nothing is written twice, runs the
thread, and tells every rank of the error of any.


FOLDED: Loading a checkpoint, folder or file, by any number of ranks, into tensors however they are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from deepseek_v3.utils.checkpointing.checks import (
    SAME_CONFIG_ADVICE,
    mismatches,
    raise_problems,
    tensor_infos,
    unexpected_tensors,
)
from deepseek_v3.utils.checkpointing.directory import CheckpointDirectory
from deepseek_v3.utils.checkpointing.reader import CheckpointReader, DcpReader, open_checkpoint
from deepseek_v3.utils.checkpointing.safetensors_file import DTYPE_NAMES
from deepseek_v3.utils.checkpointing.state_dict import flatten
from deepseek_v3.utils.checkpointing.writer import CpuStager, DcpWriter, StagedSavePlanner
from deepseek_v3.utils.distributed.collectives import (
    any_rank,
    gather_objects,
    raise_first_rank_error,
    rank_and_size,
    run_on_all_ranks,
)
from deepseek_v3.utils.errors import CheckpointError
from deepseek_v3.utils.logging import get_logger

_log = get_logger("Checkpoint")


class PendingSave:
    """A checkpoint that is being written; `path` is what it will be called. A process that ends waits for it."""

    def __init__(self, path: Path, future: Future[Any]) -> None:
        self.path, self._future = path, future

    def finished(self) -> bool:
        """Whether this rank has nothing left to do: the checkpoint is complete, or has failed."""
        return self._future.done()

    def finish(self) -> None:
        """Waits until it is complete or has failed, and raises nothing."""
        wait([self._future])

    def wait(self) -> Path:
        """Waits until the checkpoint is complete. Raises the CheckpointError of any rank on all ranks."""
        with raise_first_rank_error():
            self._future.result()
        return self.path


def save_sharded(
    folder: Path,
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
    group: ProcessGroup | None,
    *,
    completed: Callable[[], None] = lambda: None,
    copies: CpuStager | None = None,
) -> PendingSave:
    """Begins to write `folder`, which appears whole or not at all and replaces an earlier one.

    `tensors` by name: a DTensor is written by those who hold its parts, a plain tensor once, by one of those who
    have the name. They have been copied when this returns, and may change. `plain` holds what JSON can; rank 0's
    counts. `completed` is called on rank 0 when the folder has got its name. All ranks of `group`, which is gloo,
    call this; one save has to end before the next begins, which may then use its `copies`. Raises TypeError for
    numbers that cannot be saved.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise TypeError(
                f"{name} is of {tensor.dtype}; a sharded checkpoint holds {', '.join(map(str, DTYPE_NAMES))}"
            )
    copies = copies or CpuStager()
    future = async_save(
        {name: tensor.detach() for name, tensor in tensors.items()},
        storage_writer=DcpWriter(folder, plain, completed),
        planner=StagedSavePlanner(copies),
        async_stager=copies,
        process_group=group,
        no_dist=group is None,
    )
    assert isinstance(future, Future)
    return PendingSave(folder, future)


class ShardedWriter:
    """Saves the checkpoints of a run one after another; for a `with` block, which ends when all are written.

    `saved` is called on rank 0, in the thread that writes, with the path of each checkpoint that is complete.
    The block has to end before torch.distributed is shut down.
    """

    def __init__(
        self,
        checkpoints: CheckpointDirectory,
        group: ProcessGroup | None,
        saved: Callable[[Path], None] = lambda _: None,
    ) -> None:
        self._checkpoints, self._group, self._saved = checkpoints, group, saved
        self._copies = CpuStager()
        self._pending: PendingSave | None = None

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.warning("%s", failure)  # the error that ended the block is the one to be told

    def save(self, step: int, state: dict[str, Any]) -> PendingSave:
        """Begins to save nested dicts as `CheckpointDirectory.save` would, among them DTensors, on all ranks.

        First waits for the save before, and raises its CheckpointError. Outdated checkpoints go when this one is
        complete. Raises TypeError, naming the entry, for what a sharded checkpoint cannot hold.
        """
        self.wait()
        tensors, plain = flatten(state)
        folder = self._checkpoints.folder_of(step)
        completed = partial(self._completed, folder)
        self._pending = save_sharded(folder, tensors, plain, self._group, completed=completed, copies=self._copies)
        return self._pending

    def finish(self) -> None:
        """Waits until what is being written is complete or has failed; for another thread than that which saves."""
        pending = self._pending
        if pending is not None:
            pending.finish()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises its CheckpointError on all ranks."""
        try:
            if self._pending is not None:
                self._pending.wait()
        finally:
            self._pending = None

    def _completed(self, folder: Path) -> None:
        self._saved(folder)
        self._checkpoints.remove_outdated(folder)


def load_sharded(
    path: Path, tensors: dict[str, Tensor], group: ProcessGroup | None, *, verify: bool = True
) -> None:
    """Fills `tensors`, plain ones and DTensors, in place with those of their dotted names in a checkpoint.

    All ranks of `group`, which is gloo, call this; each gives the tensors that it holds a part of. The ranks share
    out the checksums of the files, or skip them by `verify=False`. Raises CheckpointError, on all ranks and before
    anything is changed, for damage, for names that only one side has, and for other shapes or types: all in one.
    """
    contents = run_on_all_ranks(group, lambda: open_checkpoint(path))
    if verify:
        _verify(contents, group)
    _check_tensors(contents, tensors, group)
    with raise_first_rank_error():
        load(
            dict(tensors),
            storage_reader=DcpReader(contents),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
            no_dist=group is None,
        )


def newest_checkpoint(checkpoints: CheckpointDirectory, group: ProcessGroup | None) -> Path:
    """The newest checkpoint whose checksums hold, the same on all ranks, which share out the files.

    Rank 0 logs each that is passed over. Raises CheckpointError where there is none.
    """
    paths = gather_objects(group, run_on_all_ranks(group, checkpoints.newest_first))[0]
    tell = rank_and_size(group)[0] == 0
    return checkpoints.first_usable(paths, partial(verify_checkpoint, group=group), tell=tell)[0]


def verify_checkpoint(path: Path, group: ProcessGroup | None) -> None:
    """Raises CheckpointError, on all ranks, where a checkpoint is missing or damaged; the ranks share the work."""
    _verify(run_on_all_ranks(group, lambda: open_checkpoint(path)), group)


def _verify(contents: CheckpointReader, group: ProcessGroup | None) -> None:
    run_on_all_ranks(group, lambda: contents.verify(*rank_and_size(group)))


def _check_tensors(contents: CheckpointReader, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Raises one CheckpointError on all ranks, with the problems of all of them."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise TypeError(f"{name} is on the meta device and has no memory to load into")
    wanted = any_rank(group, [name in tensors for name in contents.tensors])
    left_over = [name for name, place in zip(contents.tensors, wanted, strict=True) if not place]
    of_ranks = gather_objects(group, mismatches(contents.tensors, tensor_infos(tensors)))
    problems = [problem for of_rank in of_ranks for problem in of_rank]
    raise_problems(contents.path, [*problems, *unexpected_tensors(left_over)], SAME_CONFIG_ADVICE)
